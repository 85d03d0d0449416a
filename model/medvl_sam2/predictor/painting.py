"""What an edit means from intensities alone, worked out next to the object rather than in the whole volume."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medvl_sam2.predictor.edits import CanonicalStroke, Edit, evenly
from medvl_sam2.predictor.objects import ObjectState
from medvl_sam2.region_assist import (
    IntensityRule,
    box_diagonal,
    grown_at_click,
    grown_in_box,
    line_stroke,
    prism,
    stroke,
)
from medvl_sam2.region_grow import Region, bounding_region
from medvl_sam2.strokes import StrokeKind

MAX_BALLS = 12
"""Balls painted along a scribble."""
_MARGIN_MM = 15.0
"""Room round the brush: what smoothing and morphology look at beyond it."""


@dataclass(frozen=True, eq=False)
class Painted:
    """A bool array ``local`` on the voxels ``region`` of the canonical volume."""

    region: Region
    local: np.ndarray

    @property
    def slices(self) -> list[int]:
        """Canonical z of the painted slices, ascending."""
        return [self.region[0].start + int(n) for n in np.flatnonzero(self.local.any(axis=(1, 2)))]

    def planes(self, slices: list[int], plane: tuple[int, int]) -> np.ndarray:
        """The painted slices (N, Y, X) as float32 of 0 and 1."""
        result = np.zeros((len(slices), *plane), dtype=np.float32)
        result[:, self.region[1], self.region[2]] = self.local[[z - self.region[0].start for z in slices]]
        return result


def paint(state: ObjectState, spacing: tuple[float, float, float], edit: Edit, rule: IntensityRule) -> Painted:
    """A click's ball, a scribble's balls or a lasso's prism on the mask as it is, kept to the intensities there."""
    image, shape = state.stack.image, state.stack.image.shape
    points = np.clip(edit.anchors, 0, np.array(shape) - 1)
    voxels = np.clip(edit.voxels, 0, np.array(shape) - 1)
    region = _surroundings(state, np.concatenate([points, voxels]), spacing, rule.brush.high_mm + _MARGIN_MM)
    start = np.array([part.start for part in region])
    near, mask = image[region], state.mask()[region]
    diagonal = box_diagonal(state.box, spacing)
    points, voxels = points - start, voxels - start
    if not isinstance(edit, CanonicalStroke):
        local = stroke(near, spacing, mask, points[0], edit.label, diagonal, rule)
    elif edit.kind is StrokeKind.SCRIBBLE:
        local = line_stroke(near, spacing, mask, voxels, evenly(len(voxels), MAX_BALLS), edit.label, diagonal, rule)
    else:
        middle = points[len(points) // 2]
        local = prism(near, spacing, mask, voxels, edit.normal or 0, middle, edit.label, diagonal, rule)
    return Painted(region, local)


def grown_round_box(
    image: np.ndarray, spacing: tuple[float, float, float], box: np.ndarray, rule: IntensityRule
) -> Painted:
    """The region of a canonical box's (2, 3) core intensities (:func:`medvl_sam2.region_assist.grown_in_box`)."""
    margin = _MARGIN_MM / np.asarray(spacing)
    region = bounding_region(box[0], box[1], image.shape, margin)
    start = np.array([part.start for part in region])
    return Painted(region, grown_in_box(image[region], spacing, box - start, rule))


def grown_round_click(
    image: np.ndarray, spacing: tuple[float, float, float], point: np.ndarray, rule: IntensityRule
) -> Painted:
    """The region of the intensities at a canonical ``point`` (:func:`medvl_sam2.region_assist.grown_at_click`)."""
    margin = (rule.reach_mm + _MARGIN_MM) / np.asarray(spacing)
    region = bounding_region(point, point, image.shape, margin)
    start = np.array([part.start for part in region])
    return Painted(region, grown_at_click(image[region], spacing, point - start, rule))


def _surroundings(
    state: ObjectState, points: np.ndarray, spacing: tuple[float, float, float], reach_mm: float
) -> Region:
    """The object's window and range, and everything within ``reach_mm`` of ``points`` (N, 3)."""
    y0, y1, x0, x1 = state.stack.crop.bounds(state.stack.plane)
    reach = reach_mm / np.asarray(spacing)
    low = np.minimum(points.min(axis=0) - reach, (state.low, y0, x0))
    high = np.maximum(points.max(axis=0) + reach, (state.high, y1 - 1, x1 - 1))
    return bounding_region(low, high, state.stack.image.shape)
