"""How fast a training is: samples, tokens and slices a second, memory, and the share of the device's arithmetic used.

Model FLOPs utilisation (MFU, PaLM, arXiv 2204.02311, appendix B) counts what the model needs. torch counts it in the
first two steps of a run, forward and backward, and their mean micro-batch stands for all; these steps are in no rate. A
run that goes on keeps the count: under torch's counter some results differ in the last digit. With gradient
checkpointing the recomputed activations are in the count, so the figure is called ``hfu`` (hardware FLOPs utilisation)
then. Where the device's peak is not known, as on a CPU, there is neither.
"""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from types import MappingProxyType

import torch
from torch.utils.flop_counter import FlopCounterMode

PEAK_TFLOPS: Mapping[str, float] = MappingProxyType(
    {
        "H200": 989.0,
        "H100 PCIe": 756.0,
        "H100 NVL": 835.0,
        "H100": 989.0,
        "A100": 312.0,
        "L40S": 362.0,
        "L4": 121.0,
        "A10": 125.0,
        "RTX 4090": 165.0,
        "RTX 3090": 71.0,
    }
)
"""Dense bfloat16 peaks of the makers' data sheets, by a part of the device's name; the first that fits counts."""

_COUNTED_STEPS = 2
"""Stages that take turns alternate from step to step."""


@dataclass(frozen=True)
class Work:
    """What one micro-batch was: ``samples`` (volumes), ``tokens`` (image slots and text) and image ``slices``."""

    samples: float = 0.0
    tokens: float = 0.0
    slices: float = 0.0


class Meter:
    """Adds up work and time between two lines of the log."""

    def __init__(
        self,
        device: str,
        peak_tflops: float = 0.0,
        recomputes: bool = False,
        steps: int = 0,
        counted: tuple[float, int] = (0.0, 0),
    ) -> None:
        """``peak_tflops``: of one device; 0 asks :data:`PEAK_TFLOPS`. ``recomputes``: with gradient checkpointing.

        ``steps`` and ``counted``: steps done before, and what :attr:`counted` was then.
        """
        self._device = torch.device(device)
        self._peak = 1e12 * (peak_tflops or known_peak(self._device))
        self._share_name = "hfu" if recomputes else "mfu"
        self._steps = steps
        self.counted = counted
        """Operations counted, and in how many micro-batches."""
        self._forget()

    def _forget(self) -> None:
        self._sums, self._seconds, self._batches = [0.0] * 3, 0.0, 0

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Round a micro-batch's forward and backward pass; counts operations in the first steps."""
        if not self._peak or self._steps >= _COUNTED_STEPS:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        flops, batches = self.counted
        self.counted = (flops + counter.get_total_flops(), batches + 1)

    def add(self, work: Work | None) -> None:
        """Count a micro-batch."""
        if work is not None:
            self._batches += 1
            self._sums = [total + value for total, value in zip(self._sums, astuple(work), strict=True)]

    def step(self, seconds: float) -> None:
        """Count the time of an optimiser step."""
        self._seconds += seconds
        self._steps += 1
        if self._peak and self._steps <= _COUNTED_STEPS:
            self._forget()

    def figures(self, mean: Callable[[Sequence[float]], list[float]], world: int) -> dict[str, float]:
        """Rates since the last call over all ``world`` processes; empty where no work was told.

        ``mean`` averages over the processes, so all of them must call.
        """
        seconds, batches, sums = self._seconds, self._batches, self._sums
        self._forget()
        if not batches or seconds <= 0:
            return {}
        totals = [world * value / seconds for value in mean(sums)]
        names = ("samples_per_s", "tokens_per_s", "slices_per_s")
        found = {name: rate for name, rate in zip(names, totals, strict=True) if rate > 0}
        found["peak_memory_mib"] = peak_memory(self._device) / 2**20
        flops, counted = self.counted
        if self._peak and counted:
            found[self._share_name] = flops / counted * batches / (seconds * self._peak)
        return found


def known_peak(device: torch.device) -> float:
    """Peak TFLOP/s of a GPU that :data:`PEAK_TFLOPS` lists, 0 for any other device."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0.0
    name = torch.cuda.get_device_name(device)
    return peak_of(name)


def peak_of(name: str) -> float:
    """The peak of the first entry of :data:`PEAK_TFLOPS` that stands in a device's ``name`` as whole words, else 0."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", name)), 0.0)


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: tensors on a GPU, the whole process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
