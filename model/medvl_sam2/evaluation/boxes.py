"""Boxes as text: six fractions of the volume, written and scored as M3D-Bench does, beside a plain IoU of voxels.

Format ``[z0, y0, x0, z1, y1, x1]``: lowest and highest voxel index of the object, both inclusive, each divided by the
volume's size along its axis and rounded to three digits (BAAI-DCAI/M3D ``Bench/utils.py``). Axis order is the array's;
this project writes boxes in the canonical (Z, Y, X) frame.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from medvl_sam2.errors import DataError

NO_BOX = -1.0
"""What M3D's score gives an answer without a box."""
_NUMBER = r"([-+]?\d*\.\d+|[-+]?\d+)"
_BOX = re.compile(r"\[" + ", ".join([_NUMBER] * 6) + r"\]")


@dataclass(frozen=True)
class FractionBox:
    """Lowest and highest corner (z, y, x), as fractions of the volume."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]

    def __str__(self) -> str:
        return "[" + ", ".join(str(value) for value in (*self.low, *self.high)) + "]"


@dataclass(frozen=True)
class BoxScore:
    """``iou`` of voxels, 0 without a box; ``m3d``: M3D's score, -1 without a box."""

    iou: float
    m3d: float


def box_of(mask: np.ndarray) -> FractionBox | None:
    """Box of a bool (Z, Y, X) mask, None when it is empty."""
    if mask.ndim != 3:
        raise DataError(f"mask of shape {mask.shape} is not a volume; give (Z, Y, X)")
    spans = [np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis))) for axis in range(3)]
    if not len(spans[0]):
        return None
    z, y, x = ((round(float(s[0] / n), 3), round(float(s[-1] / n), 3)) for s, n in zip(spans, mask.shape, strict=True))
    return FractionBox((z[0], y[0], x[0]), (z[1], y[1], x[1]))


def parse_box(text: str) -> FractionBox | None:
    """First box in a text, None where there is none in the format."""
    match = _BOX.search(text)
    if match is None:
        return None
    z0, y0, x0, z1, y1, x1 = (float(value) for value in match.groups())
    return FractionBox((z0, y0, x0), (z1, y1, x1))


def score_box(truth: FractionBox, given: FractionBox | None, shape: tuple[int, int, int]) -> BoxScore:
    """Both scores of a given box, or of the lack of one, on a volume of ``shape`` (Z, Y, X)."""
    if given is None:
        return BoxScore(0.0, NO_BOX)
    return BoxScore(voxel_iou(truth, given, shape), enclosing_iou(truth, given))


def voxel_iou(first: FractionBox, second: FractionBox, shape: tuple[int, int, int]) -> float:
    """Intersection over union of the voxels two boxes hold; a box whose corners are swapped holds none."""
    sizes = np.asarray(shape)
    corners = [(np.rint(np.asarray(b.low) * sizes), np.rint(np.asarray(b.high) * sizes) + 1) for b in (first, second)]
    volumes = [float(np.maximum(high - low, 0).prod()) for low, high in corners]
    low, high = np.maximum(corners[0][0], corners[1][0]), np.minimum(corners[0][1], corners[1][1])
    shared = float(np.maximum(high - low, 0).prod()) if all(volumes) else 0.0
    total = sum(volumes) - shared
    return shared / total if total else 0.0


def enclosing_iou(first: FractionBox, second: FractionBox) -> float:
    """M3D's "IoU": intersection over the smallest box round both, which is less than IoU for shifted boxes.

    Highest corners are voxel indices, not borders, so an object one voxel thick scores 0 even when found exactly.
    """
    lows, highs = np.array([first.low, second.low]), np.array([first.high, second.high])
    shared = float(np.maximum(highs.min(axis=0) - lows.max(axis=0), 0).prod())
    return shared / (float((highs.max(axis=0) - lows.min(axis=0)).prod()) + 1e-6)
