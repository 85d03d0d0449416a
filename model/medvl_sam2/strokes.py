"""What an annotator draws rather than clicks, and the planes they are done with. All coordinates are stored voxels."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from medvl_sam2.errors import PromptError

MAX_STROKE_POINTS = 10_000
"""Voxels of one scribble: a line through every voxel of the longest way across a large volume has fewer."""
MAX_CORNERS = 1_000
"""Corners of one lasso, whose edges are all compared with each other."""
_BLOCK = 256


class StrokeKind(StrEnum):
    """A scribble marks the voxels under its line, a lasso all that it encloses."""

    SCRIBBLE = "scribble"
    LASSO = "lasso"


@dataclass(frozen=True, eq=False)
class Stroke:
    """A line ``points`` (N, 3) through stored voxels (i, j, k); ``label`` 1: object, 0: background.

    A scribble runs anywhere, in a plane or freely. A lasso is closed (its end is joined to its start) and lies in one
    plane of the stored grid; what it encloses is filled in or cut out.
    """

    kind: StrokeKind
    points: np.ndarray
    label: int = 1

    def well_formed(self) -> Stroke:
        """Return self with points as float (N, 3), or raise :class:`PromptError` for what is wrong in any volume."""
        most = most_points(self.kind)
        if len(self.points) > most:
            raise PromptError(
                f"{self.kind} has {len(self.points)} points; give at most {most}, every second one will do"
            )
        points = np.asarray(self.points, dtype=np.float64)
        if points.ndim != 2 or points.shape[1] != 3:
            raise PromptError(f"{self.kind} of shape {points.shape} must be voxels (N, 3)")
        if not np.isfinite(points).all():
            raise PromptError(f"{self.kind} has a point that is not finite; give voxel numbers")
        if self.label not in (0, 1):
            raise PromptError(f"{self.kind} label {self.label!r} must be 1 (object) or 0 (background)")
        if self.kind is StrokeKind.SCRIBBLE:
            if len(np.unique(np.rint(points), axis=0)) < 2:
                raise PromptError("a scribble of one voxel is a point; give it as one, or draw at least two voxels")
        else:
            axis = _check_lasso(points)
            points = points.copy()
            points[:, axis] = np.rint(points[0, axis])  # half voxels are rounded here, before an axis may be flipped
        return Stroke(self.kind, points, int(self.label))

    def within(self, shape: tuple[int, int, int]) -> Stroke:
        """Return self, well formed, or raise :class:`PromptError` when it leaves a volume of ``shape`` (I, J, K)."""
        upper = np.asarray(shape, dtype=np.float64) - 0.5
        outside = np.flatnonzero(((self.points < -0.5) | (self.points > upper)).any(axis=1))
        if len(outside):
            worst = self.points[outside[0]].tolist()
            raise PromptError(f"{self.kind} point {worst} lies outside the volume of {shape} voxels (index from 0)")
        return self


@dataclass(frozen=True)
class Plane:
    """All voxels with ``index`` on stored axis ``axis``: 0, 1, 2 for i, j, k."""

    axis: int
    index: int

    def within(self, shape: tuple[int, int, int]) -> Plane:
        """Return self, or raise :class:`PromptError` when the volume has no such plane."""
        if self.axis not in (0, 1, 2) or not 0 <= self.index < shape[self.axis]:
            raise PromptError(f"the volume of {shape} voxels has no plane {self.index} on axis {self.axis}")
        return self


def most_points(kind: StrokeKind) -> int:
    """How many points one stroke may have."""
    return MAX_CORNERS if kind is StrokeKind.LASSO else MAX_STROKE_POINTS


def flat_axis(points: np.ndarray) -> int | None:
    """The axis on which all ``points`` (N, 3) share one voxel index; None where they do not lie in a plane."""
    spread = np.ptp(np.rint(points), axis=0)
    return int(np.argmin(spread)) if spread.min() == 0 else None


def _check_lasso(points: np.ndarray) -> int:
    """The axis across a lasso's plane; raises unless ``points`` are a polygon with an area and no crossing edges."""
    axis = flat_axis(points)
    if axis is None:
        raise PromptError("the lasso leaves its plane; all its corners must share one voxel index on i, j or k")
    corners = np.delete(points, axis, axis=1)
    corners = corners[(corners != np.roll(corners, 1, axis=0)).any(axis=1)]  # a last corner may repeat the first
    if len(corners) < 3:
        raise PromptError(f"a lasso needs at least three different corners, got {len(corners)}")
    after = np.roll(corners, -1, axis=0)
    for first in range(0, len(corners), _BLOCK):
        rows = slice(first, first + _BLOCK)
        a, b = corners[rows, None], after[rows, None]
        c, d = corners[None], after[None]
        sides = (_side(a, b, c) * _side(a, b, d) < 0) & (_side(c, d, a) * _side(c, d, b) < 0)
        if sides.any():
            crossing = corners[first + int(np.argwhere(sides)[0, 0])].tolist()
            raise PromptError(f"the lasso crosses itself near {crossing}; draw a simple outline")
    if abs(float(_cross(corners, after).sum())) < 1e-9:
        raise PromptError("the lasso encloses no area; draw it round something")
    return axis


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray(a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0])


def _side(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """On which side of the line from ``a`` to ``b`` the point ``c`` lies: the sign."""
    return np.sign(_cross(b - a, c - a))
