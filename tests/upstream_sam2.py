"""SAM 2.1 as its own package builds it, from the configuration files it installs: what ours is measured against."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from medvl_sam2.modeling.meta_device import ReadableLinspace

FILES = {"sam2.1_tiny": "t", "sam2.1_small": "s", "sam2.1_base_plus": "b+", "sam2.1_large": "l"}


def upstream_sam2(name: str, image_size: int = 1024) -> Any:
    """The ``SAM2VideoPredictor`` of a preset's name by the package's builder, which is a ``SAM2Base``, too.

    Random weights, evaluation mode, on torch's default device; skips without the configuration files. Filling of small
    holes is off: it needs a CUDA kernel that the package leaves out of its wheel, and warns without it.
    """
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    folders = getattr(find_spec("sam2"), "submodule_search_locations", None) or []
    file = f"configs/sam2.1/sam2.1_hiera_{FILES[name]}.yaml"
    if not (Path(next(iter(folders), "")) / file).is_file():
        pytest.skip("the installed sam2 package has no configuration files; parity cannot be measured against it")
    from sam2.build_sam import build_sam2_video_predictor

    GlobalHydra.instance().clear()  # the package takes Hydra over when it is first imported
    with initialize_config_module("sam2", version_base=None), ReadableLinspace():
        size = [f"model.image_size={image_size}"]
        device = torch.get_default_device()
        predictor = build_sam2_video_predictor(file, device=device, hydra_overrides_extra=size)
    predictor.fill_hole_area = 0
    return predictor
