"""Initialise parts of a model from converted part folders, so that training starts from published weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from medvl_sam2.converters.keymap import Rename, plan
from medvl_sam2.converters.parts import LANGUAGE, Part, known_part, read_part_config, tensors_of
from medvl_sam2.converters.source import open_source
from medvl_sam2.errors import CheckpointError
from medvl_sam2.modeling.siglip import ImageTextModel
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.unified import UnifiedModel


@dataclass(frozen=True)
class LoadedParts:
    """``loaded``: tensors filled, by part; ``untouched``: names of model tensors that keep what they had."""

    loaded: Mapping[str, int]
    untouched: tuple[str, ...]


def load_parts(model: UnifiedModel | ImageTextModel, folders: Mapping[str, Path]) -> LoadedParts:
    """Fill parts of ``model`` in place, in the model's own types.

    The unified model has ``vision``, ``projector``, ``language`` and ``slices``, the image-text model ``vision`` and
    ``alignment``.

    All folders are checked before the first number changes. One tensor at a time is in memory.

    Raises:
        CheckpointError: the model has no such part, its folder is damaged, a tensor is missing, unused or misshapen, or
            the model's configuration or tokenizer differs from the one the weights belong to.
    """
    sources, touched = {}, set[str]()
    for name, folder in folders.items():
        part, place = known_part(name), _place(model, name)
        source = open_source(Path(folder))
        wanted = tensors_of(model.get_submodule(place))
        plan(source.tensors, (Rename("(.*)", r"\1"),), wanted, f"{folder} as part {name!r}")
        _check_config(model, part, name, Path(folder))
        sources[name] = source
        touched |= {f"{place}.{key}" for key in wanted}
    for name, source in sources.items():
        module = model.get_submodule(_place(model, name))
        state = module.state_dict()
        with torch.no_grad():
            for key, tensor in source.read(list(source.tensors)):
                state[key].copy_(tensor)
    return LoadedParts(
        {name: len(source.tensors) for name, source in sources.items()},
        tuple(name for name in tensors_of(model) if name not in touched),
    )


def _place(model: UnifiedModel | ImageTextModel, name: str) -> str:
    """Submodule that is the part ``name`` of this model."""
    place = known_part(name).place
    if isinstance(model, ImageTextModel):
        place = place.removeprefix("language.")
    if place not in dict(model.named_modules()):
        raise CheckpointError(
            f"{type(model).__name__} has no part {name!r}; 'alignment' belongs to ImageTextModel, 'vision' to both "
            "models, every other part to UnifiedModel"
        )
    return place


def _check_config(model: UnifiedModel | ImageTextModel, part: Part, name: str, folder: Path) -> None:
    """Fields that no shape shows (heads, windows, rotary base ...) must be those the weights were trained with."""
    stored = dataclasses.asdict(getattr(read_part_config(folder), part.section))
    own = dataclasses.asdict(getattr(model.config, part.section))
    odd = sorted(field for field in own if field not in part.choices | part.habits and own[field] != stored[field])
    if odd:
        raise CheckpointError(
            f"{odd[0]!r} of the model's {part.section!r} configuration is {own[odd[0]]}, the weights of {folder} "
            f"belong to {stored[odd[0]]}; build the model from config_from_parts()"
        )
    if isinstance(model, ImageTextModel) or name != LANGUAGE:
        return
    if Tokenizer.load(folder / "tokenizer.json").to_json() != model.language.tokenizer.to_json():
        raise CheckpointError(f"the model's tokenizer is not that of {folder}; build it with tokenizer.json from there")
