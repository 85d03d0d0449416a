"""On which device and in which number format tensors are computed."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from medvl_sam2.errors import ConfigError

Precision = Literal["auto", "bfloat16", "float32"]

_CPU_UNITS = frozenset({"avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16"})
"""Processor features, by PyTorch's names, that multiply bfloat16 in hardware (x86, then ARM)."""


def compute_device(name: str = "auto") -> torch.device:
    """The device called ``name`` (``cpu``, ``cuda``, ``cuda:1``); ``auto`` is a CUDA GPU where there is one.

    Raises:
        ConfigError: no such device, or this machine lacks it.
    """
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if usable else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is not one; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= usable:
        raise ConfigError(f"device {name!r} is not there: torch finds {usable} CUDA devices; use auto or cpu")
    return device


def processor_name(device: str) -> str:
    """Name of the GPU, or of the processor with the widest instructions that torch uses on it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    listing = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", listing.read_text(), re.MULTILINE) if listing.exists() else []
    return f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


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
