"""The published layouts by the name a user gives them."""

from __future__ import annotations

from collections.abc import Mapping

from medvl_sam2.converters.dcformer_layout import dcformer, dcformer_siglip
from medvl_sam2.converters.layout import Layout
from medvl_sam2.converters.med3dvlm_layout import med3dvlm
from medvl_sam2.converters.qwen2_layout import qwen2
from medvl_sam2.converters.sam2_layout import MEDSAM2_PIXELS, sam2
from medvl_sam2.errors import CheckpointError
from medvl_sam2.presets import SLICE_PRESETS, VISION_PRESETS

KINDS: Mapping[str, Layout] = {
    **{name: sam2(name) for name in SLICE_PRESETS},
    "medsam2": sam2("sam2.1_tiny", MEDSAM2_PIXELS),
    "dcformer_siglip": dcformer_siglip,
    **{name: dcformer(name) for name in VISION_PRESETS},
    "med3dvlm": med3dvlm,
    "qwen2.5": qwen2,
}


def known_kind(name: str) -> Layout:
    """Layout by name; :class:`CheckpointError` names those there are."""
    if name not in KINDS:
        raise CheckpointError(f"unknown kind of weights {name!r}; kinds: {', '.join(KINDS)}")
    return KINDS[name]
