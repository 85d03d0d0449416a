"""What a run must have in common with the one it goes on from: the settings behind its weights and moments.

Names and shapes alone do not tell two runs apart: the same model trained on other cases, with another tokenizer, or on
top of other frozen weights would go on silently. The state file therefore keeps the settings it was made with.

Every field counts, also one that a later release adds or takes away: the states of earlier releases are refused then,
by a message that says so, rather than gone on from under a setting nobody compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medvl_sam2.errors import CheckpointError


def plain_settings(config: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """A frozen dataclass as JSON values, fields in ``without`` left out (budgets, devices, places of files)."""
    kept = {name: value for name, value in asdict(config).items() if name not in without}
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return plain


def digest(*parts: object) -> str:
    """Short digest of plain values, in order."""
    text = json.dumps(parts, default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Digest of weights by name: their types, shapes and every value."""
    total = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]


def frozen_digest(module: nn.Module) -> str:
    """Digest of the weights that are not trained, which the state file does not hold; empty where all are trained."""
    frozen = {name: parameter for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return weights_digest(frozen) if frozen else ""


def require_same(path: Path, stored: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Compare the settings that the file ``path`` holds with this run's.

    Raises :class:`CheckpointError` that names the first field that differs, with both values, or, where the fields that
    both have are the same, the first that only one of them has.
    """
    before, now = _flat(stored), _flat(own)
    for field in sorted(before.keys() & now.keys()):
        if before[field] != now[field]:
            raise CheckpointError(
                f"{path} was begun with {field} {before[field]!r}, this run has {now[field]!r}; restore that setting "
                "to go on, or give an empty folder to begin anew"
            )
    for field in sorted(before.keys() ^ now.keys()):
        known = f"says nothing of {field}, which this run has" if field in now else f"has {field}, which this run lacks"
        raise CheckpointError(
            f"{path} {known} ({(now | before)[field]!r}): it was begun with another release; go on with that one, or "
            "give an empty folder to begin anew"
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
