"""Who goes first on the processor: what takes a moment, then inference, then work nobody waits for.

Saving a label, ``/info/`` and a viewer's frames cost little; without an order they would wait for the cores as long as
the inferences and trainings they share them with.
"""

from __future__ import annotations

import os
import sys

INFERENCE = 5
BACKGROUND = 10
"""Niceness of threads that infer, and of preparation, training, scoring and batches."""


def give_way(niceness: int) -> None:
    """Lower the calling thread's priority, and that of threads and processes it starts. Linux; elsewhere nothing."""
    if sys.platform == "linux":  # where a priority is a thread's, not a process's
        os.setpriority(os.PRIO_PROCESS, 0, max(niceness, os.getpriority(os.PRIO_PROCESS, 0)))


def give_way_as_task() -> None:
    """Lower the priority of a process that MONAI Label started for a training, a scoring or a batch."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name == "monailabel.interfaces.utils.app":
        give_way(BACKGROUND)
