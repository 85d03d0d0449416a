"""Weight files as they would be published, and converted parts in a module."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from medvl_sam2.converters import open_source
from published_layouts import write_json


def write(path: Path, state: Mapping[str, Tensor]) -> Path:
    """The file as it would be published: torch under ``model``, or safetensors in one or two pieces."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(dict(state), path)
    elif path.suffix:
        torch.save({"model": dict(state), "epoch": 9, "args": argparse.Namespace(lr=1e-4)}, path)
    else:
        path.mkdir(exist_ok=True)
        halves = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
        places = {name: halves[n % 2] for n, name in enumerate(state)}
        for half in halves:
            save_file({name: value for name, value in state.items() if places[name] == half}, path / half)
        write_json(path / "model.safetensors.index.json", {"weight_map": places})
    return path


def load(module: nn.Module, folder: Path) -> Any:
    """A part folder in a module of its own, strictly."""
    source = open_source(folder)
    state = dict(source.read(list(source.tensors)))
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert unexpected == []
    assert set(missing) <= {"lm_head.weight"}  # tied
    return module.eval()
