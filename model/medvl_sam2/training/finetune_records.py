"""What goes into a finetuning and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from medvl_sam2.errors import ConfigError
from medvl_sam2.modeling.compute import Precision, compute_device
from medvl_sam2.training.ranks import Parallel

FREE_SETTINGS = ("accumulate", "checkpointing", "parallel", "device", "tensorboard", "mlflow")
"""How a finetuning is shared, computed and watched; an interrupted one may go on with others.

Micro-batches of all processes together must stay as many.
"""


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of one finetuning. Dice points are fractions: 0.01 is one point."""

    epochs: int = 8
    steps_per_epoch: int = 30
    minutes: float = 10.0
    """Wall minutes of training, those of interrupted attempts too, measuring not; the step that passes it is the last.

    0: no limit.
    """
    learning_rate: float = 1e-4
    accumulate: int = 1
    """Micro-batches per step and process."""
    precision: Precision = "auto"
    checkpointing: bool = False
    """Compute the language model's activations again in the backward pass: less memory, more time."""
    parallel: Parallel = "ddp"
    device: str = "auto"
    """``cpu``, ``cuda``, ``cuda:N``, or ``auto``: a CUDA GPU where there is one."""
    tensorboard: bool = False
    mlflow: str = ""
    """Tracking URI, such as ``sqlite:///mlflow.db``; empty: none."""
    replay_share: float = 0.5
    """Share of training rows drawn from generated cases against forgetting; at least 0.5."""
    replay_cases: int = 12
    """Generated cases replayed."""
    clicks: int = 3
    """Simulated corrective clicks when models are compared."""
    objects: int = 24
    """Most structures clicked at when models are compared, spread over the volumes."""
    min_voxels: int = 200
    """Smaller structures are not clicked at when models are compared."""
    holdout_fraction: float = 0.2
    margin: float = 0.005
    """The candidate must be this much better on the hold-out than the served model."""
    forgetting: float = 0.01
    """The candidate may lose at most this much on generated cases."""
    gate_cases: int = 2
    """Generated cases, never trained on, that forgetting is measured on."""
    trust_labels: bool = False
    """Publish although the labels look implausible: for structures that are faint by nature, after a look at them."""
    seed: int = 0

    @property
    def place(self) -> torch.device:
        """The device that ``device`` means on this machine; raises :class:`ConfigError` where there is none."""
        return compute_device(self.device)

    def __post_init__(self) -> None:
        """Refuse settings that contradict themselves."""
        counts = ("epochs", "steps_per_epoch", "accumulate", "replay_cases", "objects", "gate_cases")
        for name, low in {**dict.fromkeys(counts, 1), "clicks": 0}.items():
            if getattr(self, name) < low:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least {low}")
        if not 0.5 <= self.replay_share < 1.0:
            raise ConfigError(f"replay_share {self.replay_share} must be at least 0.5 and below 1: less forgets")
        if self.minutes < 0 or self.learning_rate <= 0:
            raise ConfigError(f"minutes {self.minutes} must not be negative, learning_rate {self.learning_rate} not 0")
        if self.margin < 0 or self.forgetting < 0:
            raise ConfigError(f"margin {self.margin} and forgetting {self.forgetting} must not be negative")


@dataclass(frozen=True)
class FinetuneSample:
    """One corrected image. ``names`` maps mask values to structure names, ``patient`` is the key of the split."""

    image: Path
    label: Path
    names: Mapping[int, str]
    patient: str
    image_id: str = ""

    @property
    def id(self) -> str:
        """Image id, or the image's file name without it."""
        return self.image_id or self.image.name


@dataclass(frozen=True)
class FinetuneProgress:
    """Where a finetuning stands. ``epoch``: how many were begun.

    ``best_metric``: best hold-out score so far, 0..1, of what is or would be served.
    """

    stage: str
    """``measure``, ``train`` or ``done``."""
    epoch: int
    total_epochs: int
    loss: float | None = None
    best_metric: float | None = None
    seconds: float = 0.0
    message: str = ""


@dataclass(frozen=True)
class Gate:
    """One condition for publishing, whether it holds, and the numbers behind it."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class FinetuneResult:
    """How a finetuning ended. ``published`` is the served version's directory, None when it was not published."""

    run: Path
    reason: str
    """Why it was or was not published, in one sentence."""
    published: Path | None = None
    stopped: bool = False
    """Stopped from outside; the next run on the same inputs resumes."""
    resumed: bool = False
    epochs: int = 0
    gates: tuple[Gate, ...] = ()
    served: Mapping[str, float] | None = None
    """Scores of the served model: ``holdout`` and ``generated``, each also ``.interactive`` and ``.text``."""
    candidate: Mapping[str, float] | None = None
    skipped: tuple[str, ...] = ()
    """Labels that could not be used, each with its reason."""
    seconds: float = 0.0
