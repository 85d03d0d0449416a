"""What a training needs to go on after being killed: one safetensors file, replaced in one step, never a pickle.

The file holds the trained weights and buffers (``weights.<name>``), the optimiser's moments
(``moments.<name>.<kind>``) and, as JSON in its header, the counters and the run's settings.
Frozen weights are not in it: the stage makes them anew. Being one file, its parts always belong to the same step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from medvl_sam2.errors import CheckpointError
from medvl_sam2.files import sync_path
from medvl_sam2.training.ranks import as_like, whole
from medvl_sam2.training.run_settings import require_same


@dataclass
class Progress:
    """How far a training is: optimiser steps, seconds in them, and steps skipped because a loss was not finite."""

    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_on_end: int = 0
    """Skipped steps since the last good one."""
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Figures since the last line of the log: sum and count."""
    flops: tuple[float, int] = (0.0, 0)
    """Operations counted for the throughput, and in how many micro-batches."""
    tracking: str = ""
    """MLflow's id of the run."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Replace a safetensors file in one step, on disk before the old one goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, partial, dict(metadata or {}))
    sync_path(partial)
    os.replace(partial, path)
    sync_path(path.parent)


def training_state(module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Tensors of the state file, whole and on the CPU; every process of a training must ask for them."""
    state = {f"weights.{name}": whole(tensor) for name, tensor in _moving(module).items()}
    for name, parameter in module.named_parameters():
        for kind, moment in optimiser.state.get(parameter, {}).items():
            state[f"moments.{name}.{kind}"] = whole(moment)
    return state


def write_state(path: Path, state: Mapping[str, Tensor], progress: Progress, settings: Mapping[str, Any]) -> None:
    """Write :func:`training_state`, the counters and the run's settings."""
    write_tensors(path, state, {"progress": json.dumps(asdict(progress)), "settings": json.dumps(settings)})


def read_state(
    path: Path, module: nn.Module, optimiser: torch.optim.Optimizer, settings: Mapping[str, Any]
) -> Progress:
    """Put the weights and moments of a state file back and return its counters.

    Raises :class:`CheckpointError` when the file is damaged or belongs to another configuration. A file of an earlier
    release tells no settings; of it only names and shapes are checked.
    """
    remedy = "remove it to begin anew, or restore the configuration it was written with"
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            counters = json.loads(file.metadata()["progress"])
            stored = json.loads(file.metadata().get("settings", "null"))
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is not a mapping
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is no training state ({error!r}); {remedy}") from error
    if stored is not None:
        require_same(path, stored, settings)
    own = {f"weights.{name}": tensor for name, tensor in _moving(module).items()}
    odd = sorted({key for key in state if key.startswith("weights.")} ^ set(own))
    odd += [key for key in own if key in state and state[key].shape != own[key].shape]
    if odd:
        raise CheckpointError(f"{path} does not fit at {odd[0]!r}; {remedy}")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(as_like(state[key], tensor))
    for name, parameter in module.named_parameters():
        prefix = f"moments.{name}."
        found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if found:  # the step count stays on the CPU, where AdamW keeps it
            optimiser.state[parameter] = {k: v if k == "step" else as_like(v, parameter) for k, v in found.items()}
    sums = {name: (float(total), int(count)) for name, (total, count) in counters.pop("sums").items()}
    flops, batches = counters.pop("flops", (0.0, 0))  # earlier releases did not keep the count
    return Progress(**counters, sums=sums, flops=(float(flops), int(batches)))


def _moving(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that are trained and buffers that are stored, each once, by name."""
    stored = module.state_dict()
    buffers = {name: tensor for name, tensor in module.named_buffers() if name in stored}
    return {name: p for name, p in module.named_parameters() if p.requires_grad} | buffers
