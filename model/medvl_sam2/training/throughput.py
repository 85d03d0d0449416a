"""How fast a training is: samples, tokens and views a second, memory, and the share of the device's arithmetic used.

Model FLOPs utilisation (MFU, PaLM, arXiv 2204.02311, appendix B) counts the operations that the model needs, so
recomputed activations do not count. It is told only where the device's peak is known: on a CPU it is left out.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from types import MappingProxyType

import torch

PEAK_TFLOPS: Mapping[str, float] = MappingProxyType(
    {
        "H200": 989.0,
        "H100 PCIe": 756.0,
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


@dataclass(frozen=True)
class Work:
    """What one micro-batch was: ``samples`` (volumes), text ``tokens``, image ``views`` (slices), ``flops`` of it all.

    ``flops`` are those of forward and backward pass without recomputing; 0 where nobody counted them.
    """

    samples: float = 0.0
    tokens: float = 0.0
    views: float = 0.0
    flops: float = 0.0


class Meter:
    """Adds up work and time between two lines of the log."""

    def __init__(self, device: str, peak_tflops: float = 0.0) -> None:
        """``peak_tflops``: of one device; 0 asks :data:`PEAK_TFLOPS`."""
        self._device = torch.device(device)
        self._peak = 1e12 * (peak_tflops or known_peak(self._device))
        self._sums, self._seconds, self._counted = [0.0] * 4, 0.0, False

    def add(self, work: Work | None) -> None:
        """Count a micro-batch."""
        if work is not None:
            self._counted = True
            self._sums = [total + value for total, value in zip(self._sums, astuple(work), strict=True)]

    def step(self, seconds: float) -> None:
        """Count the time of an optimiser step."""
        self._seconds += seconds

    def figures(self, mean: Callable[[Sequence[float]], list[float]], world: int) -> dict[str, float]:
        """Rates since the last call over all ``world`` processes; empty where a stage counts no work.

        ``mean`` averages over the processes, so all of them must call.
        """
        seconds, counted, sums = self._seconds, self._counted, self._sums
        self._sums, self._seconds, self._counted = [0.0] * 4, 0.0, False
        if not counted or seconds <= 0:
            return {}
        samples, tokens, views, flops = (world * value / seconds for value in mean(sums))
        rates = {"samples_per_s": samples, "tokens_per_s": tokens, "views_per_s": views}
        found = {name: rate for name, rate in rates.items() if rate > 0}
        found["peak_memory_mib"] = peak_memory(self._device) / 2**20
        if self._peak and flops:
            found["mfu"] = flops / (world * self._peak)
        return found


def known_peak(device: torch.device) -> float:
    """Peak TFLOP/s of a GPU that :data:`PEAK_TFLOPS` lists, 0 for any other device."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), 0.0)


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: tensors on a GPU, the whole process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
