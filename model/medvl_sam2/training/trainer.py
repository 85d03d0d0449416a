"""The one training loop. A :class:`Stage` says what is learned, the :class:`Trainer` runs it.

One optimiser step is ``accumulate`` micro-batches in each of ``world`` processes. A micro-batch is named by a
:class:`Draw`, from which all its randomness comes, so a run that was killed goes on exactly as if it had not been
(bit for bit on a CPU with a budget in steps; with a budget in minutes the clock decides how many steps there are).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from medvl_sam2.errors import Cancelled, CheckpointError, ConfigError, TrainingError
from medvl_sam2.modeling.compute import Precision, autocast
from medvl_sam2.training.ranks import Parallel, Ranks, whole
from medvl_sam2.training.run_log import MlflowRun, RunLog
from medvl_sam2.training.run_settings import frozen_digest, plain_settings
from medvl_sam2.training.schedule import Schedule, rate_factor
from medvl_sam2.training.stage import Draw, Stage
from medvl_sam2.training.throughput import Meter
from medvl_sam2.training.trainer_state import Progress, read_state, training_state, write_state

_BINDING = ("schedule", "warmup", "clip", "betas", "precision", "seed")
"""Settings of the loop that a run keeps when it goes on; budget, device, sharing and logs may change.

What is bound here no stage may leave out of its own settings as free. The number of processes may change where
``accumulate`` makes up for it: their product is kept. Precision ``auto`` is kept as that word, so a run that moves to
another device goes on in what that device has units for.
"""

ReportProgress = Callable[[float, str], None]
"""Receives the share done and a line of text after every step; may raise to stop, the state is saved first."""


@dataclass(frozen=True)
class TrainerConfig:
    """How a stage is run. The budget is ``steps``, ``minutes`` of training, or whichever ends first."""

    steps: int = 0
    minutes: float = 0.0
    schedule: Schedule = "cosine"
    warmup: int = 40
    """Steps over which the learning rate rises; at most a quarter of ``steps``."""
    accumulate: int = 1
    """Micro-batches per step and process."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    betas: tuple[float, float] = (0.9, 0.98)
    precision: Precision = "auto"
    checkpointing: bool = False
    """Compute activations again in the backward pass where modules can: less memory, a third more time."""
    save_steps: int = 0
    """Save every so many steps; 0: by the clock only."""
    save_seconds: float = 120.0
    log_steps: int = 25
    validate_steps: int = 0
    """Ask for :meth:`Stage.validate` every so many steps and at the end; 0: never."""
    most_skips: int = 5
    """So many steps on end whose loss is not finite end the training; 1: the first one does."""
    parallel: Parallel = "ddp"
    device: str = "cpu"
    peak_tflops: float = 0.0
    """Peak of one device at the precision in use, for the log's MFU; 0: that of common GPUs in bfloat16, else none."""
    seed: int = 0
    tensorboard: bool = False
    mlflow: str = ""
    """Tracking URI, such as ``sqlite:///mlflow.db``; empty: none."""

    def __post_init__(self) -> None:
        if self.steps <= 0 and self.minutes <= 0:
            raise ConfigError(f"steps {self.steps} and minutes {self.minutes} give no budget; set one above 0")
        for name in ("accumulate", "log_steps", "most_skips"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 1")
        if self.clip <= 0:
            raise ConfigError(f"clip {self.clip} must be above 0; give .inf to leave gradients as they are")


class _Shared(nn.Module):
    """A stage's loss as a forward pass, which is what DDP and FSDP hook into."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.module = stage.module
        self._loss = stage.loss

    def forward(self, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        """Loss and figures of a micro-batch."""
        return self._loss(draw)


class Trainer:
    """Runs a stage to the end of its budget, from wherever the folder ``out`` says an earlier run was stopped."""

    def __init__(
        self,
        stage: Stage,
        config: TrainerConfig,
        out: Path | None = None,
        report_progress: ReportProgress | None = None,
        log: str = "log.jsonl",
    ) -> None:
        """Without ``out`` nothing is written. ``log``: name of the JSONL file in it.

        Raises :class:`CheckpointError` when the state in ``out`` belongs to another configuration.
        """
        self.stage, self.config, self.out = stage, config, out
        self.ranks = Ranks.join(config.device)
        self._settings = {} if out is None else self._run_settings()  # before weights are sharded
        if config.checkpointing:
            _switch_checkpointing_on(stage.module)
        self._shared = self.ranks.wrap(_Shared(stage), config.parallel, stage.shards())
        groups = stage.groups()
        self._parameters = [p for group in groups for p in group.parameters]
        self.optimiser = torch.optim.AdamW(
            [{"params": list(g.parameters), "rate": g.rate, "weight_decay": g.decay} for g in groups],
            lr=0.0,
            betas=config.betas,
        )
        self._report_progress = report_progress
        self.progress = self._resume()
        done = self.progress
        self._meter = Meter(config.device, config.peak_tflops, config.checkpointing, done.step, done.flops)
        self._saved_step, self._saved_seconds = self.progress.step, self.progress.seconds
        self.log = self._open_log(log)

    @property
    def share(self) -> float:
        """Share of the budget that is done."""
        by_steps = self.progress.step / self.config.steps if self.config.steps > 0 else 0.0
        by_time = self.progress.seconds / (60 * self.config.minutes) if self.config.minutes > 0 else 0.0
        return max(by_steps, by_time)

    @property
    def over(self) -> bool:
        """True at the end of the budget."""
        return self.share >= 1

    @property
    def history(self) -> list[dict[str, float]]:
        """Mean figures between lines of the log, each with its ``step``; those of the first process."""
        return self.log.history

    def run(self) -> Progress:
        """Train to the end of the budget; the last state is saved.

        Raises :class:`TrainingError` after several steps on end whose loss is not finite, and whatever
        ``report_progress`` raises (:class:`Cancelled` in the other processes).
        """
        with self.log, self._bar() as bar:
            if self.over and self.out is not None:
                self.stage.saved(self)  # an earlier run may have died between its last state and the stage's result
            while not self.over:
                self._step()
                bar.update(self._shown() - bar.n)
                if self._at(self.config.validate_steps):
                    for name, value in self.stage.validate(self).items():
                        self._count(name, value)
                if self._at(self.config.log_steps):
                    bar.set_postfix({name: f"{value:.3f}" for name, value in self._write_figures().items()})
                if self.over or self._due():
                    self.save()
                self._report()
        return self.progress

    @torch.no_grad()
    def measure(self, draw: Draw) -> dict[str, float]:
        """Loss and figures of ``draw``, which nothing is learned from; under FSDP every process must ask for them."""
        loss, figures = self._forward(draw)
        return {"loss": loss.item(), **figures}

    def weights(self) -> dict[str, Tensor]:
        """The stage's whole state dict on the CPU; under FSDP every process must ask for it."""
        return {name: whole(tensor) for name, tensor in self.stage.module.state_dict().items()}

    def save(self) -> None:
        """Write the state to go on from, unless it is there already."""
        if self.out is None or self._saved_step == self.progress.step:
            return
        state = training_state(self.stage.module, self.optimiser)
        if self.ranks.first:
            write_state(self._state_file(self.out), state, self.progress, self._settings)
        self._saved_step, self._saved_seconds = self.progress.step, self.progress.seconds
        self.stage.saved(self)
        self.ranks.wait()

    def _step(self) -> None:
        config, progress = self.config, self.progress
        begun = time.monotonic()
        warmup = min(config.warmup, config.steps // 4) if config.steps > 0 else config.warmup
        factor = rate_factor(config.schedule, progress.step, self.share, warmup)
        for group in self.optimiser.param_groups:
            group["lr"] = group["rate"] * factor
        statistics = [(b, b.clone()) for b in self.stage.module.buffers() if b.is_floating_point()]
        loss = math.fsum(self._micro_batch(number) for number in range(config.accumulate))
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, config.clip)
        loss = self.ranks.mean([loss])[0]
        if math.isfinite(loss) and math.isfinite(float(whole(norm))):
            self.optimiser.step()
            progress.skipped_on_end = 0
            self._count("loss", loss)
        else:
            with torch.no_grad():
                for buffer, former in statistics:
                    buffer.copy_(former)  # one broken batch would spoil running means for ever
            progress.skipped += 1
            progress.skipped_on_end += 1
        self.optimiser.zero_grad(set_to_none=True)
        progress.step += 1
        seconds = self.ranks.from_first(time.monotonic() - begun)
        progress.seconds += seconds
        self._meter.step(seconds)
        progress.flops = self._meter.counted
        if progress.skipped_on_end >= config.most_skips:
            before = f"{progress.skipped_on_end} steps on end, up to " if config.most_skips > 1 else ""
            raise TrainingError(
                f"{self.stage.name}: loss or gradient was not finite in {before}step {progress.step}; "
                "lower the learning rate, compute in float32, or look for broken cases"
            )

    def _micro_batch(self, number: int) -> float:
        """Gradients of one micro-batch, added to those that are there; its part of the loss."""
        config, ranks = self.config, self.ranks
        draw = Draw(
            config.seed,
            self.progress.step,
            number * ranks.world + ranks.rank,
            config.accumulate * ranks.world,
            self.share,
        )
        with self._summing(last=number == config.accumulate - 1), self._meter.micro_batch():
            loss, figures = self._forward(draw)
            (loss / config.accumulate).backward()
        self._meter.add(self.stage.work)
        for name, value in figures.items():
            self._count(name, value)
        return loss.item() / config.accumulate

    def _forward(self, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        torch.manual_seed(int(draw.rng(purpose=1).integers(2**62)))
        with autocast(self.config.device, self.config.precision):
            loss, figures = self._shared(draw)
        return loss, figures

    def _summing(self, last: bool) -> AbstractContextManager[Any]:
        """Only the last micro-batch of a step is shared between processes (FSDP shares each: its sums are sharded)."""
        if isinstance(self._shared, DistributedDataParallel) and not last:
            return self._shared.no_sync()
        return nullcontext()

    def _count(self, name: str, value: float) -> None:
        if math.isfinite(value):
            total, count = self.progress.sums.get(name, (0.0, 0))
            self.progress.sums[name] = (total + value, count + 1)

    def _write_figures(self) -> Mapping[str, float]:
        figures = {name: total / count for name, (total, count) in self.progress.sums.items()}
        self.progress.sums = {}
        figures |= self._meter.figures(self.ranks.mean, self.ranks.world)
        if self.progress.skipped:
            figures["skipped"] = float(self.progress.skipped)
        self.log.write(self.progress.step, figures)
        return figures

    def _at(self, every: int) -> bool:
        """Whether something that is done ``every`` so many steps (0: never) and at the end is done now."""
        return every > 0 and (self.progress.step % every == 0 or self.over)

    def _due(self) -> bool:
        return self._at(self.config.save_steps) or (
            self.progress.seconds - self._saved_seconds >= self.config.save_seconds
        )

    def _report(self) -> None:
        """Tell how far the training is, after every step. If the listener stops it, every process saves and stops."""
        listener = self._report_progress if self.ranks.first else None
        stopped = listener is not None
        try:
            if listener is not None:
                step, steps, minutes = self.progress.step, self.config.steps, self.config.minutes
                end = f"step {step} of {steps}" if steps > 0 else f"step {step} of {minutes:g} minutes"
                listener(self.share, f"{self.stage.name}, {end}")
                stopped = False
        finally:
            stopped = bool(self.ranks.from_first(float(stopped)))
            if stopped:
                self.save()
        if stopped:
            raise Cancelled(f"{self.stage.name} was stopped by the first process")

    def _resume(self) -> Progress:
        if self.out is None:
            return Progress()
        path = self._state_file(self.out)
        if path.exists():
            return read_state(path, self.stage.module, self.optimiser, self._settings)
        for name in self.stage.outdated:
            if (self.out / name).exists():
                raise CheckpointError(
                    f"{self.out / name} is a state of an earlier release, which this one cannot go on from; finish "
                    "that run with the release it was begun with, or give an empty folder"
                )
        return Progress()

    def _run_settings(self) -> dict[str, Any]:
        loop = {name: value for name, value in plain_settings(self.config).items() if name in _BINDING}
        loop["micro_batches"] = self.config.accumulate * self.ranks.world
        return {**self.stage.settings(), "trainer": loop, "frozen weights": frozen_digest(self.stage.module)}

    def _state_file(self, out: Path) -> Path:
        return out / f"{self.stage.key}_resume.safetensors"

    def _open_log(self, name: str) -> RunLog:
        progress, config = self.progress, self.config
        if self.out is None or not self.ranks.first:
            return RunLog(None, self.stage.name, progress.step)
        mlflow = None
        if config.mlflow:
            mlflow = MlflowRun(config.mlflow, self.stage.name, asdict(config), progress.tracking)
            progress.tracking = mlflow.id
        return RunLog(self.out / name, self.stage.name, progress.step, config.tensorboard, mlflow)

    def _bar(self) -> Any:
        steps = self.config.steps > 0
        total = self.config.steps if steps else round(60 * self.config.minutes)
        unit, hidden = "step" if steps else "s", not self.ranks.first
        return tqdm(total=total, initial=self._shown(), desc=self.stage.name, unit=unit, mininterval=10, disable=hidden)

    def _shown(self) -> int:
        return self.progress.step if self.config.steps > 0 else int(self.progress.seconds)


def _switch_checkpointing_on(module: nn.Module) -> None:
    able = [part for part in module.modules() if hasattr(part, "activation_checkpointing_enable")]
    if not able:
        raise ConfigError(f"no part of {type(module).__name__} can do gradient checkpointing; switch checkpointing off")
    part: Any
    for part in able:
        part.activation_checkpointing_enable()
