"""What one correction says, in canonical voxels: a click, a scribble or a lasso.

All of them have a ``label`` (1 object, 0 background), ``voxels`` (N, 3) that are in or out of the mask afterwards, and
``anchors`` (M, 3): the few points the slice decoder is prompted with. Order is (z, y, x).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from matplotlib.path import Path as Polygon
from scipy import ndimage

from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.strokes import Stroke, StrokeKind, flat_axis

MAX_ANCHORS = 6
_CORE = 0.5
"""Anchors of a lasso lie at least this share of its greatest depth inside it."""


@dataclass(frozen=True)
class CanonicalClick:
    """A click: ``position`` (z, y, x), ``label`` 1 object or 0 background."""

    position: tuple[float, float, float]
    label: int

    @property
    def z(self) -> int:
        """Nearest slice."""
        return round(self.position[0])

    @property
    def anchors(self) -> np.ndarray:
        """The clicked point (1, 3)."""
        return np.array([self.position])

    @property
    def voxels(self) -> np.ndarray:
        """The clicked voxel (1, 3)."""
        return np.rint(self.anchors).astype(int)

    @property
    def slices(self) -> list[int]:
        """The slice to decode."""
        return [self.z]


@dataclass(frozen=True)
class CanonicalStroke:
    """A scribble or lasso: ``line`` of voxels (z, y, x), well formed as :class:`medvl_sam2.strokes.Stroke` says."""

    kind: StrokeKind
    line: tuple[tuple[float, float, float], ...]
    label: int

    @classmethod
    def of(cls, stroke: Stroke, transform: CanonicalTransform) -> CanonicalStroke:
        """Take a stroke out of the stored frame."""
        points = transform.forward_points(stroke.points)
        return cls(stroke.kind, tuple((float(z), float(y), float(x)) for z, y, x in points), stroke.label)

    @cached_property
    def normal(self) -> int | None:
        """Axis across the plane the stroke lies in, None when it lies in none."""
        return flat_axis(np.array(self.line))

    @cached_property
    def voxels(self) -> np.ndarray:
        """A scribble's voxels along its line; a lasso's outline and all it encloses."""
        points = np.array(self.line)
        if self.kind is StrokeKind.SCRIBBLE:
            return _traced(points)
        assert self.normal is not None  # a lasso is flat
        return _filled(points, self.normal)

    @cached_property
    def anchors(self) -> np.ndarray:
        """Evenly along a scribble; spread over the core of a lasso, the deepest voxel first."""
        voxels = self.voxels
        if self.kind is StrokeKind.SCRIBBLE:
            steps = np.unique(np.linspace(0, len(voxels) - 1, MAX_ANCHORS + 2).round().astype(int))
            inner = steps[1:-1] if len(steps) > 2 else steps
            return voxels[inner].astype(np.float64)
        low = voxels.min(axis=0)
        solid = np.zeros(voxels.max(axis=0) - low + 1, dtype=bool)
        solid[tuple((voxels - low).T)] = True
        flat = np.squeeze(solid, axis=self.normal)
        depth = ndimage.distance_transform_edt(np.pad(flat, 1))[1:-1, 1:-1]
        deep = np.expand_dims(depth, self.normal or 0)[tuple((voxels - low).T)]
        return _spread_out(voxels[np.argsort(-deep, kind="stable")][: int((deep >= _CORE * deep.max()).sum())])

    @cached_property
    def slices(self) -> list[int]:
        """Slices to decode: those with anchors."""
        return sorted({round(float(z)) for z in self.anchors[:, 0]})


Edit = CanonicalClick | CanonicalStroke


def _traced(points: np.ndarray) -> np.ndarray:
    """Voxels (N, 3) along a line through ``points``, each once, in order; neighbours touch."""
    parts = [points[:1]]
    for start, end in pairwise(points):
        count = int(np.ceil(np.abs(end - start).max())) + 1
        parts.append(start + (end - start) * np.linspace(0, 1, count + 1)[1:, None])
    voxels = np.rint(np.concatenate(parts)).astype(int)
    _, first = np.unique(voxels, axis=0, return_index=True)
    return voxels[np.sort(first)]


def _filled(corners: np.ndarray, normal: int) -> np.ndarray:
    """Voxels (N, 3) on and inside a closed polygon in the plane across axis ``normal``."""
    outline = _traced(np.concatenate([corners, corners[:1]]))
    low, high = outline.min(axis=0), outline.max(axis=0)
    grid = np.stack(np.meshgrid(*(np.arange(a, b + 1) for a, b in zip(low, high, strict=True)), indexing="ij"), axis=-1)
    voxels = grid.reshape(-1, 3)
    polygon = Polygon(np.delete(corners, normal, axis=1))
    inside = voxels[polygon.contains_points(np.delete(voxels, normal, axis=1))]
    return np.unique(np.concatenate([inside, outline]), axis=0)


def _spread_out(candidates: np.ndarray) -> np.ndarray:
    """At most :data:`MAX_ANCHORS` of ``candidates`` (N, 3), the first one first, then always the farthest one."""
    chosen = [0]
    distance = np.full(len(candidates), np.inf)
    while len(chosen) < min(MAX_ANCHORS, len(candidates)):
        distance = np.minimum(distance, np.linalg.norm(candidates - candidates[chosen[-1]], axis=1))
        if distance.max() == 0:
            break
        chosen.append(int(np.argmax(distance)))
    return candidates[chosen].astype(np.float64)
