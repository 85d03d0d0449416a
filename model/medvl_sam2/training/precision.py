"""Which number format a training step computes in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

Precision = Literal["auto", "bfloat16", "float32"]

_CPU_UNITS = frozenset({"avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16"})
"""Processor features, by PyTorch's names, that multiply bfloat16 in hardware (x86, then ARM)."""


def has_bfloat16_units(device: torch.device | str, capabilities: Mapping[str, Any] | None = None) -> bool:
    """Tell whether ``device`` multiplies bfloat16 in hardware; emulated it is many times slower than float32.

    ``capabilities`` stands for ``torch.cpu.get_capabilities()`` of another processor.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return False
    found = torch.cpu.get_capabilities() if capabilities is None else capabilities
    return any(bool(found.get(name)) for name in _CPU_UNITS)


def autocast(device: torch.device | str, precision: Precision) -> torch.autocast:
    """The context a forward pass runs in: bfloat16 where asked for, ``auto`` only where there are units for it."""
    wanted = precision == "bfloat16" or (precision == "auto" and has_bfloat16_units(device))
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=wanted)
