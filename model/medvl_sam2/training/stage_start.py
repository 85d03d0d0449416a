"""Where a stage begins: any of the results that earlier stages and the converters leave.

A checkpoint folder holds the whole model, a folder named after a part is one of ``scripts/convert_weights.py``, and a
file is the result of the alignment stage, the scene phase or the language phase. The alignment stage takes the volume
encoder from any of them, and text tower and projections from the folder ``alignment`` of an earlier run or from the
converted part of that name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from medvl_sam2.checkpoint import META_FILE, TOKENIZER_FILE, read_config
from medvl_sam2.config import AlignmentConfig, ModelConfig
from medvl_sam2.converters.load import load_parts
from medvl_sam2.converters.parts import ALIGNMENT, config_from_parts
from medvl_sam2.modeling.siglip import ImageTextModel
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.unified import UnifiedModel
from medvl_sam2.partial_weights import load_encoder, load_part, read_weights
from medvl_sam2.training.language_weights import LESION_PARTS

_WORDS = "language_encoder.embeddings.word_embeddings.weight"


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


def image_text_config(base: ModelConfig, head: AlignmentConfig, starts: Sequence[Path]) -> ModelConfig:
    """``base`` with the text tower of ``starts``, or else with ``head``, and changed so that converted parts fit."""
    config = start_config(replace(base, alignment=head), starts)
    towers = [path for path in starts if _is_image_text(path)]
    return replace(config, alignment=read_config(towers[-1]).alignment) if towers else config


def image_text_tokenizer(starts: Sequence[Path]) -> Tokenizer | None:
    """The tokenizer of a text tower among ``starts``, or else of a language model; the last counts."""
    towers = [path for path in starts if _is_image_text(path)]
    return Tokenizer.load(towers[-1] / TOKENIZER_FILE) if towers else start_tokenizer(starts)


def load_image_text_starts(model: ImageTextModel, starts: Sequence[Path]) -> None:
    """Fill ``model`` from ``starts`` in order, later ones over earlier ones.

    The converted part ``alignment`` gives all but its embedding of words: those are ClinicalBERT's, whose tokenizer is
    not read here. Raises :class:`CheckpointError` when one of ``starts`` is damaged or of another configuration.
    """
    for path in starts:
        if _is_image_text(path):
            load_part(model, read_weights(path), path, parts=("vision.", "alignment."))
        elif _is_part(path) and path.name == ALIGNMENT:
            kept = {name: tensor for name, tensor in read_weights(path).items() if name != _WORDS}
            load_part(model.alignment, kept, path, optional=[_WORDS])
        elif _is_part(path):
            load_parts(model, {path.name: path})
        else:
            load_encoder(model.vision, path)


def _is_image_text(path: Path) -> bool:
    """A checkpoint folder of an image-text model."""
    return (path / META_FILE).exists() and read_config(path).alignment is not None


def _is_part(path: Path) -> bool:
    return path.is_dir() and not (path / META_FILE).exists()


def _is_whole(path: Path) -> bool:
    """A checkpoint folder of the unified model, not of an image-text model."""
    return (path / META_FILE).exists() and read_config(path).alignment is None
