"""SAM 2.1 as its own package builds it, from the configuration files it installs: what ours is measured against."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from medvl_sam2.modeling.meta_device import ReadableLinspace

FILES = {"sam2.1_tiny": "t", "sam2.1_small": "s", "sam2.1_base_plus": "b+", "sam2.1_large": "l"}


def upstream_sam2(name: str, image_size: int = 1024) -> Any:
    """``SAM2Base`` of a preset's name, random weights, in evaluation mode; skips without the configuration files."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.utils import instantiate

    folders = getattr(find_spec("sam2"), "submodule_search_locations", None) or []
    folder = Path(next(iter(folders), "")) / "configs" / "sam2.1"
    file = f"sam2.1_hiera_{FILES[name]}.yaml"
    if not (folder / file).is_file():
        pytest.skip("the installed sam2 package has no configuration files; parity cannot be measured against it")
    import sam2.modeling  # noqa: F401 - the package takes Hydra over when it is first imported

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(folder.resolve()), version_base=None), ReadableLinspace():
        config = compose(file, overrides=[f"model.image_size={image_size}"])
        return instantiate(config.model, _recursive_=True).eval()
