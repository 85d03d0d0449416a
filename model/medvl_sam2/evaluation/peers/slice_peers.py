"""Peers on SAM2 over slices: our own segmenter from a random start, and SAM2-tiny finetuned alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from medvl_sam2.checkpoint import CheckpointMeta, shipped_checkpoint
from medvl_sam2.config import ModelConfig, SceneConfig, SliceConfig
from medvl_sam2.modeling.compute import has_bfloat16_units
from medvl_sam2.modeling.slice_segmenter import SliceSegmenter
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.unified import UnifiedModel
from medvl_sam2.predictor import Predictor
from medvl_sam2.predictor.first_prompts import InteractiveConfig
from medvl_sam2.training.batch_stream import BatchShape, RowBatch, batch_stream
from medvl_sam2.training.run_settings import plain_settings, weights_digest
from medvl_sam2.training.samples import LabelledVolume, volumes_digest
from medvl_sam2.training.segmentation_steps import SegmentationLearner, SegmentationSteps
from medvl_sam2.training.stage import Draw, ParameterGroup, Stage

_NOTICE = "a benchmark's weights: only points, boxes and masks mean anything to them"


def without_scene(slices: SliceConfig | None = None) -> ModelConfig:
    """The tiny preset without its scene, round a segmenter of any size."""
    tiny = ModelConfig.tiny()
    return replace(tiny, scene=SceneConfig(lesions=0), slices=slices or tiny.slices)


def empty_model(config: ModelConfig) -> UnifiedModel:
    """A model with random weights and the shipped tokenizer."""
    return UnifiedModel(config, Tokenizer.load(shipped_checkpoint() / "tokenizer.json"))


def prompted(segmenter: SliceSegmenter, config: ModelConfig, name: str, assist: bool) -> Predictor:
    """A predictor on trained slices alone; ``assist``: with our intensity-grown start and strokes.

    In float32 wherever it runs, as the other contenders compute.
    """
    model = empty_model(config)
    model.segmenter.load_state_dict(segmenter.state_dict())
    meta = CheckpointMeta(name, "0", _NOTICE)
    return Predictor(model, meta, InteractiveConfig(assist=assist), precision="float32")


class PromptStage(Stage):
    """Finetunes a segmenter on prompted slices and short stacks; no name of an object reaches it."""

    key = "sam2"
    name = "SAM2 alone"

    def __init__(
        self,
        segmenter: SliceSegmenter,
        volumes: Sequence[LabelledVolume],
        weights: Sequence[float],
        device: str = "cpu",
        shape: BatchShape | None = None,
        seed: int = 0,
    ) -> None:
        self._learner = SegmentationLearner(segmenter).to(device).train()
        self._steps = SegmentationSteps(self._learner, seed, bfloat16=has_bfloat16_units(device))
        self._shape, self._seed = shape or BatchShape(0, 0, 8, 2, 4), seed
        self._volumes = [replace(v, targets=tuple(replace(t, name=f"a {t.name}") for t in v.targets)) for v in volumes]
        self._weights = list(weights)
        self._rows: Iterator[RowBatch] | None = None
        self._begun = {
            "slices": plain_settings(segmenter.config),
            "shape": plain_settings(self._shape),
            "seed": seed,
            "volumes": volumes_digest(volumes, weights),
            "start": weights_digest(segmenter.state_dict()),
        }

    @property
    def module(self) -> SegmentationLearner:
        """The segmenter; what hangs on it for names is not trained."""
        return self._learner

    def groups(self) -> list[ParameterGroup]:
        """The segmenter alone."""
        return [ParameterGroup(list(self._learner.segmenter.parameters()), 5e-5, 0.02)]

    def settings(self) -> dict[str, Any]:
        """Sizes, rows of a batch, the volumes and the weights it started from."""
        return self._begun

    def loss(self, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        """Windows with up to three corrective clicks, then stacks."""
        if self._rows is None:
            size = self._learner.segmenter.config.image_size
            self._rows = batch_stream(
                self._volumes, self._weights, self._shape, self._seed, size, 0, draw.step, draw.number
            )
        self._steps.rng = draw.rng()
        batch = next(self._rows)
        windows, before, after = self._steps.window_loss(batch.windows, int(self._steps.rng.integers(0, 4)))
        stacks, tracked = self._steps.memory_loss(batch.clips)
        return windows + stacks, {"window": before, "clicked": after, "tracked": tracked}


def trained_segmenter(folder: Path, config: SliceConfig) -> SliceSegmenter:
    """The segmenter that a segmentation phase left in ``folder``."""
    state = load_file(folder / "segmenter.safetensors")
    segmenter = SliceSegmenter(config)
    prefix = "segmenter."
    segmenter.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return segmenter
