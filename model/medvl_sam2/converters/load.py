"""Initialise parts of a unified model from converted part folders, so that training starts from published weights."""

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
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.unified import UnifiedModel


@dataclass(frozen=True)
class LoadedParts:
    """``loaded``: tensors filled, by part; ``untouched``: names of model tensors that keep what they had."""

    loaded: Mapping[str, int]
    untouched: tuple[str, ...]


def load_parts(model: UnifiedModel, folders: Mapping[str, Path]) -> LoadedParts:
    """Fill parts (``vision``, ``projector``, ``language``, ``slices``) of ``model`` in place, in the model's own types.

    All folders are checked before the first number changes. One tensor at a time is in memory.

    Raises:
        CheckpointError: a part is unknown, its folder is damaged, a tensor is missing, unused or misshapen, or the
            model's configuration or tokenizer differs from the one the weights belong to.
    """
    sources, touched = {}, set[str]()
    for name, folder in folders.items():
        part = known_part(name)
        source = open_source(Path(folder))
        wanted = tensors_of(model.get_submodule(part.place))
        plan(source.tensors, (Rename("(.*)", r"\1"),), wanted, f"{folder} as part {name!r}")
        _check_config(model, part, name, Path(folder))
        sources[name] = source
        touched |= {f"{part.place}.{key}" for key in wanted}
    for name, source in sources.items():
        module = model.get_submodule(known_part(name).place)
        state = module.state_dict()
        with torch.no_grad():
            for key, tensor in source.read(list(source.tensors)):
                state[key].copy_(tensor)
    return LoadedParts(
        {name: len(source.tensors) for name, source in sources.items()},
        tuple(name for name in tensors_of(model) if name not in touched),
    )


def _check_config(model: UnifiedModel, part: Part, name: str, folder: Path) -> None:
    """Fields that no shape shows (heads, windows, rotary base ...) must be those the weights were trained with."""
    stored = dataclasses.asdict(getattr(read_part_config(folder), part.section))
    own = dataclasses.asdict(getattr(model.config, part.section))
    odd = sorted(field for field in own if field not in part.choices | part.habits and own[field] != stored[field])
    if odd:
        raise CheckpointError(
            f"{odd[0]!r} of the model's {part.section!r} configuration is {own[odd[0]]}, the weights of {folder} "
            f"belong to {stored[odd[0]]}; build the model from config_from_parts()"
        )
    if name == LANGUAGE and Tokenizer.load(folder / "tokenizer.json").to_json() != model.language.tokenizer.to_json():
        raise CheckpointError(f"the model's tokenizer is not that of {folder}; build it with tokenizer.json from there")
