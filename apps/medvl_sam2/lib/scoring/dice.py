"""Scoring method ``dice``: how much annotators changed what was proposed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.tasks.scoring import ScoringMethod

from lib.label_names import stored_names
from lib.result_writing import http_errors
from lib.scoring.score_file import ScoreFile
from medvl_sam2.errors import MedVLError
from medvl_sam2.volume_io import read_mask

logger = logging.getLogger(__name__)


class DiceScoring(ScoringMethod):
    """Mean Dice over structures between the label of one tag and another (``original`` against ``final``).

    Structures are matched by name: both labels may number the same organs differently. Written to the image's info as
    ``dice`` and ``dice_by_label``.
    """

    def __init__(self, scores: ScoreFile) -> None:
        super().__init__("Dice of the proposed (original) against the submitted (final) label")
        self._scores = scores

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, float]:
        """Compare what has both tags; return and store the mean by image id. Options ``y`` and ``y_pred`` are tags."""
        truth_tag = str(request.get("y") or DefaultLabelTag.FINAL.value)
        proposed_tag = str(request.get("y_pred") or DefaultLabelTag.ORIGINAL.value)
        result: dict[str, float] = {}
        with http_errors("Scoring dice"):
            for image_id in sorted(datastore.list_images()):
                try:
                    by_name = _compare(image_id, datastore, truth_tag, proposed_tag)
                    stamp = Path(datastore.get_image_uri(image_id)).stat().st_mtime_ns
                except (MedVLError, OSError) as error:
                    logger.warning("%s cannot be compared: %s", image_id, error)
                    continue
                if by_name is None:
                    continue
                mean = float(np.mean(list(by_name.values()))) if by_name else 1.0
                self._scores.add(image_id, mean, "", stamp)
                datastore.update_image_info(image_id, {"dice": mean, "dice_by_label": by_name})
                logger.info("dice %s: %.4f", image_id, mean)
                result[image_id] = mean
        return result


def _compare(image_id: str, datastore: Datastore, truth_tag: str, proposed_tag: str) -> dict[str, float] | None:
    """Dice by name over what either label has voxels of; None when a label is missing."""
    tags = datastore.get_labels_by_image_id(image_id)
    if truth_tag not in tags or proposed_tag not in tags:
        return None
    truth, grid = read_mask(datastore.get_label_uri(tags[truth_tag], truth_tag))
    proposed, _ = read_mask(datastore.get_label_uri(tags[proposed_tag], proposed_tag), like=grid)
    truth_values = _values_by_name(truth, datastore.get_label_info(tags[truth_tag], truth_tag))
    proposed_values = _values_by_name(proposed, datastore.get_label_info(tags[proposed_tag], proposed_tag))
    result = {}
    for name in sorted(truth_values.keys() | proposed_values.keys()):
        a = truth == truth_values.get(name, -1)
        b = proposed == proposed_values.get(name, -1)
        result[name] = float(2.0 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b)))
    return result


def _values_by_name(mask: np.ndarray, info: Mapping[str, Any]) -> dict[str, int]:
    names = stored_names(info, np.unique(mask).tolist())
    return {name: value for value, name in names.items()}
