"""Parts of our models that published weights can fill, and the folder one converted part lives in.

A part folder holds ``model.safetensors`` (or numbered shards with ``model.safetensors.index.json``), ``config.json``
with the configuration the numbers belong to, and for the language model ``tokenizer.json``. Tensor names are those of
the part's own module: ``s0.0.0.c1.0.weight`` for ``vision``, ``model.layers.0...`` for ``language``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medvl_sam2.checkpoint import CONFIG_FILE
from medvl_sam2.config import AlignmentConfig, ModelConfig
from medvl_sam2.converters.source import TensorInfo
from medvl_sam2.errors import CheckpointError, ConfigError
from medvl_sam2.modeling.dcformer import DCFormer
from medvl_sam2.modeling.language import build_language_model
from medvl_sam2.modeling.projector import MixerProjector
from medvl_sam2.modeling.sam2_modules import build_sam2
from medvl_sam2.modeling.siglip import SiglipHead
from medvl_sam2.modeling.tokenizer import Tokenizer

VISION, PROJECTOR, LANGUAGE, SLICES = "vision", "projector", "language", "slices"
ALIGNMENT = "alignment"
"""Text tower and projections of image-text pretraining: the head of an :class:`ImageTextModel`."""


@dataclass(frozen=True)
class Part:
    """Where a part sits in :class:`UnifiedModel` (``alignment``: in :class:`ImageTextModel`), and how to build it.

    ``section`` is the field of :class:`ModelConfig` that is stored beside the weights. Of its fields, the model may
    choose ``choices`` whatever the weights were trained with; ``habits`` are those of the weights unless the model is
    to be trained out of them. All others must agree.
    """

    section: str
    place: str
    build: Callable[[ModelConfig], nn.Module]
    choices: frozenset[str] = frozenset()
    habits: frozenset[str] = frozenset()


PARTS: Mapping[str, Part] = {
    VISION: Part(
        "vision",
        "language.vision",
        lambda c: DCFormer(c.vision),
        choices=frozenset({"layer_scale"}),
        habits=frozenset({"input_size", "taps"}),
    ),
    PROJECTOR: Part(
        "projector",
        "language.projector",
        lambda c: MixerProjector(c.vision, c.projector, c.language.hidden_size),
        choices=frozenset({"extent"}),
    ),
    LANGUAGE: Part(
        "language",
        "language.lm",
        lambda c: build_language_model(c.language),
        choices=frozenset({"max_length", "position_range", "lora_rank", "lora_alpha"}),
        habits=frozenset({"prompt_end", "reply_start", "legacy_splice"}),
    ),
    SLICES: Part(
        "slices",
        "segmenter.sam2",
        lambda c: build_sam2(c.slices),
        choices=frozenset(
            {"image_size", "max_cond_slices", "multimask", "presence_gate", "slice_position", "slice_scores"}
        ),
    ),
    ALIGNMENT: Part("alignment", "alignment", lambda c: SiglipHead(c.vision, c.alignment or AlignmentConfig())),
}


@dataclass(frozen=True)
class Vocabulary:
    """How a published vocabulary grows: ``known`` entries had a token before, ``total`` rows are needed now."""

    tokenizer: Tokenizer
    known: int
    total: int

    def grow(self, rows: Tensor) -> Tensor:
        """Rows (n, C) to (total, C); those of the appended tokens become the mean of the known ones."""
        grown = torch.cat([rows, rows.new_zeros(max(self.total - len(rows), 0), rows.shape[1])])
        grown[self.known : len(self.tokenizer)] = rows[: self.known].float().mean(dim=0).to(rows.dtype)
        return grown


@dataclass(frozen=True)
class PartTarget:
    """What is wanted of one part: ``config`` (JSON beside the weights) and the tensors by name, as published.

    With a ``vocabulary`` the tensors named in ``growing`` get more rows after they were read. Those named in
    ``numbers`` are published without a dimension and get one.
    """

    config: Mapping[str, Any]
    expected: Mapping[str, TensorInfo]
    vocabulary: Vocabulary | None = None
    growing: frozenset[str] = frozenset()
    numbers: frozenset[str] = frozenset()


def model_part(name: str, config: ModelConfig) -> PartTarget:
    """Target of a part at the sizes of ``config``; nothing is allocated."""
    part = PARTS[name]
    with torch.device("meta"):
        module = part.build(config)
    section = dataclasses.asdict(getattr(config, part.section))
    return PartTarget({part.section: section}, tensors_of(module))


def tensors_of(module: nn.Module) -> dict[str, TensorInfo]:
    """Stored tensors of a module by name; of tied ones the first name only."""
    own = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    return {
        name: TensorInfo(tuple(value.shape), value.is_floating_point())
        for name, value in module.state_dict().items()
        if name in own
    }


def read_part_config(folder: Path) -> ModelConfig:
    """Configuration of a part folder: the sections stored there, everything else at its default.

    Raises :class:`CheckpointError` when the folder is no part folder.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        return ModelConfig.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise CheckpointError(f"{path} is no part configuration ({error}); convert the weights again") from error


def config_from_parts(folders: Mapping[str, Path], base: ModelConfig) -> ModelConfig:
    """``base`` changed so that a model built from it takes all the converted parts; its ``choices`` stay."""
    sections = {}
    for name, folder in folders.items():
        part = known_part(name)
        chosen = {field: getattr(getattr(base, part.section), field) for field in part.choices}
        sections[part.section] = dataclasses.replace(getattr(read_part_config(folder), part.section), **chosen)
    return dataclasses.replace(base, **sections)


def known_part(name: str) -> Part:
    """A part by name; :class:`CheckpointError` names those there are."""
    if name not in PARTS:
        raise CheckpointError(f"there is no part {name!r}; parts: {', '.join(PARTS)}")
    return PARTS[name]


def write_part_config(folder: Path, target: PartTarget) -> None:
    """Write ``config.json`` and, for a language model, ``tokenizer.json``."""
    (folder / CONFIG_FILE).write_text(json.dumps(target.config, indent=2) + "\n", encoding="utf-8")
    if target.vocabulary is not None:
        target.vocabulary.tokenizer.save(folder / "tokenizer.json")
