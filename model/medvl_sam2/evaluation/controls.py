"""Controls of the interactive protocol: the same loop with the network removed.

Two of them, deliberately strong: their constants were tuned for the best mean Dice after five clicks, in both
settings, on training data (22 structures of the whole abdomen, then 30 of eight volumes, two of them generated).

* :class:`ShapeControl`: an ellipsoid in the box (a ball at the first click), then painted balls at the clicks;
* :class:`GrowControl`: a region grown from the intensities of the prompt's core, then balls at the clicks that
  themselves keep to the intensities round the click.

A network earns its place only where it beats the better of the two on the same cases.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from medvl_sam2.errors import PromptError
from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.region_grow import GrowRule, ball, bounding_region, ellipsoid, grow
from medvl_sam2.types import Prompt, Volume


@dataclass(frozen=True)
class BrushRule:
    """Radius of the ball painted at a click: ``share`` of the way to the border of the present mask, within limits.

    ``low_mm`` and ``high_mm`` limit it; with a box, ``high`` is also held below ``box_share`` of the box diagonal.
    """

    share: float = 1.3
    low_mm: float = 2.0
    high_mm: float = 30.0
    box_share: float = 0.25

    def radius(self, mask: np.ndarray, point: np.ndarray, label: int, spacing: np.ndarray, diagonal: float) -> float:
        """Radius in mm at ``point`` (z, y, x) on the present ``mask`` (Z, Y, X); ``diagonal`` in mm, 0 without box."""
        high = self.high_mm if diagonal == 0 else min(self.high_mm, self.box_share * diagonal)
        distance = _border_distance(mask, point, label == 0, spacing, high / max(self.share, 1e-6))
        return float(max(min(self.share * distance, high), min(self.low_mm, high)))


_SHAPE_BRUSH = BrushRule()
_GROW_BRUSH = BrushRule(share=1.6, high_mm=50.0, box_share=0.35)
_REGION = GrowRule()
_STROKE = GrowRule(k=3.0, floor=0.04, open_mm=0.0, close_mm=3.0)


@dataclass(frozen=True)
class ShapeRule:
    """Constants of :class:`ShapeControl`. ``power``: of the superellipsoid; ``first_mm``: radius at a first click."""

    power: float = 2.5
    first_mm: float = 22.0
    brush: BrushRule = _SHAPE_BRUSH


@dataclass(frozen=True)
class IntensityRule:
    """Constants of :class:`GrowControl`.

    ``scale``: ellipsoid that limits the growth, relative to the box, with ``power``. ``core``: ellipsoid of the core,
    relative to the box. ``least_share``: a region below this share of the ellipsoid gives way to it. ``reach_mm``,
    ``core_mm``: limit and core as balls when there is no box. ``brush_grow``: intensities of a brush, whose core has
    radius ``brush_core_mm``.
    """

    scale: float = 1.0
    power: float = 2.5
    core: float = 0.5
    least_share: float = 0.3
    reach_mm: float = 40.0
    core_mm: float = 5.0
    grow: GrowRule = _REGION
    brush: BrushRule = _GROW_BRUSH
    brush_grow: GrowRule = _STROKE
    brush_core_mm: float = 4.0


@dataclass(frozen=True)
class Scene:
    """One object's cumulative prompt in the canonical frame: points (N, 3) z, y, x; labels (N,); box (2, 3) or None."""

    image: np.ndarray
    spacing: tuple[float, float, float]
    points: np.ndarray
    labels: np.ndarray
    box: np.ndarray | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Canonical shape (Z, Y, X)."""
        z, y, x = self.image.shape
        return z, y, x

    @property
    def diagonal(self) -> float:
        """Box diagonal in mm, 0 without a box."""
        if self.box is None:
            return 0.0
        return float(np.linalg.norm((self.box[1] - self.box[0] + 1) * np.asarray(self.spacing)))


@dataclass(frozen=True)
class Opened:
    """A volume opened by a control: the canonical view of its array."""

    image: np.ndarray
    transform: CanonicalTransform


class _Control:
    """Frame handling common to both controls; subclasses paint in the canonical frame."""

    name = "control"

    def open(self, volume: Volume) -> Opened:
        """Canonical view of a volume; nothing is computed."""
        transform = CanonicalTransform(volume.geometry)
        return Opened(transform.forward_array(volume.array), transform)

    def segment(self, opened: Opened, prompt: Prompt) -> np.ndarray:
        """Bool mask (I, J, K) on the stored grid for a cumulative prompt of stored voxels."""
        transform = opened.transform
        points = transform.forward_points(np.asarray(prompt.points, dtype=np.float64).reshape(-1, 3))
        box = None if prompt.box is None else transform.forward_box(np.asarray(prompt.box, dtype=np.float64))
        labels = np.asarray(prompt.labels, dtype=np.int64).reshape(-1)
        if box is None and not (labels == 1).any():
            raise PromptError("a control needs a box or a foreground click; the prompt has neither")
        return transform.inverse_array(self.paint(Scene(opened.image, transform.spacing, points, labels, box)))

    def paint(self, scene: Scene) -> np.ndarray:
        """Bool mask (Z, Y, X) of a canonical scene."""
        raise NotImplementedError


class ShapeControl(_Control):
    """Ellipsoid in the box or ball at the first click, then painted balls."""

    name = "shape control"

    def __init__(self, rule: ShapeRule | None = None) -> None:
        self.rule = rule or ShapeRule()

    def paint(self, scene: Scene) -> np.ndarray:
        """Bool (Z, Y, X); see the class."""
        shape = scene.shape
        mask, start = _base(scene, self.rule.first_mm, self.rule.power)
        for point, label in zip(scene.points[start:], scene.labels[start:], strict=True):
            radius = self.rule.brush.radius(mask, point, int(label), np.asarray(scene.spacing), scene.diagonal)
            brush = ball(shape, point, radius, scene.spacing)
            mask = mask | brush if label == 1 else mask & ~brush
        return mask


class GrowControl(_Control):
    """Intensity-grown region in the box or round the first click, then intensity-limited balls."""

    name = "grow control"

    def __init__(self, rule: IntensityRule | None = None) -> None:
        self.rule = rule or IntensityRule()

    def paint(self, scene: Scene) -> np.ndarray:
        """Bool (Z, Y, X); see the class."""
        rule, shape, spacing = self.rule, scene.shape, scene.spacing
        if scene.box is not None:
            allowed = ellipsoid(shape, scene.box, rule.scale, rule.power)
            allowed[: int(scene.box[0, 0])] = False
            allowed[int(scene.box[1, 0]) + 1 :] = False
            mask, start = grow(scene.image, spacing, allowed, ellipsoid(shape, scene.box, rule.core), rule.grow), 0
            if mask.sum() < rule.least_share * allowed.sum():
                # Mixed intensities: the box knows more than the region that was found.
                mask = allowed
        else:
            first = int(np.flatnonzero(scene.labels == 1)[0])
            center = scene.points[first]
            allowed, core = ball(shape, center, rule.reach_mm, spacing), ball(shape, center, rule.core_mm, spacing)
            mask, start = grow(scene.image, spacing, allowed, core, rule.grow), first + 1
        for point, label in zip(scene.points[start:], scene.labels[start:], strict=True):
            radius = rule.brush.radius(mask, point, int(label), np.asarray(spacing), scene.diagonal)
            brush = self._brush(scene, point, radius)
            mask = mask | brush if label == 1 else mask & ~brush
        return mask

    def _brush(self, scene: Scene, point: np.ndarray, radius: float) -> np.ndarray:
        """Ball at a click, kept to the intensities next to the click."""
        whole = ball(scene.shape, point, radius, scene.spacing)
        core = ball(scene.shape, point, min(self.rule.brush_core_mm, radius), scene.spacing)
        return grow(scene.image, scene.spacing, whole, core, self.rule.brush_grow) | (core & whole)


def _base(scene: Scene, first_mm: float, power: float) -> tuple[np.ndarray, int]:
    """First mask and the number of clicks it has used up."""
    shape = scene.shape
    if scene.box is not None:
        return ellipsoid(shape, scene.box, 1.0, power), 0
    first = int(np.flatnonzero(scene.labels == 1)[0])
    return ball(shape, scene.points[first], first_mm, scene.spacing), first + 1


def _border_distance(mask: np.ndarray, point: np.ndarray, inside: bool, spacing: np.ndarray, limit_mm: float) -> float:
    """Distance in mm from ``point`` to the nearest voxel of (``inside``: outside) the mask, at most ``limit_mm``."""
    reach = limit_mm / spacing
    region = bounding_region(point - reach, point + reach, mask.shape)
    local = ~mask[region] if inside else mask[region]
    if not local.any():
        return limit_mm
    center = np.clip(np.rint(point).astype(int) - [s.start for s in region], 0, np.array(local.shape) - 1)
    return min(float(ndimage.distance_transform_edt(~local, sampling=spacing)[tuple(center)]), limit_mm)
