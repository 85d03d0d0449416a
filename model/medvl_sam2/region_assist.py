"""Prompt assists without a network: what a box, a click or a stroke means from intensities alone.

The predictor uses them as rough first masks and to make a click count; the controls of the evaluation are made of
nothing else. Arrays are canonical (Z, Y, X); points are voxels (z, y, x); ``spacing`` is (sz, sy, sx) in mm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from medvl_sam2.region_grow import GrowRule, ball, bounding_region, ellipsoid, grow

Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class BrushRule:
    """Radius of the ball painted at a click: ``share`` of the way to the border of the present mask, within limits.

    ``low_mm`` and ``high_mm`` limit it; with a box, ``high`` is also held below ``box_share`` of the box diagonal.
    ``depth_share`` above 0 holds a foreground ball below that share of the mask's own depth: a part that is missing far
    from the mask is hardly thicker than the rest. ``depth_least``: but not below this share of the ball it would be, as
    the mask itself may be far too small.
    """

    share: float = 1.3
    low_mm: float = 2.0
    high_mm: float = 30.0
    box_share: float = 0.25
    depth_share: float = 0.0
    depth_least: float = 0.3

    def radius(self, mask: np.ndarray, point: np.ndarray, label: int, spacing: np.ndarray, diagonal: float) -> float:
        """Radius in mm at ``point`` (z, y, x) on the present ``mask`` (Z, Y, X); ``diagonal`` in mm, 0 without box."""
        high = self.high_mm if diagonal == 0 else min(self.high_mm, self.box_share * diagonal)
        low = min(self.low_mm, high)
        distance = border_distance(mask, point, label == 0, spacing, high / max(self.share, 1e-6))
        radius = max(min(self.share * distance, high), low)
        if label == 1 and self.depth_share and mask.any():
            radius = min(radius, max(self.depth_share * depth(mask, spacing), self.depth_least * radius, low))
        return float(radius)


_DEPTH_CELLS = 48
GROW_BRUSH = BrushRule(share=1.6, high_mm=50.0, box_share=0.35)
_REGION = GrowRule()
_STROKE = GrowRule(k=3.0, floor=0.04, open_mm=0.0, close_mm=3.0)


@dataclass(frozen=True)
class IntensityRule:
    """Constants of the intensity assists.

    ``scale``: ellipsoid that limits the growth, relative to the box, with ``power``. ``core``: ellipsoid of the core,
    relative to the box. ``least_share``: a region below this share of the ellipsoid gives way to it. ``reach_mm``,
    ``core_mm``: limit and core as balls when there is no box. ``brush_grow``: intensities of a brush, whose core has
    radius ``brush_core_mm``. ``line_share``: the brush's ``share`` along a drawn line and across a drawn area.
    """

    scale: float = 1.0
    power: float = 2.5
    core: float = 0.5
    least_share: float = 0.3
    reach_mm: float = 40.0
    core_mm: float = 5.0
    grow: GrowRule = _REGION
    brush: BrushRule = GROW_BRUSH
    brush_grow: GrowRule = _STROKE
    brush_core_mm: float = 4.0
    line_share: float = 0.7


def shape_of(image: np.ndarray) -> tuple[int, int, int]:
    """Shape (Z, Y, X) of a canonical array."""
    z, y, x = image.shape
    return z, y, x


def box_diagonal(box: np.ndarray | None, spacing: Spacing) -> float:
    """Diagonal in mm of a box (2, 3) of inclusive corners; 0 without a box."""
    if box is None:
        return 0.0
    return float(np.linalg.norm((box[1] - box[0] + 1) * np.asarray(spacing)))


def grown_in_box(image: np.ndarray, spacing: Spacing, box: np.ndarray, rule: IntensityRule) -> np.ndarray:
    """Bool (Z, Y, X): the region of the box's core intensities, or the whole ellipsoid where intensities are mixed."""
    shape = shape_of(image)
    allowed = ellipsoid(shape, box, rule.scale, rule.power)
    allowed[: int(box[0, 0])] = False
    allowed[int(box[1, 0]) + 1 :] = False
    mask = grow(image, spacing, allowed, ellipsoid(shape, box, rule.core), rule.grow)
    # Mixed intensities: the box knows more than the region that was found.
    return allowed if mask.sum() < rule.least_share * allowed.sum() else mask


def grown_at_click(image: np.ndarray, spacing: Spacing, point: np.ndarray, rule: IntensityRule) -> np.ndarray:
    """Bool (Z, Y, X): the region of the intensities at ``point``, within ``rule.reach_mm``."""
    shape = shape_of(image)
    allowed, core = ball(shape, point, rule.reach_mm, spacing), ball(shape, point, rule.core_mm, spacing)
    return grow(image, spacing, allowed, core, rule.grow)


def stroke(
    image: np.ndarray,
    spacing: Spacing,
    mask: np.ndarray,
    point: np.ndarray,
    label: int,
    diagonal: float,
    rule: IntensityRule,
) -> np.ndarray:
    """Bool (Z, Y, X): a ball at a click on the present ``mask``, kept to the intensities next to the click."""
    radius = rule.brush.radius(mask, point, label, np.asarray(spacing), diagonal)
    shape = shape_of(image)
    whole = ball(shape, point, radius, spacing)
    core = ball(shape, point, min(rule.brush_core_mm, radius), spacing)
    return grow(image, spacing, whole, core, rule.brush_grow) | (core & whole)


def line_stroke(
    image: np.ndarray,
    spacing: Spacing,
    mask: np.ndarray,
    line: np.ndarray,
    places: np.ndarray,
    label: int,
    diagonal: float,
    rule: IntensityRule,
) -> np.ndarray:
    """Bool (Z, Y, X): balls at some ``places`` of the voxels ``line`` (N, 3), kept to the intensities under the line.

    The line says how far the error goes, so a ball reaches ``rule.line_share`` of the way to the border of the mask.
    """
    brush = replace(rule.brush, share=rule.line_share)
    core = np.zeros(shape_of(image), dtype=bool)
    core[tuple(line.T)] = True
    whole = core.copy()
    for point in line[places].astype(np.float64):
        radius = brush.radius(mask, point, label, np.asarray(spacing), diagonal)
        whole |= ball(shape_of(image), point, radius, spacing)
    return grow(image, spacing, whole, core, rule.brush_grow) | core


def prism(
    image: np.ndarray,
    spacing: Spacing,
    mask: np.ndarray,
    voxels: np.ndarray,
    normal: int,
    point: np.ndarray,
    label: int,
    diagonal: float,
    rule: IntensityRule,
) -> np.ndarray:
    """Bool (Z, Y, X): what lies over and under the area ``voxels`` (N, 3) across axis ``normal`` and looks like it.

    It reaches as far along that axis as a ball at ``point`` would on the present ``mask``.
    """
    core = np.zeros(shape_of(image), dtype=bool)
    core[tuple(voxels.T)] = True
    brush = replace(rule.brush, share=rule.line_share)
    steps = int(brush.radius(mask, point, label, np.asarray(spacing), diagonal) / spacing[normal])
    row = int(voxels[0, normal])
    thick = [slice(None)] * 3
    thick[normal] = slice(max(0, row - steps), row + steps + 1)
    whole = np.zeros_like(core)
    whole[tuple(thick)] = core.any(axis=normal, keepdims=True)
    return grow(image, spacing, whole, core, rule.brush_grow) | core


def border_distance(mask: np.ndarray, point: np.ndarray, inside: bool, spacing: np.ndarray, limit_mm: float) -> float:
    """Distance in mm from ``point`` to the nearest voxel of (``inside``: outside) the mask, at most ``limit_mm``."""
    reach = limit_mm / spacing
    region = bounding_region(point - reach, point + reach, mask.shape)
    local = ~mask[region] if inside else mask[region]
    if not local.any():
        return limit_mm
    center = np.clip(np.rint(point).astype(int) - [s.start for s in region], 0, np.array(local.shape) - 1)
    return min(float(ndimage.distance_transform_edt(~local, sampling=spacing)[tuple(center)]), limit_mm)


def depth(mask: np.ndarray, spacing: np.ndarray) -> float:
    """Greatest distance in mm from inside a mask (Z, Y, X), not empty, to its border.

    Measured on at most 48 cells an axis, so that it costs milliseconds for any organ.
    """
    spans = ndimage.find_objects(mask.view(np.uint8))[0]
    own = mask[spans]
    steps = [-(-n // _DEPTH_CELLS) for n in own.shape]
    for axis, step in enumerate(steps):  # a cell counts where any voxel of it does: no thin part falls between cells
        own = np.logical_or.reduceat(own, np.arange(0, own.shape[axis], step), axis=axis)
    return float(ndimage.distance_transform_edt(np.pad(own, 1), sampling=spacing * np.array(steps)).max())
