"""Where a stage of the unified model begins: any of the results that earlier stages and the converters leave.

A checkpoint folder holds the whole model, a folder named after a part is one of ``scripts/convert_weights.py``, and a
file is the result of the alignment stage, the scene phase or the language phase.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medvl_sam2.checkpoint import META_FILE, TOKENIZER_FILE, read_config
from medvl_sam2.config import ModelConfig
from medvl_sam2.converters.load import load_parts
from medvl_sam2.converters.parts import config_from_parts
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.unified import UnifiedModel
from medvl_sam2.partial_weights import load_encoder, load_part, read_weights
from medvl_sam2.training.language_weights import LESION_PARTS


def start_config(base: ModelConfig, starts: Sequence[Path]) -> ModelConfig:
    """``base`` changed so that converted parts among ``starts`` fit."""
    return config_from_parts({path.name: path for path in starts if _is_part(path)}, base)


def start_tokenizer(starts: Sequence[Path]) -> Tokenizer | None:
    """The tokenizer of the language model among ``starts``, if there is one; the last counts."""
    found = [path / TOKENIZER_FILE for path in starts if _is_part(path) or _is_whole(path)]
    return next((Tokenizer.load(file) for file in reversed(found) if file.exists()), None)


def load_starts(model: UnifiedModel, starts: Sequence[Path]) -> None:
    """Fill ``model`` from ``starts`` in order, later ones over earlier ones.

    Raises :class:`CheckpointError` when one of them is damaged or belongs to another configuration.
    """
    for path in starts:
        if _is_part(path):
            load_parts(model, {path.name: path})
            continue
        weights = read_weights(path)
        if _is_whole(path):
            load_part(model, weights, path, optional=[f"language.{part}" for part in LESION_PARTS])
        elif any(name.startswith("lm.") for name in weights):
            load_part(model.language, weights, path, optional=LESION_PARTS)
        elif any(name.startswith("scene.") for name in weights):
            load_part(model.language, weights, path, "", ("vision.", "scene."), LESION_PARTS)
        else:
            load_encoder(model.language.vision, path)


def _is_part(path: Path) -> bool:
    return path.is_dir() and not (path / META_FILE).exists()


def _is_whole(path: Path) -> bool:
    """A checkpoint folder of the unified model, not of an image-text model."""
    return (path / META_FILE).exists() and read_config(path).alignment is None
