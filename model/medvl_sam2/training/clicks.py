"""Simulated annotator: boxes and corrective clicks by the CVPR 2025 interactive 3D protocol.

Rule of a click (CVPR-MedSegFM 2025 iterative evaluation): the largest 26-connected component, by voxel count, of the
disagreement between truth and prediction; inside it the voxel farthest from the component's surface, in voxel units
(spacing plays no part, as in the protocol; the border of the volume is a surface like any other); ties are drawn with
numpy's old generator, seeded anew for every click, as the protocol's script does; the click is foreground where the
truth says foreground. Positions equal those of the published script, its short cut for very large errors included.

The 2D functions apply the same rule to one slice (8-connected) and serve training.

Axis order is the caller's: (Z, Y, X) canonical voxels throughout this project.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import cc3d
import numpy as np
from scipy import ndimage

from medvl_sam2.errors import DataError

TIE_SEED = 42
"""Seed of the protocol's tie break, reset for every click."""
LARGE_CROP_VOXELS = 60_000_000
"""A component whose crop, with the protocol's margin, has more voxels is measured at half resolution."""


@dataclass(frozen=True)
class Click:
    """One click: ``position`` is a voxel (z, y, x), or (y, x) in 2D; ``label`` 1 foreground, 0 background."""

    position: tuple[int, ...]
    label: int


def next_click(
    truth: np.ndarray,
    prediction: np.ndarray | None,
    rng: np.random.Generator | None = None,
    core: float = 1.0,
) -> Click | None:
    """The next corrective click on a volume, or None when prediction and truth agree.

    ``truth`` and ``prediction`` are bool (Z, Y, X); a missing prediction counts as empty, so the first click lands at
    the deepest point of the object. ``core`` below 1 draws among the voxels at least that share of the deepest depth
    (training variety; pass ``rng``); 1 is the protocol.
    """
    if truth.ndim != 3:
        raise DataError(f"truth of shape {truth.shape} is not a volume; use next_click_2d for a slice")
    return _click(truth, prediction, 26, rng, core)


def next_click_2d(
    truth: np.ndarray,
    prediction: np.ndarray | None,
    rng: np.random.Generator | None = None,
    core: float = 1.0,
) -> Click | None:
    """The rule of :func:`next_click` on one slice: bool (Y, X) arrays, 8-connected, position (y, x)."""
    if truth.ndim != 2:
        raise DataError(f"truth of shape {truth.shape} is not a slice; use next_click for a volume")
    return _click(truth, prediction, 8, rng, core)


def box_prompt(truth: np.ndarray) -> np.ndarray:
    """3D box of an object bool (Z, Y, X): int (2, 3) lowest and highest voxel, both inclusive.

    The protocol's box: exact range of slices in z, and in plane the box of the middle labelled slice alone, so the
    object may leave it on other slices.
    """
    slices = np.flatnonzero(truth.any(axis=(1, 2)))
    if len(slices) == 0:
        raise DataError("no box can be drawn round an empty mask; choose a structure that is present")
    (y0, x0), (y1, x1) = box_prompt_2d(truth[middle_slice(truth)])
    return np.array([[slices[0], y0, x0], [slices[-1], y1, x1]], dtype=np.int64)


def middle_slice(truth: np.ndarray) -> int:
    """Index z of the middle one of the labelled slices of bool (Z, Y, X)."""
    slices = np.flatnonzero(truth.any(axis=(1, 2)))
    if len(slices) == 0:
        raise DataError("an empty mask has no middle slice; choose a structure that is present")
    return int(slices[len(slices) // 2])


def box_prompt_2d(truth: np.ndarray, rng: np.random.Generator | None = None, jitter: float = 0.0) -> np.ndarray:
    """Box of an object bool (Y, X): int (2, 2) lowest and highest pixel (y, x), inclusive.

    With ``rng`` every edge moves outwards or inwards by up to ``jitter`` of the box's edge length (training variety),
    inside the slice and never beyond the opposite edge.
    """
    if not truth.any():
        raise DataError("no box can be drawn round an empty slice; choose a slice with the structure")
    box = np.stack([_span(truth.any(axis=1 - axis)) for axis in (0, 1)], axis=1)
    if rng is not None and jitter > 0:
        edge = box[1] - box[0] + 1
        moved = box + np.rint(rng.uniform(-jitter, jitter, size=(2, 2)) * edge).astype(np.int64)
        box = np.sort(np.clip(moved, 0, np.array(truth.shape) - 1), axis=0)
    return box


def _span(line: np.ndarray) -> np.ndarray:
    """First and last true index of a bool line."""
    hits = np.flatnonzero(line)
    return np.array([hits[0], hits[-1]], dtype=np.int64)


def _click(
    truth: np.ndarray,
    prediction: np.ndarray | None,
    connectivity: Literal[8, 26],
    rng: np.random.Generator | None,
    core: float,
) -> Click | None:
    truth = truth.astype(bool, copy=False)
    if prediction is None:
        error = truth
    else:
        if prediction.shape != truth.shape:
            raise DataError(f"prediction of shape {prediction.shape} does not fit the truth of shape {truth.shape}")
        error = truth ^ prediction.astype(bool, copy=False)
    found = _largest_component(error, connectivity)
    if found is None:
        return None
    component, origin = found
    chosen = _deep_voxel(component, rng, core)
    position = tuple(int(c + o) for c, o in zip(chosen, origin, strict=True))
    return Click(position, int(truth[position]))


def _largest_component(error: np.ndarray, connectivity: Literal[8, 26]) -> tuple[np.ndarray, tuple[int, ...]] | None:
    """Largest component on its own crop, and the crop's origin.

    Only the crop reaches the distance transform: on 512 x 512 slices the transform of the whole grid costs more time
    than the network.
    """
    spans = []
    for axis in range(error.ndim):
        hits = np.flatnonzero(error.any(axis=tuple(a for a in range(error.ndim) if a != axis)))
        if len(hits) == 0:
            return None
        spans.append(slice(int(hits[0]), int(hits[-1]) + 1))
    labels = cc3d.connected_components(np.ascontiguousarray(error[tuple(spans)]), connectivity=connectivity)
    statistics = cc3d.statistics(labels)
    largest = int(np.argmax(statistics["voxel_counts"][1:])) + 1
    box = statistics["bounding_boxes"][largest]
    component = labels[tuple(box)] == largest
    return component, tuple(outer.start + int(inner.start) for outer, inner in zip(spans, box, strict=True))


def _deep_voxel(component: np.ndarray, rng: np.random.Generator | None, core: float) -> np.ndarray:
    """Index of a voxel of greatest depth (or of ``core`` of it) in a component on its own crop."""
    depth = _depth(component)
    candidates = np.argwhere(depth >= min(core, 1.0) * depth.max() - 1e-9) if core > 0 else np.argwhere(component)
    if rng is None:
        # The protocol's own draw: numpy.random.seed(42), then numpy.random.choice.
        return candidates[np.random.RandomState(TIE_SEED).choice(len(candidates))]
    return candidates[int(rng.integers(len(candidates)))]


def _depth(component: np.ndarray) -> np.ndarray:
    """Distance in voxels to the nearest one outside of a component on its own crop, 0 outside.

    Large crops as in the protocol: the maximum of blocks of 2x2x2 voxels, their distances, each repeated twice along
    every axis. Blocks start at the corner of the protocol's margin, a quarter of the crop.
    """
    margin = [max(int(size * 0.25), 1) for size in component.shape]
    padded = [size + 2 * more for size, more in zip(component.shape, margin, strict=True)]
    if component.ndim != 3 or math.prod(padded) <= LARGE_CROP_VOXELS:
        # One voxel of margin is enough: the nearest voxel outside lies no farther.
        return ndimage.distance_transform_edt(np.pad(component, 1))[(slice(1, -1),) * component.ndim]
    widths = [(more, more + size % 2) for more, size in zip(margin, padded, strict=True)]
    halves = [edge for size in padded for edge in ((size + 1) // 2, 2)]
    depth = ndimage.distance_transform_edt(np.pad(component, widths).reshape(halves).max(axis=(1, 3, 5)))
    for axis, (more, size) in enumerate(zip(margin, component.shape, strict=True)):
        depth = np.take(depth, np.arange(more, more + size) // 2, axis=axis)
    return depth * component
