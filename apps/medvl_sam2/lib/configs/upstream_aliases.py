"""Our tasks under the names that MONAI Label's radiology app gives its own (``--conf upstream_aliases true``).

For programs written for that app, its integration tests first (``tests/app/test_upstream_suite.py`` runs them), and for
the spleen of its app ``monaibundle``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medvl_sam2.training.finetune_records import FinetuneConfig

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
    "spleen_ct_segmentation": ("medvl_semantic", {"classes": "spleen"}),
}
"""Upstream's name: our task, and what a request that does not say it asks for. DeepEdit is the one without a click."""

TRAIN_ALIASES = (
    *("segmentation_spleen", "segmentation", "deepgrow_2d", "deepgrow_3d", "deepedit"),
    "spleen_ct_segmentation",
)
"""Names under which our one trainer is offered."""

TRAIN_DEFAULTS = FinetuneConfig(epochs=1, steps_per_epoch=4, minutes=2.0, replay_cases=4)
"""What an alias trains by. Upstream's epoch is one pass over the labelled images, and its clients wait for the reply:
a step of ours shows eight windows and three stacks or four slices, so a few steps are such a pass. Only training is
short: what passes the gates is served to everybody, so they are those of ``medvl_sam2``, measured on as much."""

UNCERTAINTY_ALIAS = "segmentation_spleen_epistemic"
"""Upstream's name for the scoring method and the strategy that are ``uncertainty`` here."""
