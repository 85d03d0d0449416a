"""Mask scores as the relatives' published scripts compute them: for comparing with their tables, not for judging.

Our own scores are hard Dice (:mod:`medvl_sam2.evaluation.metrics`) and surface Dice at 2 mm
(:mod:`medvl_sam2.evaluation.surface`) on the stored grid. The variants differ from them in smoothing, in what an empty
truth counts, and in the surface tolerance. Rules, read from the scripts named:

* M3D (BAAI-DCAI/M3D ``Bench/eval/metrics.py``): soft Dice of probabilities, 1 added to the denominator only, so an
  empty truth scores 0 whatever is predicted. M3D computes it on a grid of 32x256x256.
* MedSAM2 (bowang-lab/MedSAM2 ``medsam2_infer_3D_CT.py``): 1 added above and below, labels of the truth only.
* TotalSegmentator (wasserth/TotalSegmentator ``resources/evaluate.py``): 1e-6 below and surface Dice at 3 mm; a
  structure the truth lacks is NaN (left out of means), one the prediction lacks scores 0. It resamples to 1.5 mm
  first; here the grid is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from medvl_sam2.errors import DataError
from medvl_sam2.evaluation.metrics import Overlap, overlap
from medvl_sam2.evaluation.surface import surface_dice

TOTALSEGMENTATOR_TOLERANCE_MM = 3.0


def m3d_soft_dice(truth: np.ndarray, probabilities: np.ndarray) -> float:
    """M3D's Dice of probabilities in [0, 1] against a bool truth of the same shape."""
    if truth.shape != probabilities.shape:
        raise DataError(f"probabilities of shape {probabilities.shape} do not fit the truth of shape {truth.shape}")
    target = truth.astype(np.float64)
    values = probabilities.astype(np.float64)
    return float(2 * (values * target).sum() / (values.sum() + target.sum() + 1))


def m3d_dice(counts: Overlap) -> float:
    """M3D's Dice of a mask, that is of probabilities 0 and 1."""
    return 2 * counts.both / (counts.truth + counts.prediction + 1)


def medsam2_dice(counts: Overlap) -> float:
    """MedSAM2's smoothed Dice of one label."""
    return (2 * counts.both + 1) / (counts.truth + counts.prediction + 1)


def medsam2_dice_of_labels(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Mean of :func:`medsam2_dice` over the labels above the truth's smallest value (its background)."""
    labels: Sequence[int] = np.unique(truth)[1:].tolist()
    if not labels:
        raise DataError("the truth holds one value only; MedSAM2's mean over labels needs a label beside background")
    return float(np.mean([medsam2_dice(overlap(truth == label, prediction == label)) for label in labels]))


def totalsegmentator_dice(counts: Overlap) -> float:
    """TotalSegmentator's Dice; NaN where the truth is empty."""
    return math.nan if counts.truth == 0 else 2 * counts.both / (counts.truth + counts.prediction + 1e-6)


def totalsegmentator_surface_dice(
    truth: np.ndarray, prediction: np.ndarray, spacing: tuple[float, float, float]
) -> float:
    """Surface Dice of bool (Z, Y, X) arrays at 3 mm, ``spacing`` in mm; NaN where the truth is empty, 0 when missed."""
    if not truth.any():
        return math.nan
    value = surface_dice(truth, prediction, spacing, TOTALSEGMENTATOR_TOLERANCE_MM)
    return math.nan if value is None else value
