"""SAM2.1 (Meta, ``sam2.1_hiera_*.pt``) and MedSAM2 (same layout, tiny at 512 px).

Our slice segmenter is built from the same modules, so names stay as they are; the resolution is in no tensor.
"""

from __future__ import annotations

import dataclasses

from medvl_sam2.config import ModelConfig
from medvl_sam2.converters.keymap import KeyMap, Rename
from medvl_sam2.converters.layout import Layout, Target
from medvl_sam2.converters.parts import SLICES, model_part
from medvl_sam2.converters.source import WeightSource
from medvl_sam2.presets import SLICE_PRESETS

SAM2_KEYS: KeyMap = (Rename(r"(.+)", rf"{SLICES}/\1"),)
MEDSAM2_PIXELS = 512


def sam2(name: str, image_size: int | None = None) -> Layout:
    """Layout of one published size; ``image_size`` is what the weights were trained at, None the preset's."""

    def target(source: WeightSource, config: ModelConfig | None) -> Target:
        if config is None:
            slices = SLICE_PRESETS[name]
            config = ModelConfig(slices=dataclasses.replace(slices, image_size=image_size or slices.image_size))
        return Target(SAM2_KEYS, {SLICES: model_part(SLICES, config)})

    return target
