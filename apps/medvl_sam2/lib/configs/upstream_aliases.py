"""Our tasks under the names that MONAI Label's radiology app gives its own (``--conf upstream_aliases true``).

For programs written for that app, its integration tests first. An alias has no settings of its own; ``POST /train/``
without a name starts the trainer once for every alias, so the mode is not for annotators.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INFER_ALIASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "segmentation_spleen": ("medvl_semantic", {"classes": "spleen"}),
    "segmentation": ("medvl_semantic", {}),
    "deepedit_seg": ("medvl_semantic", {}),
    "deepedit": ("medvl_semantic", {}),
    "deepgrow_pipeline": ("medvl_interactive", {}),
    "deepgrow_2d": ("medvl_interactive", {}),
    "deepgrow_3d": ("medvl_interactive", {}),
    "sam_2d": ("medvl_interactive", {}),
    "sam_3d": ("medvl_interactive", {}),
}
"""Upstream's name: our task, and what a request that does not say it asks for. DeepEdit is the one without a click."""

TRAIN_ALIASES = ("segmentation_spleen", "segmentation", "deepgrow_2d", "deepgrow_3d", "deepedit")
"""Names under which our one trainer is offered."""
