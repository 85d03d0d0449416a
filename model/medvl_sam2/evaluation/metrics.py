"""Scores: overlap, surface agreement, curves over clicks, bootstrap intervals, findings and answers."""

from __future__ import annotations

import re
import string
import warnings
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics.surface_dice import compute_surface_dice

from medvl_sam2.errors import DataError

CLICKS_IN_AUC = 5
"""The CVPR 2025 area covers clicks 1..5 (the box step is not counted), so it is at most 4."""


def dice(truth: np.ndarray, prediction: np.ndarray) -> float | None:
    """Dice of two bool arrays of one shape; None when both are empty, 0 when one is."""
    if truth.shape != prediction.shape:
        raise DataError(f"prediction of shape {prediction.shape} does not fit the truth of shape {truth.shape}")
    truth, prediction = truth.astype(bool, copy=False), prediction.astype(bool, copy=False)
    total = int(truth.sum()) + int(prediction.sum())
    return None if total == 0 else 2.0 * int((truth & prediction).sum()) / total


def surface_dice(
    truth: np.ndarray, prediction: np.ndarray, spacing: tuple[float, float, float], tolerance_mm: float = 2.0
) -> float | None:
    """Normalised surface Dice of bool (Z, Y, X) arrays at a tolerance in mm; None when both are empty.

    MONAI's implementation with sub-voxel surface areas (Nikolov et al., arXiv 1809.04430), on the common crop.
    """
    if truth.shape != prediction.shape:
        raise DataError(f"prediction of shape {prediction.shape} does not fit the truth of shape {truth.shape}")
    both = truth.astype(bool) | prediction.astype(bool)
    if not both.any():
        return None
    if not truth.any() or not prediction.any():
        return 0.0
    where = np.argwhere(both)
    crop = tuple(slice(int(low), int(high) + 1) for low, high in zip(where.min(0), where.max(0), strict=True))
    # One voxel of background all round, so that a surface at the border of the crop stays a surface.
    pair = [torch.from_numpy(np.pad(mask[crop].astype(np.uint8), 2))[None, None] for mask in (prediction, truth)]
    with warnings.catch_warnings():
        # MONAI 1.5 calls a function of its own with an argument it has deprecated.
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
        value = compute_surface_dice(
            pair[0], pair[1], [tolerance_mm], include_background=True, spacing=list(spacing), use_subvoxels=True
        )
    return float(value[0, 0])


def area_under_clicks(dice_after_clicks: Sequence[float]) -> float:
    """Trapezoid area over the first five click steps (x = 0..4): DSC_AUC of the CVPR 2025 protocol, at most 4.

    Give one value a click, the box step left out; fewer than five clicks raise :class:`DataError`.
    """
    if len(dice_after_clicks) < CLICKS_IN_AUC:
        raise DataError(f"{len(dice_after_clicks)} click steps; the area needs {CLICKS_IN_AUC}, ask for --steps 5")
    values = np.asarray(dice_after_clicks[:CLICKS_IN_AUC], dtype=np.float64)
    return float(((values[1:] + values[:-1]) / 2).sum())


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% bootstrap interval and the number of values behind it."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(values: Sequence[float], groups: Sequence[Hashable], draws: int = 2000, seed: int = 0) -> Interval | None:
    """Mean of ``values`` with a 95% percentile interval; whole ``groups`` (patients) are drawn, not single values.

    Structures of one patient are not independent, so the patient is the unit. None without values; with a single group
    the interval spans only its mean and says nothing about other patients.
    """
    if len(values) != len(groups):
        raise DataError(f"{len(values)} values but {len(groups)} groups; give one group a value")
    if not values:
        return None
    numbers = np.asarray(values, dtype=np.float64)
    names = list(dict.fromkeys(groups))
    index = np.array([names.index(group) for group in groups])
    sums = np.bincount(index, weights=numbers, minlength=len(names))
    counts = np.bincount(index, minlength=len(names))
    drawn = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(float(numbers.mean()), float(low), float(high), len(numbers))


def same_answer(given: str, expected: str) -> bool:
    """True when an answer agrees with ``expected`` up to case, outer punctuation and white space.

    Where ``expected`` is lettered ("B. two cysts") its letter or its text alone is right too; a right letter with
    another choice's text is wrong.
    """
    said, wanted = _plain(given), _plain(expected)
    accepted = {wanted}
    lettered = re.fullmatch(r"([a-h])[.:)] +(.+)", wanted)
    if lettered:
        accepted |= {lettered[1], _plain(lettered[2])}
    return said in accepted


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).strip(string.punctuation + " ")


@dataclass(frozen=True)
class Counts:
    """True positives, false positives, false negatives; add them up over cases, then read ``f1``."""

    hit: int = 0
    extra: int = 0
    missed: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.hit + other.hit, self.extra + other.extra, self.missed + other.missed)

    @property
    def f1(self) -> float | None:
        """Micro F1, None when nothing was there and nothing was claimed."""
        total = 2 * self.hit + self.extra + self.missed
        return None if total == 0 else 2 * self.hit / total


def match_counts(claimed: Iterable[Hashable], true: Iterable[Hashable]) -> Counts:
    """Multiset comparison of claimed and true findings."""
    rest = list(true)
    hit = extra = 0
    for item in claimed:
        if item in rest:
            rest.remove(item)
            hit += 1
        else:
            extra += 1
    return Counts(hit, extra, len(rest))
