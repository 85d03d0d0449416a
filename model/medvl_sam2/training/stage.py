"""What a training stage is: what is learned and how. The :mod:`~medvl_sam2.training.trainer` runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from medvl_sam2.training.ranks import Ranks
from medvl_sam2.training.throughput import Work
from medvl_sam2.training.trainer_state import Progress


@dataclass(frozen=True)
class Draw:
    """Micro-batch ``number`` of the ``count`` that make up optimiser step ``step``, ``share`` of the budget in."""

    seed: int
    step: int
    number: int = 0
    count: int = 1
    share: float = 0.0

    def rng(self, purpose: int = 0) -> np.random.Generator:
        """A generator of its own for every purpose."""
        return np.random.default_rng([self.seed, self.step, self.number, purpose])


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with their peak learning rate and weight decay."""

    parameters: Sequence[nn.Parameter]
    rate: float
    decay: float = 0.0


class Run(Protocol):
    """What a stage may ask of the trainer that runs it."""

    ranks: Ranks
    """The processes that train together."""
    progress: Progress
    """What is done so far."""

    @property
    def over(self) -> bool:
        """True at the end of the budget."""

    def weights(self) -> dict[str, Tensor]:
        """All weights of the stage's module, gathered from every process, which must all call it."""

    def measure(self, draw: Draw) -> dict[str, float]:
        """Loss and figures of a held-out draw without learning from it."""


class Stage(ABC):
    """What is trained and how its loss is computed."""

    name: str
    """Spoken name, such as ``scene phase``."""
    key: str
    """Prefix of the state file."""
    outdated: tuple[str, ...] = ()
    """State files of earlier releases, which cannot be gone on from."""
    work: Work | None = None
    """What the last micro-batch was; a stage that wants its throughput in the log sets it in :meth:`loss`."""

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """All weights the loss touches; frozen ones have ``requires_grad`` off."""

    @abstractmethod
    def groups(self) -> Sequence[ParameterGroup]:
        """What the optimiser moves; asked for once the weights are where they stay."""

    @abstractmethod
    def loss(self, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        """Loss of a micro-batch and figures to watch; random numbers come from ``draw`` or from torch alone."""

    def settings(self) -> Mapping[str, Any]:
        """What a run that goes on must share with the one before (JSON values): numbers, digests of data and texts.

        Frozen weights and the loop's own settings are compared without it.
        """
        return {}

    def shards(self) -> Sequence[nn.Module]:
        """Parts that are only used through their forward pass, which FSDP gathers one at a time."""
        return ()

    def validate(self, run: Run) -> Mapping[str, float]:
        """Figures of held-out data for the log, by :meth:`Run.measure`; called in every process."""
        return {}

    def saved(self, run: Run) -> None:  # noqa: B027 - most stages have nothing else to write
        """Called in every process after each save; writes what others read."""
