"""Implicit shapes in patient coordinates, evaluated only inside their bounding boxes.

Points are (z, y, x) in reference millimetres: ``z`` to Superior (0 at the transpyloric plane), ``y`` to Posterior
(0 in the middle of the trunk), ``x`` to the patient's Left (0 in the midline).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Region:
    """An implicit function sampled in a sub-box: ``value`` < 0 is inside. ``box`` slices the canvas arrays."""

    box: Box
    value: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """Bool array over ``box``."""
        return self.value < 0


class Canvas:
    """A tissue map (Z, Y, X) uint8 being painted, with the patient coordinates of every voxel.

    ``axes`` are the undeformed coordinates of the voxel centres along z, y, x; ``displacement`` (three arrays) is
    added to them, so shapes drawn here come out smoothly deformed. ``noises`` are unit smooth fields that roughen
    the borders.
    """

    def __init__(
        self,
        axes: tuple[np.ndarray, np.ndarray, np.ndarray],
        displacement: tuple[np.ndarray, np.ndarray, np.ndarray],
        noises: Sequence[np.ndarray],
    ) -> None:
        self.axes = axes
        self.z = displacement[0] + axes[0].astype(np.float32)[:, None, None]
        self.y = displacement[1] + axes[1].astype(np.float32)[None, :, None]
        self.x = displacement[2] + axes[2].astype(np.float32)[None, None, :]
        self.noises = tuple(noises)
        self.tissue = np.zeros(self.z.shape, dtype=np.uint8)
        self._margin = max(float(np.abs(d).max()) for d in displacement) + 1.0
        self._turn = 0

    def box(self, low: np.ndarray, high: np.ndarray) -> Box | None:
        """Slices of the voxels whose coordinates may fall in [low, high] (z, y, x), or None when there are none."""
        slices = []
        for axis, lo, hi in zip(self.axes, low, high, strict=True):
            start = int(np.searchsorted(axis, lo - self._margin))
            stop = int(np.searchsorted(axis, hi + self._margin, side="right"))
            if start >= stop:
                return None
            slices.append(slice(start, stop))
        return slices[0], slices[1], slices[2]

    def ellipsoid(
        self,
        centre: Sequence[float] | np.ndarray,
        radii: Sequence[float] | np.ndarray,
        tilt: tuple[float, float] = (0.0, 0.0),
        rough: float = 0.0,
        power: float = 2.0,
    ) -> Region | None:
        """Ellipsoid of ``radii`` (z, y, x) mm; ``tilt`` shears (dy/dz, dx/dz); ``rough`` border noise, relative."""
        c = np.asarray(centre, dtype=np.float32)
        r = np.asarray(radii, dtype=np.float32)
        grow = r * (1 + 2 * rough) + np.abs(np.array([0.0, tilt[0], tilt[1]])) * r[0]
        box = self.box(c - grow, c + grow)
        if box is None:
            return None
        dz = self.z[box] - c[0]
        dy = (self.y[box] - c[1] - np.float32(tilt[0]) * dz) / r[1]
        dx = (self.x[box] - c[2] - np.float32(tilt[1]) * dz) / r[2]
        dz = dz / r[0]
        if power == 2.0:
            value = np.sqrt(dz * dz + dy * dy + dx * dx) - 1
        else:
            total = np.abs(dz) ** power + np.abs(dy) ** power + np.abs(dx) ** power
            value = total ** np.float32(1 / power) - 1
        return Region(box, self._roughen(value, box, rough))

    def tube(self, points: np.ndarray, radii: np.ndarray, rough: float = 0.0, flat: float = 1.0) -> Region | None:
        """Tube along a polyline ``points`` (N, 3) with ``radii`` (N,) mm; value: about mm to the wall.

        ``flat`` > 1 flattens the tube along y. ``rough`` is border noise in mm.
        """
        points = np.asarray(points, dtype=np.float32)
        radii = np.asarray(radii, dtype=np.float32)
        reach = radii.max() + 2 * rough
        whole = self.box(points.min(0) - reach, points.max(0) + reach)
        if whole is None:
            return None
        value = np.full([s.stop - s.start for s in whole], 1e3, dtype=np.float32)
        for a, b, ra, rb in zip(points[:-1], points[1:], radii[:-1], radii[1:], strict=True):
            reach = max(ra, rb) + 2 * rough
            box = self.box(np.minimum(a, b) - reach, np.maximum(a, b) + reach)
            if box is None:
                continue
            d = b - a
            dz, dy, dx = self.z[box] - a[0], self.y[box] - a[1], self.x[box] - a[2]
            t = np.clip((dz * d[0] + dy * d[1] + dx * d[2]) * np.float32(1 / (float(d @ d) + 1e-6)), 0, 1)
            dz -= t * d[0]
            dy -= t * d[1]
            dx -= t * d[2]
            dy *= np.float32(flat)
            distance = np.sqrt(dz * dz + dy * dy + dx * dx) - (ra + t * (rb - ra))
            inner = tuple(slice(s.start - w.start, s.stop - w.start) for s, w in zip(box, whole, strict=True))
            np.minimum(value[inner], distance, out=value[inner])
        return Region(whole, self._roughen(value, whole, rough))

    def paint(self, region: Region | None, tissue: int, mask: np.ndarray | None = None) -> int:
        """Set ``tissue`` where the region (and ``mask`` over its box) is inside; returns the voxel count."""
        if region is None:
            return 0
        inside = region.mask if mask is None else region.mask & mask
        self.tissue[region.box][inside] = tissue
        return int(np.count_nonzero(inside))

    def _roughen(self, value: np.ndarray, box: Box, amplitude: float) -> np.ndarray:
        if amplitude <= 0:
            return value
        self._turn += 1
        noise = self.noises[self._turn % len(self.noises)][box]
        return value + np.float32(amplitude * (1 if self._turn % 2 else -1)) * noise


def smooth_path(control: Sequence[Sequence[float]], steps: int = 4) -> np.ndarray:
    """Catmull-Rom curve through ``control`` (N, k) with ``steps`` samples a span: (M, k)."""
    p = np.asarray(control, dtype=np.float64)
    p = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    t = np.linspace(0, 1, steps, endpoint=False)[None, :, None]
    a, b, c, d = (p[i : len(p) - 3 + i, None, :] for i in range(4))
    curve = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    return np.concatenate([curve.reshape(-1, p.shape[1]), p[-2:-1]])
