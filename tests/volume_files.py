"""Volumes, oblique grids and an independent reading of ITK geometry, for tests of file reading."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk

SHAPE = (6, 9, 5)


def turned(first: float = 20.0, second: float = -13.0) -> np.ndarray:
    """An oblique rotation (3, 3)."""
    a, b = np.radians([first, second])
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    return about_x @ about_z


def hounsfield(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1200, shape).astype(np.int16)


def itk_affine(image: sitk.Image) -> np.ndarray:
    """RAS+ affine, built from ITK point transforms rather than from its header fields."""
    origin = np.array(image.TransformIndexToPhysicalPoint((0, 0, 0)))
    out = np.eye(4)
    for axis in range(3):
        index = [0, 0, 0]
        index[axis] = 1
        out[:3, axis] = np.array(image.TransformContinuousIndexToPhysicalPoint(index)) - origin
    out[:3, 3] = origin
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ out
