"""A finetuning without a network: studies whose anatomy is readable from the voxel values, and a one-number model.

The model is its ``skill`` in [0, 1]: of every structure it segments that share, lowest slices first. Its stage raises
the skill by a fixed amount a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor, nn

from medvl_sam2.checkpoint import CheckpointMeta, load_checkpoint, save_checkpoint
from medvl_sam2.config import ModelConfig
from medvl_sam2.modeling.compute import Precision
from medvl_sam2.synthesis.records import Case
from medvl_sam2.training.finetune import FinetuneBackend, FinetuneData, FinetuneStage
from medvl_sam2.training.finetune_records import FinetuneConfig, FinetuneSample
from medvl_sam2.training.stage import Draw, ParameterGroup, Run
from medvl_sam2.training.volume_sources import from_case
from medvl_sam2.types import Modality, Prompt, Segmentation, Volume
from medvl_sam2.vocabulary import CLASSES

SHAPE = (30, 26, 22)
AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])
ORGANS = ("spleen", "kidney_right", "liver", "heart")
CENTRES = ((8, 7, 6), (21, 7, 14), (21, 18, 6), (8, 18, 14))


def anatomy(seed: int) -> np.ndarray:
    """Labels (I, J, K): ``ORGANS[n]`` as value of its class, an ellipsoid near its usual place."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), axis=-1)
    labels = np.zeros(SHAPE, dtype=np.uint8)
    for name, centre in zip(ORGANS, CENTRES, strict=True):
        middle = np.array(centre) + rng.integers(-1, 2, 3)
        radius = rng.uniform(4.0, 5.5, 3)
        labels[(((grid - middle) / radius) ** 2).sum(axis=-1) <= 1] = CLASSES.index(name) + 1
    return labels


def image_of(labels: np.ndarray, seed: int) -> np.ndarray:
    """CT-like values from which labels can be read back: 20 HU a class on fat, a little noise."""
    noise = np.random.default_rng(seed).integers(-4, 5, labels.shape)
    return np.where(labels > 0, labels.astype(np.int16) * 20, -100).astype(np.int16) + noise.astype(np.int16)


def readable(image: np.ndarray) -> np.ndarray:
    """Labels of :func:`image_of`."""
    return np.where(image > 10, np.rint(image / 20.0), 0).astype(np.int64)


def make_samples(folder: Path, count: int, spoil: Mapping[int, Any] | None = None) -> list[FinetuneSample]:
    """``count`` studies of as many patients; ``spoil[n]`` changes the labels of study n before they are written."""
    samples = []
    for n in range(count):
        labels = anatomy(n)
        image = folder / f"case{n}.nii.gz"
        nib.save(nib.Nifti1Image(image_of(labels, n), AFFINE), image)
        submitted = (spoil or {}).get(n, lambda same: same)(labels)
        mask = folder / f"case{n}_label.nii.gz"
        nib.save(nib.Nifti1Image(submitted.astype(np.uint8), AFFINE), mask)
        names = {CLASSES.index(name) + 1: name for name in ORGANS}
        samples.append(FinetuneSample(image, mask, names, f"patient{n}", f"case{n}"))
    return samples


def make_case(seed: int) -> Case:
    """A generated case of the same anatomy."""
    labels = anatomy(seed)
    empty = np.zeros_like(labels)
    return Case(
        image_of(labels, seed), labels, labels, empty, (3.0, 2.0, 2.0), Modality.CT, "native", "trunk", (), (), "",
        (), (), seed,
    )  # fmt: skip


def write_model(directory: Path, skill: float, generated_skill: float | None = None) -> Path:
    """A checkpoint of that skill; ``generated_skill`` where it is another one on generated cases."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = directory.parent / "tokenizer_source.json"
    tokenizer.write_text("{}", encoding="utf-8")
    state = {"skill": torch.tensor([skill, skill if generated_skill is None else generated_skill])}
    meta = CheckpointMeta("fake", "base", "A model for tests.")
    save_checkpoint(directory, state, ModelConfig.tiny(), tokenizer, meta, overwrite=True)
    return directory


class FakePredictor:
    """Reads the anatomy off the voxel values and keeps the share of it that its skill allows."""

    classes = CLASSES

    def __init__(self, checkpoint: Path, device: str = "cpu", precision: Precision = "float32") -> None:
        self.skill = load_checkpoint(checkpoint).state["skill"].tolist()
        self.device, self.precision = device, precision

    def open(self, volume: Volume) -> Volume:
        return volume

    def segment_prompt(self, session: Volume, prompt: Prompt, name: str = "object") -> Segmentation:
        assert prompt.box is not None
        low, high = (np.rint(corner).astype(int) for corner in prompt.box)
        inside = readable(session.array)[low[0] : high[0] + 1, low[1] : high[1] + 1, low[2] : high[2] + 1]
        value = int(np.bincount(inside[inside > 0], minlength=2).argmax()) if (inside > 0).any() else -1
        return self._answer(session, {1: value}, (name,))

    def segment_classes(self, session: Volume, classes: Sequence[str] = ()) -> Segmentation:
        values = {n: CLASSES.index(name) + 1 for n, name in enumerate(classes, start=1)}
        return self._answer(session, values, tuple(classes))

    def _answer(self, volume: Volume, values: Mapping[int, int], names: tuple[str, ...]) -> Segmentation:
        skill = self.skill[0 if volume.source is not None else 1]
        anatomy_here = readable(volume.array)
        mask = np.zeros(anatomy_here.shape, dtype=np.uint8)
        for number, value in values.items():
            where = np.argwhere(anatomy_here == value)
            kept = where[: round(len(where) * skill)]
            mask[tuple(kept.T)] = number
        return Segmentation(mask, volume.geometry, names)


class FakeStage(FinetuneStage):
    """Raises the skill by ``gain`` a step and changes the one on generated cases by ``drift``."""

    def __init__(self, base: Path, config: FinetuneConfig, data: FinetuneData, habits: FakeBackend) -> None:
        super().__init__(config, data)
        self.base, self.habits, self.steps, self.validations = base, habits, 0, 0
        self.skill = nn.Module()
        self.skill.register_buffer("values", load_checkpoint(base).state["skill"].float())
        self.skill.register_parameter("idle", nn.Parameter(torch.zeros(1)))

    @property
    def module(self) -> nn.Module:
        return self.skill

    def groups(self) -> list[ParameterGroup]:
        return [ParameterGroup(list(self.skill.parameters()), self.config.learning_rate)]

    def loss(self, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        self.steps += 1
        if self.steps == self.habits.fail_at:
            raise KeyboardInterrupt
        values = self.skill.get_buffer("values")
        values.add_(torch.tensor([self.habits.gain, self.habits.drift])).clamp_(max=1.0)
        loss = 1 - values[0] + 0 * self.skill.get_parameter("idle").sum()
        return loss * (float("nan") if self.steps == self.habits.broken_at else 1.0), {}

    def validate(self, run: Run) -> dict[str, float]:
        self.validations += 1
        return {"held_out_loss": 1 - self.skill.get_buffer("values")[0].item()}

    def export(self, directory: Path, meta: CheckpointMeta, weights: Mapping[str, Tensor]) -> None:
        checkpoint = load_checkpoint(self.base)
        state = {"skill": weights["values"]}
        save_checkpoint(directory, state, checkpoint.config, checkpoint.tokenizer_path, meta, overwrite=True)


class FakeBackend:
    """Makes fake stages of given habits and remembers them; the loss of step ``broken_at`` is not a number."""

    def __init__(
        self, gain: float = 0.01, drift: float = 0.0, fail_at: int | None = None, broken_at: int | None = None
    ) -> None:
        self.gain, self.drift, self.fail_at, self.broken_at = gain, drift, fail_at, broken_at
        self.stages: list[FakeStage] = []

    def stage(self, base: Path, config: FinetuneConfig, data: FinetuneData) -> FakeStage:
        self.stages.append(FakeStage(base, config, data, self))
        return self.stages[-1]

    def backend(self, shipped: Path) -> FinetuneBackend:
        return FinetuneBackend(self.stage, FakePredictor, make_case, from_case, lambda: shipped)
