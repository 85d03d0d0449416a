"""What every published layout provides: a function from a source to a :class:`Target`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from medvl_sam2.checkpoint import CONFIG_FILE
from medvl_sam2.config import ModelConfig
from medvl_sam2.converters.keymap import KeyMap
from medvl_sam2.converters.parts import PartTarget
from medvl_sam2.converters.source import WeightSource
from medvl_sam2.errors import CheckpointError


@dataclass(frozen=True)
class Target:
    """The key map of a checkpoint (to ``part/name``) and the parts it must fill."""

    keys: KeyMap
    parts: Mapping[str, PartTarget]


Layout = Callable[[WeightSource, ModelConfig | None], Target]
"""Source and sizes (None: as published) to target; raises :class:`CheckpointError` when files beside it are missing."""


def published_config(source: WeightSource) -> dict[str, Any]:
    """``config.json`` beside the weights, as their author wrote it."""
    path = source.folder / CONFIG_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); it belongs to the weights: download it too") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {type(data).__name__}, not a JSON object; download it again")
    return data
