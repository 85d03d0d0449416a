"""Smooth random fields on voxel grids, made cheaply from coarse control points.

A field is a cubic B-spline over random control values, evaluated separably with one small matrix an axis. The cost is
that of a matrix product, far below filtering white noise with a wide kernel.
"""

from __future__ import annotations

import numpy as np

_UNIT_SCALE = 0.479**-1.5
"""Mean squared weight of a cubic B-spline is 0.479 an axis; this brings unit control values back to unit spread."""


def spline_matrix(count: int, spacing: float, control: float, phase: float = 0.0) -> np.ndarray:
    """Weights (count, m) float32 that read a cubic B-spline with knots every ``control`` mm at ``count`` voxels."""
    position = np.arange(count, dtype=np.float64) * (spacing / control) + phase
    knot = np.floor(position).astype(np.int64)
    t = position - knot
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], axis=1) / 6
    matrix = np.zeros((count, int(knot[-1]) + 4), dtype=np.float32)
    rows = np.arange(count)
    for offset in range(4):
        matrix[rows, knot + offset] += weights[:, offset]
    return matrix


def smooth_field(
    rng: np.random.Generator, shape: tuple[int, ...], spacing: tuple[float, ...], control: float | tuple[float, ...]
) -> np.ndarray:
    """Random field (Z, Y, X) float32, about zero mean and unit spread, smooth over ``control`` mm (one or per axis)."""
    controls = (control,) * len(shape) if isinstance(control, (int, float)) else control
    matrices = [spline_matrix(n, s, c, float(rng.uniform())) for n, s, c in zip(shape, spacing, controls, strict=True)]
    field = rng.standard_normal([m.shape[1] for m in matrices], dtype=np.float32)
    for axis, matrix in enumerate(matrices):
        field = np.moveaxis(np.tensordot(matrix, field, axes=(1, axis)), 0, axis)
    return np.ascontiguousarray(field * np.float32(_UNIT_SCALE))


def smooth_displacement(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    amplitude: float,
    control: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three fields (Z, Y, X) of displacements in mm with standard deviation ``amplitude``, clipped at 2.5 of it."""
    parts = [np.clip(smooth_field(rng, shape, spacing, control), -2.5, 2.5) * np.float32(amplitude) for _ in range(3)]
    return parts[0], parts[1], parts[2]
