"""Pretraining of the slice segmenter: image phase, then memory phase with the encoder frozen.

``python -m medvl_sam2.training.segmentation_phase --out RUN`` writes ``segmenter.safetensors`` and resumes by itself
when RUN already holds a state.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from medvl_sam2.config import ModelConfig
from medvl_sam2.files import write_json_atomically
from medvl_sam2.modeling.slice_segmenter import SliceSegmenter
from medvl_sam2.training.batch_stream import BatchShape, RowBatch, batch_stream
from medvl_sam2.training.losses import held_then_cosine
from medvl_sam2.training.samples import LabelledVolume
from medvl_sam2.training.segmentation_steps import SegmentationLearner, SegmentationSteps
from medvl_sam2.training.volume_sources import SourceConfig, training_volumes

StepFunction = Callable[[RowBatch], tuple[torch.Tensor, dict[str, float]]]
"""Computes the loss of one step and figures to watch."""


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
        self.steps = SegmentationSteps(self.learner, config.seed + 1, bfloat16=config.bfloat16)
        self.volumes, self.weights, self.image_size = list(volumes), list(weights), model.slices.image_size
        self.progress: dict[str, float] = {
            "image_steps": 0,
            "image_seconds": 0.0,
            "memory_steps": 0,
            "memory_seconds": 0.0,
        }
        out.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """Image phase, then memory phase, from wherever the last run stopped."""
        self._resume()
        self._phase("image", self.config.image_minutes * 60, self._image_step, self.config.learning_rate)
        for parameter in self.learner.segmenter.sam2.image_encoder.parameters():
            parameter.requires_grad_(False)
        for head in (
            self.learner.segmenter.sam2.sam_mask_decoder.conv_s0,
            self.learner.segmenter.sam2.sam_mask_decoder.conv_s1,
        ):
            head.requires_grad_(False)
        self._phase("memory", self.config.memory_minutes * 60, self._memory_step, self.config.memory_learning_rate)
        self._save(None)

    def _image_step(self, batch: RowBatch) -> tuple[torch.Tensor, dict[str, float]]:
        done = self.progress["image_seconds"] / max(1.0, self.config.image_minutes * 60)
        named, dice = self.steps.named_loss(batch.whole, dense_weight=1.0 if done < 0.9 else 0.3)
        rounds = 0 if done < 0.15 else int(self.steps.rng.integers(0, 4))
        prompted, before, after = self.steps.window_loss(batch.windows, rounds)
        return named + prompted, {"named": dice, "window": before, "clicked": after}

    def _memory_step(self, batch: RowBatch) -> tuple[torch.Tensor, dict[str, float]]:
        loss, dice = self.steps.memory_loss(batch.clips)
        figures = {"tracked": dice}
        if self.progress["memory_steps"] % 3 == 0:  # keep what the image phase taught the shared decoder
            named, figures["named"] = self.steps.named_loss(batch.whole, dense_weight=0.0)
            rounds = int(self.steps.rng.integers(1, 4))
            prompted, figures["window"], figures["clicked"] = self.steps.window_loss(batch.windows, rounds)
            loss = loss + named + prompted
        return loss, figures

    def _stream(self, name: str) -> Iterator[RowBatch]:
        """Rows of a phase; a resumed run draws other rows than the ones it has seen."""
        config, times = self.config, self.config.rows_times
        if name == "image":
            shape = BatchShape(config.whole_slices * times, config.concepts_per_slice, config.windows * times)
        else:
            shape = BatchShape(
                4 * times, config.concepts_per_slice, 8 * times, config.clips * times, config.clip_length
            )
        seed = config.seed + 2 + int(self.progress[f"{name}_steps"])
        return batch_stream(self.volumes, self.weights, shape, seed, self.image_size, config.workers)

    def _phase(self, name: str, budget: float, step_function: StepFunction, peak: float) -> None:
        config, progress = self.config, self.progress
        if progress[f"{name}_seconds"] >= budget:
            return
        self.learner.train()
        trained = [p for p in self.learner.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=peak, weight_decay=0.02, betas=(0.9, 0.98))
        state = self.out / f"{name}_optimiser.pt"
        if state.exists() and progress[f"{name}_steps"]:
            optimiser.load_state_dict(torch.load(state, weights_only=True))
        rows = self._stream(name)
        smooth: dict[str, float] = {}
        last_save = time.monotonic()
        log = (self.out / "log.jsonl").open("a")
        with tqdm(total=round(budget), desc=f"{name} phase", unit="s", mininterval=10) as bar:
            bar.update(int(progress[f"{name}_seconds"]))
            while progress[f"{name}_seconds"] < budget:
                start = time.monotonic()
                share = progress[f"{name}_seconds"] / budget
                warm = min(1.0, (progress[f"{name}_steps"] + 1) / config.warmup_steps)
                for group in optimiser.param_groups:
                    group["lr"] = peak * warm * held_then_cosine(share)
                loss, figures = step_function(next(rows))
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimiser.step()
                progress[f"{name}_steps"] += 1
                figures["loss"] = loss.item()
                for key, value in figures.items():
                    if np.isfinite(value):
                        smooth[key] = 0.97 * smooth.get(key, value) + 0.03 * value
                seconds = time.monotonic() - start
                progress[f"{name}_seconds"] += seconds
                bar.update(int(progress[f"{name}_seconds"]) - bar.n)
                if progress[f"{name}_steps"] % 25 == 0:
                    bar.set_postfix({k: f"{v:.3f}" for k, v in smooth.items()})
                    log.write(json.dumps({"phase": name, "step": progress[f"{name}_steps"], **smooth}) + "\n")
                    log.flush()
                if time.monotonic() - last_save > 120:
                    self._save(optimiser, name)
                    last_save = time.monotonic()
        log.close()
        self._save(optimiser, name)

    def _save(self, optimiser: torch.optim.Optimizer | None, name: str = "") -> None:
        temporary = self.out / "state.tmp"
        save_file({k: v.cpu().contiguous() for k, v in self.learner.state_dict().items()}, temporary)
        temporary.replace(self.out / "segmenter.safetensors")
        if optimiser is not None:
            partial = self.out / "optimiser.tmp"
            torch.save(optimiser.state_dict(), partial)
            partial.replace(self.out / f"{name}_optimiser.pt")
        record = {**self.progress, "config": asdict(self.config), "threads": torch.get_num_threads()}
        write_json_atomically(self.out / "progress.json", record)

    def _resume(self) -> None:
        record, state = self.out / "progress.json", self.out / "segmenter.safetensors"
        if record.exists() and state.exists():
            stored = json.loads(record.read_text())
            self.progress.update({k: stored[k] for k in self.progress})
            self.learner.load_state_dict(load_file(state))
            skip = int(self.progress["image_steps"] + self.progress["memory_steps"])
            self.steps.rng = np.random.default_rng([self.config.seed + 1, skip])  # do not replay the same clicks


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
