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
    """A scribble or lasso, well formed as :class:`medvl_sam2.strokes.Stroke` says.

    ``line``: the bytes of float64 (N, 3), which compare and hash at no cost however long the line is.
    """

    kind: StrokeKind
    line: bytes
    label: int

    @classmethod
    def of(cls, stroke: Stroke, transform: CanonicalTransform) -> CanonicalStroke:
        """Take a stroke out of the stored frame."""
        return cls.through(stroke.kind, transform.forward_points(stroke.points), stroke.label)

    @classmethod
    def through(cls, kind: StrokeKind, points: np.ndarray, label: int) -> CanonicalStroke:
        """A stroke through canonical ``points`` (N, 3)."""
        return cls(kind, np.ascontiguousarray(points, dtype=np.float64).tobytes(), label)

    @property
    def points(self) -> np.ndarray:
        """The line's points (N, 3) as drawn."""
        return np.frombuffer(self.line).reshape(-1, 3)

    @cached_property
    def normal(self) -> int | None:
        """Axis across the plane the stroke lies in, None when it lies in none."""
        return flat_axis(self.points)

    @cached_property
    def voxels(self) -> np.ndarray:
        """A scribble's voxels along its line; a lasso's outline and all it encloses."""
        if self.kind is StrokeKind.SCRIBBLE:
            return _traced(self.points)
        assert self.normal is not None  # a lasso is flat
        return _filled(self.points, self.normal)

    @cached_property
    def anchors(self) -> np.ndarray:
        """One point a slice, on at most :data:`MAX_ANCHORS` slices evenly: more on a slice were measured to do harm.

        The middle of what a scribble has there, the deepest voxel of what a lasso has.
        """
        voxels = self.voxels
        depth = self._depth if self.kind is StrokeKind.LASSO else None
        slices = np.unique(voxels[:, 0])
        chosen = []
        for z in slices[evenly(len(slices), MAX_ANCHORS)]:
            own = np.flatnonzero(voxels[:, 0] == z)
            chosen.append(own[len(own) // 2] if depth is None else own[np.argmax(depth[own])])
        return voxels[chosen].astype(np.float64)

    @property
    def _depth(self) -> np.ndarray:
        """Distance (N,) of a lasso's voxels to its outline, in voxels of its plane."""
        assert self.normal is not None
        flat = np.delete(self.voxels - self.voxels.min(axis=0) + 1, self.normal, axis=1)
        solid = np.zeros(flat.max(axis=0) + 2, dtype=bool)
        solid[tuple(flat.T)] = True
        depth: np.ndarray = ndimage.distance_transform_edt(solid)[tuple(flat.T)]
        return depth

    @cached_property
    def slices(self) -> list[int]:
        """Slices to decode: those with anchors."""
        return sorted({round(float(z)) for z in self.anchors[:, 0]})


Edit = CanonicalClick | CanonicalStroke


def evenly(count: int, most: int) -> np.ndarray:
    """At most ``most`` of ``count`` places, evenly, away from the ends: one is the middle."""
    return np.unique(((np.arange(most) + 0.5) / most * count).astype(int))


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
