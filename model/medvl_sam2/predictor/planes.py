"""Boxes drawn on one plane: they bound the object's outline there and say nothing about the axis across."""

from __future__ import annotations

import numpy as np
from scipy import ndimage


def thin_axis(box: np.ndarray, shape: tuple[int, ...]) -> int | None:
    """The axis across the plane that a canonical box (2, 3), inclusive corners, was drawn on; None for a 3D box.

    That is the only axis along which the box, as it was drawn, is one voxel thick where the volume (Z, Y, X) is
    thicker; a 3D box of which one slice lies in the volume is still a 3D box.
    """
    thick = np.rint(box[1]) - np.rint(box[0])
    thin = np.flatnonzero((thick == 0) & (np.array(shape) > 1))
    return int(thin[0]) if len(thin) == 1 else None


def thickened(box: np.ndarray, axis: int, shape: tuple[int, ...], spacing: tuple[float, float, float]) -> np.ndarray:
    """The box (2, 3) of a plane across ``axis``, as thick as its two edges are long in the mean, in mm."""
    edges = (box[1] - box[0] + 1) * np.asarray(spacing)
    half = np.zeros(3)
    half[axis] = np.delete(edges, axis).mean() / 2 / spacing[axis]
    return np.clip(np.rint(np.stack([box[0] - half, box[1] + half])), 0, np.array(shape) - 1)


def completed(box: np.ndarray, *masks: np.ndarray) -> np.ndarray:
    """A box (2, 3) of a plane along the slices, with the extent across it of the first mask that shows any.

    ``masks`` bool (Y, X) on the slice through the box's middle; the part that the box runs through counts.
    """
    low, high = np.rint(box[:, 1:]).astype(int)
    axis = int(np.argmin(high - low))
    line = (slice(low[0], high[0] + 1), slice(low[1], high[1] + 1))
    result = np.array(box, dtype=np.float64)
    for mask in masks:
        labels, _ = ndimage.label(mask, np.ones((3, 3)))
        own = np.isin(labels, np.setdiff1d(labels[line], [0]))
        shown = np.flatnonzero(own.any(axis=1 - axis))
        if len(shown):
            result[:, 1 + axis] = min(shown[0], low[axis]), max(shown[-1], high[axis])
            return result
    return result
