"""How the learning rate moves over a training."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "cosine", "held_then_cosine"]


def cosine(share: float) -> float:
    """Factor of the learning rate after ``share`` of the way: a cosine from 1 down to 2 %."""
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))


def held_then_cosine(share: float) -> float:
    """Factor of the learning rate after ``share`` of the budget: full for 60 %, then :func:`cosine`."""
    return cosine(min(1.0, max(0.0, share - 0.6) / 0.4))


def rate_factor(schedule: Schedule, step: int, share: float, warmup: int) -> float:
    """Factor of the learning rate in ``step`` (from 0): a linear rise over ``warmup`` steps times the schedule."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    if schedule == "constant":
        return rise
    return rise * (cosine(share) if schedule == "cosine" else held_then_cosine(share))
