"""Our own scores: overlap, curves over clicks, bootstrap intervals, findings and answers.

The relatives' variants of the same scores stand in :mod:`medvl_sam2.evaluation.relatives`, surface Dice in
:mod:`medvl_sam2.evaluation.surface`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from medvl_sam2.errors import DataError

CLICKS_IN_AUC = 5
"""The CVPR 2025 area covers clicks 1..5 (the box step is not counted), so it is at most 4."""


@dataclass(frozen=True)
class Overlap:
    """Voxel counts of two masks: in both, in the truth, in the prediction."""

    both: int
    truth: int
    prediction: int

    @property
    def dice(self) -> float | None:
        """Dice; None when both masks are empty, 0 when one is."""
        total = self.truth + self.prediction
        return None if total == 0 else 2.0 * self.both / total


def overlap(truth: np.ndarray, prediction: np.ndarray) -> Overlap:
    """Voxel counts of two bool arrays of one shape."""
    if truth.shape != prediction.shape:
        raise DataError(f"prediction of shape {prediction.shape} does not fit the truth of shape {truth.shape}")
    truth, prediction = truth.astype(bool, copy=False), prediction.astype(bool, copy=False)
    return Overlap(int((truth & prediction).sum()), int(truth.sum()), int(prediction.sum()))


def dice(truth: np.ndarray, prediction: np.ndarray) -> float | None:
    """Dice of two bool arrays of one shape; None when both are empty, 0 when one is."""
    return overlap(truth, prediction).dice


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
    return bootstrap_ratio(values, [1.0] * len(values), groups, draws, seed)


def bootstrap_ratio(
    parts: Sequence[float], wholes: Sequence[float], groups: Sequence[Hashable], draws: int = 2000, seed: int = 0
) -> Interval | None:
    """Sum of ``parts`` over sum of ``wholes`` (a micro F1, a mean) with a 95% percentile interval over ``groups``.

    Draws whose wholes sum to 0 say nothing and are left out. None when all wholes are 0.
    """
    if not len(parts) == len(wholes) == len(groups):
        raise DataError(f"{len(parts)} values, {len(wholes)} weights, {len(groups)} groups; give one of each a value")
    if not sum(wholes):
        return None
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    index = np.array([numbers[group] for group in groups])
    tops = np.bincount(index, weights=np.asarray(parts, dtype=np.float64), minlength=len(numbers))
    bottoms = np.bincount(index, weights=np.asarray(wholes, dtype=np.float64), minlength=len(numbers))
    drawn = np.random.default_rng(seed).integers(len(numbers), size=(draws, len(numbers)))
    above, below = tops[drawn].sum(axis=1), bottoms[drawn].sum(axis=1)
    low, high = np.percentile(above[below > 0] / below[below > 0], (2.5, 97.5))
    return Interval(float(tops.sum() / bottoms.sum()), float(low), float(high), len(parts))


def bootstrap_mean_of_kinds(
    values: Sequence[float], kinds: Sequence[str], groups: Sequence[Hashable], draws: int = 2000, seed: int = 0
) -> Interval | None:
    """Mean over ``kinds`` of the mean of each kind's values, every kind counting once; drawn by ``groups``.

    A draw leaves out the kinds of which it holds no value.
    """
    if not len(values) == len(kinds) == len(groups):
        raise DataError(f"{len(values)} values, {len(kinds)} kinds, {len(groups)} groups; give one of each a value")
    if not values:
        return None
    columns = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    rows = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    sums, counts = np.zeros((2, len(rows), len(columns)))
    for value, kind, group in zip(values, kinds, groups, strict=True):
        sums[rows[group], columns[kind]] += value
        counts[rows[group], columns[kind]] += 1
    drawn = np.random.default_rng(seed).integers(len(rows), size=(draws, len(rows)))
    times = np.stack([np.bincount(row, minlength=len(rows)) for row in drawn])
    above, below = times @ sums, times @ counts
    means = np.divide(above, below, out=np.zeros_like(above), where=below > 0).sum(axis=1) / (below > 0).sum(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(float((sums.sum(axis=0) / counts.sum(axis=0)).mean()), float(low), float(high), len(values))


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


def letter_occurs(given: str, expected: str) -> bool:
    """The relatives' rule of closed questions: "<letter>." of the right choice occurs anywhere in the output.

    M3D ``Bench/eval/eval_vqa.py`` and Med3DVLM ``src/eval/eval_vqa.py``. Looser than :func:`same_answer`: a right
    letter with a wrong text counts, and so does any sentence that happens to end in that letter; the right text
    without its letter does not.
    """
    lettered = re.match(r"([A-H])\. ", expected)
    if lettered is None:
        raise DataError(f"{expected!r} is no lettered answer; closed questions expect 'B. two cysts'")
    return f"{lettered[1]}." in given


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
