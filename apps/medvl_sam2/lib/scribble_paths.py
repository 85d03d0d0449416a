"""Painted scribbles as lines: the voxels a brush marked become strokes that run through exactly those voxels."""

from __future__ import annotations

from itertools import product

import numpy as np
from scipy import ndimage

from medvl_sam2.errors import PromptError
from medvl_sam2.strokes import MAX_STROKE_POINTS, Stroke, StrokeKind
from medvl_sam2.types import MAX_POINTS, MAX_STROKES

_AROUND = [step for step in product((-1, 0, 1), repeat=3) if any(step)]
MAX_VOXELS = 50_000
"""Painted voxels of one colour; more is a segmentation, not a scribble."""


def painted_strokes(painted: np.ndarray, label: int) -> tuple[list[np.ndarray], list[Stroke]]:
    """Points (3,) and strokes of the bool array ``painted`` (I, J, K), stored voxels; a lone voxel is a point.

    Raises:
        PromptError: more is painted than a scribble can be.
    """
    parts, count = ndimage.label(painted, np.ones((3, 3, 3)))
    if int(painted.sum()) > MAX_VOXELS or count > min(MAX_POINTS, MAX_STROKES):
        raise PromptError(
            f"{int(painted.sum())} painted voxels in {count} pieces; scribble with at most {MAX_VOXELS} voxels in "
            f"{MAX_STROKES} pieces"
        )
    points, strokes = [], []
    for number, region in enumerate(ndimage.find_objects(parts), start=1):
        start = np.array([part.start for part in region])
        path = _walk(parts[region] == number) + start
        if len(path) == 1:
            points.append(path[0])
        for first in range(0, len(path) - 1, MAX_STROKE_POINTS - 1):  # pieces of a long line share their ends
            strokes.append(Stroke(StrokeKind.SCRIBBLE, path[first : first + MAX_STROKE_POINTS], label))
    return points, strokes


def _walk(piece: np.ndarray) -> np.ndarray:
    """A way (N, 3) from voxel to touching voxel through all of a connected piece, going back where it has to."""
    left = {(i, j, k) for i, j, k in np.argwhere(piece).tolist()}
    start = min(left)
    left.remove(start)
    trail, way = [start], [start]
    while left:
        i, j, k = trail[-1]
        after = next((v for v in ((i + a, j + b, k + c) for a, b, c in _AROUND) if v in left), None)
        if after is None:
            trail.pop()
            way.append(trail[-1])
        else:
            left.remove(after)
            trail.append(after)
            way.append(after)
    return np.array(way, dtype=np.float64)
