"""Pretraining of the slice segmenter: image phase, then memory phase with the encoder frozen.

``python -m medvl_sam2.training.segmentation_phase --out RUN`` writes ``segmenter.safetensors`` and resumes by itself
when RUN already holds a state.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medvl_sam2.config import ModelConfig
from medvl_sam2.files import write_json_atomically
from medvl_sam2.modeling.compute import has_bfloat16_units
from medvl_sam2.modeling.slice_segmenter import SliceSegmenter
from medvl_sam2.training.batch_stream import BatchShape, RowBatch, batch_stream
from medvl_sam2.training.ranks import Ranks
from medvl_sam2.training.run_settings import plain_settings
from medvl_sam2.training.samples import LabelledVolume, volumes_digest
from medvl_sam2.training.segmentation_steps import SegmentationLearner, SegmentationSteps
from medvl_sam2.training.stage import Draw, ParameterGroup, Run, Stage
from medvl_sam2.training.trainer import Trainer, TrainerConfig
from medvl_sam2.training.trainer_state import write_tensors
from medvl_sam2.training.volume_sources import SourceConfig, training_volumes


@dataclass(frozen=True)
class SegmentationPhaseConfig:
    """Budget in wall minutes, because the machine decides how many steps that is; both are recorded."""

    image_minutes: float = 69.0
    memory_minutes: float = 16.0
    whole_slices: int = 4
    concepts_per_slice: int = 6
    windows: int = 22
    clips: int = 6
    clip_length: int = 6
    learning_rate: float = 6e-4
    memory_learning_rate: float = 5e-4
    warmup_steps: int = 80
    bfloat16: bool = True
    device: str = "cpu"
    workers: int = 0
    """Processes that draw rows; 0 draws them between steps, which costs little on a CPU and starves a GPU."""
    rows_times: int = 1
    """Multiplies the rows of every batch, for accelerators."""
    seed: int = 0


class _Part(Stage):
    """The image or the memory phase as a stage of its own."""

    def __init__(self, phase: SegmentationPhase, key: str, shape: BatchShape, peak: float, seed: int) -> None:
        self.phase, self.key, self.name, self.outdated = phase, key, f"{key} phase", (f"{key}_optimiser.pt",)
        self._shape, self._peak, self._seed = shape, peak, seed
        self._rows: Iterator[RowBatch] | None = None

    @property
    def module(self) -> SegmentationLearner:
        """The segmenter with stand-in tokens and dense head."""
        return self.phase.learner

    def groups(self) -> list[ParameterGroup]:
        """What is not frozen."""
        return [ParameterGroup([p for p in self.module.parameters() if p.requires_grad], self._peak, 0.02)]

    def loss(self, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        """Loss of the rows that belong to ``draw``; processes draw them ahead, in order."""
        phase, config = self.phase, self.phase.config
        if self._rows is None:
            self._rows = batch_stream(
                phase.volumes, phase.weights, self._shape, self._seed, phase.image_size, config.workers, draw.step,
                draw.number,
            )  # fmt: skip
        phase.steps.rng = draw.rng()
        step = phase.image_loss if self.key == "image" else phase.memory_loss
        return step(next(self._rows), draw)

    def settings(self) -> dict[str, Any]:
        """The phase's numbers and its volumes."""
        free = ("image_minutes", "memory_minutes", "device", "workers")
        phase = self.phase
        return {**plain_settings(phase.config, free), "volumes": volumes_digest(phase.volumes, phase.weights)}

    def saved(self, run: Run) -> None:
        """Write ``segmenter.safetensors`` and ``progress.json``."""
        weights, progress = run.weights(), run.progress
        self.phase.progress |= {f"{self.key}_steps": progress.step, f"{self.key}_seconds": progress.seconds}
        if run.ranks.first:
            write_tensors(self.phase.out / "segmenter.safetensors", weights)
            record = {**self.phase.progress, "config": asdict(self.phase.config), "threads": torch.get_num_threads()}
            write_json_atomically(self.phase.out / "progress.json", record)


class SegmentationPhase:
    """Runs both phases; one optimiser each."""

    def __init__(
        self,
        config: SegmentationPhaseConfig,
        volumes: Sequence[LabelledVolume],
        weights: Sequence[float],
        model: ModelConfig,
        out: Path,
    ) -> None:
        torch.manual_seed(config.seed)
        self.config, self.out = config, out
        self.learner = SegmentationLearner(SliceSegmenter(model.slices)).to(config.device)
        bfloat16 = config.bfloat16 and has_bfloat16_units(config.device)
        self.steps = SegmentationSteps(self.learner, config.seed + 1, bfloat16=bfloat16)
        self.volumes, self.weights, self.image_size = list(volumes), list(weights), model.slices.image_size
        self.progress: dict[str, float] = {
            "image_steps": 0,
            "image_seconds": 0.0,
            "memory_steps": 0,
            "memory_seconds": 0.0,
        }

    def run(self) -> None:
        """Image phase, then memory phase, from wherever the last run stopped."""
        config, times = self.config, self.config.rows_times
        self.learner.train()
        shape = BatchShape(config.whole_slices * times, config.concepts_per_slice, config.windows * times)
        image = _Part(self, "image", shape, config.learning_rate, config.seed + 2)
        self._train(image, config.image_minutes)
        sam2 = self.learner.segmenter.sam2
        for part in (sam2.image_encoder, sam2.sam_mask_decoder.conv_s0, sam2.sam_mask_decoder.conv_s1):
            part.requires_grad_(False)
        shape = BatchShape(4 * times, config.concepts_per_slice, 8 * times, config.clips * times, config.clip_length)
        memory = _Part(self, "memory", shape, config.memory_learning_rate, config.seed + 3)
        self._train(memory, config.memory_minutes)

    def _train(self, part: _Part, minutes: float) -> None:
        """Train a part; what it has done already is put back first, also when there is nothing more to do."""
        config = TrainerConfig(
            minutes=max(minutes, 1e-6), schedule="held_then_cosine", warmup=self.config.warmup_steps,
            precision="float32", device=self.config.device, seed=self.config.seed + 1,
        )  # fmt: skip
        trainer = Trainer(part, config, self.out)
        if minutes > 0:
            trainer.run()
        done = trainer.progress
        self.progress |= {f"{part.key}_steps": done.step, f"{part.key}_seconds": done.seconds}

    def image_loss(self, batch: RowBatch, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        """Whole slices by name and windows by prompt; clicks come after a while, the dense head fades at the end."""
        named, dice = self.steps.named_loss(batch.whole, dense_weight=1.0 if draw.share < 0.9 else 0.3)
        rounds = 0 if draw.share < 0.15 else int(self.steps.rng.integers(0, 4))
        prompted, before, after = self.steps.window_loss(batch.windows, rounds)
        return named + prompted, {"named": dice, "window": before, "clicked": after}

    def memory_loss(self, batch: RowBatch, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        """Stacks of slices; every third time also what the image phase taught the shared decoder."""
        loss, dice = self.steps.memory_loss(batch.clips)
        figures = {"tracked": dice}
        if draw.step % 3 == 0:
            named, figures["named"] = self.steps.named_loss(batch.whole, dense_weight=0.0)
            rounds = int(self.steps.rng.integers(1, 4))
            prompted, figures["window"], figures["clicked"] = self.steps.window_loss(batch.windows, rounds)
            loss = loss + named + prompted
        return loss, figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--image-minutes", type=float, default=40.0)
    parser.add_argument("--memory-minutes", type=float, default=20.0)
    parser.add_argument("--generated", type=int, default=240, help="generated training cases")
    parser.add_argument("--real", type=Path, help="folder with the trainable real cases; none by default")
    parser.add_argument("--cache", type=Path, help="folder that keeps generated cases between runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw rows (a GPU wants most cores)")
    parser.add_argument("--rows-times", type=int, default=1, help="multiplies the rows of every batch")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    Ranks.join(options.device)
    source = SourceConfig(generated=options.generated, real=options.real, cache=options.cache, seed=options.seed)
    volumes, weights = training_volumes(source)
    config = SegmentationPhaseConfig(
        image_minutes=options.image_minutes,
        memory_minutes=options.memory_minutes,
        seed=options.seed,
        device=options.device,
        workers=options.workers,
        rows_times=options.rows_times,
    )
    SegmentationPhase(config, volumes, weights, ModelConfig.tiny(), options.out).run()


if __name__ == "__main__":
    main()
