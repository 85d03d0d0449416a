"""Does a label follow edges of the image? A test that needs no model and no second annotator.

A true outline lies on edges: along it the image changes across the outline more than along the same outline moved
elsewhere nearby. The share of displaced copies that fit worse is the label's rank: close to 1 for true labels, anywhere
in [0, 1] for labels that were shifted, shuffled between patients, mirrored or painted at random. One structure alone
proves little; the mean over the structures of an annotator does. A wrong name on a right outline passes here: names
are compared with what the served model calls the place (see :mod:`medvl_sam2.training.finetune`).

Arrays are canonical (z, y, x) or stored (i, j, k): the test does not care, as long as image and mask agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from medvl_sam2.errors import DataError
from medvl_sam2.types import Modality, Volume

MIN_VOXELS = 50
"""Smaller structures have too little outline to judge."""
EXPECTED_MEAN = 0.78
"""Mean rank expected of true labels, before the allowance of :func:`suspicion`; chance is 0.5.

Measured on whole real CT and MR volumes of 9 to 61 structures: true labels 0.86 to 1.00, displaced ones 0.49 to 0.61,
mirrored ones 0.50 to 0.79. A mirror image of a nearly symmetric body can therefore pass; names and sides are the
business of the comparison with the served model."""
MIN_STRUCTURES = 4
"""Fewer judged structures give no verdict."""

_COPIES = 24
_CT_RANGE = (-300.0, 400.0)


@dataclass(frozen=True)
class Plausibility:
    """Mean rank over structures, and each structure's own rank in [0, 1] by name."""

    mean: float | None
    ranks: Mapping[str, float]


def edge_rank(image: np.ndarray, mask: np.ndarray, spacing: Sequence[float], modality: Modality) -> float | None:
    """Share of displaced copies of ``mask`` that follow edges of ``image`` worse than the mask itself.

    ``image`` and ``mask`` (bool) are 3D arrays of one shape, ``spacing`` mm along their axes. None when the structure
    is too small to judge or there is no room to move it.
    """
    if image.shape != mask.shape:
        raise DataError(f"label of shape {mask.shape} does not fit the image of shape {image.shape}")
    return _rank(_gradient(image, spacing, modality), mask, spacing)


def judge_labels(volume: Volume, masks: Mapping[str, np.ndarray]) -> Plausibility:
    """Ranks of the named masks (I, J, K) of one volume; structures that cannot be judged are left out."""
    gradient = _gradient(volume.array, volume.geometry.spacing, volume.modality)
    ranks = {}
    for name, mask in masks.items():
        if tuple(mask.shape) != volume.geometry.shape:
            raise DataError(f"label {name!r} of shape {mask.shape} does not fit the image {volume.geometry.shape}")
        rank = _rank(gradient, mask > 0, volume.geometry.spacing)
        if rank is not None:
            ranks[name] = rank
    return Plausibility(float(np.mean(list(ranks.values()))) if ranks else None, ranks)


def suspicion(judged: Sequence[Plausibility]) -> str | None:
    """Why a set of labels cannot be trusted, or None. The mean is over all structures of all its volumes.

    Fewer than :data:`MIN_STRUCTURES` give no verdict: a single true outline may well be faint (a tumour in muscle).
    """
    ranks = [rank for one in judged for rank in one.ranks.values()]
    if len(ranks) < MIN_STRUCTURES:
        return None
    mean = float(np.mean(ranks))
    # Few structures: chance alone moves the mean (uniform ranks have sigma 0.29), so less is demanded.
    limit = EXPECTED_MEAN - 0.29 / np.sqrt(len(ranks))
    if mean >= limit:
        return None
    return (
        f"outlines follow the image no better than displaced copies do (mean rank {mean:.2f} over {len(ranks)} "
        f"structures; chance is 0.50, at least {limit:.2f} is expected)"
    )


def _rank(gradient: np.ndarray, mask: np.ndarray, spacing: Sequence[float]) -> float | None:
    if int(mask.sum()) < MIN_VOXELS:
        return None
    points, normals = _outline(mask, spacing)
    own = _fit(gradient, points, normals)
    displaced = (_fit(gradient, points + shift, normals) for shift in _shifts(points))
    judged = [value for value in displaced if value is not None]
    if own is None or len(judged) < _COPIES // 3:
        return None
    return float(np.mean([(value < own) + 0.5 * (value == own) for value in judged]))


def _gradient(image: np.ndarray, spacing: Sequence[float], modality: Modality) -> np.ndarray:
    """Intensity change per mm (3, I, J, K), extremes clipped so that bone and metal do not decide alone."""
    values = np.asarray(image, dtype=np.float32)
    low, high = _CT_RANGE if modality is Modality.CT else np.percentile(values, (1.0, 99.0))
    return _slopes(ndimage.gaussian_filter(np.clip(values, low, max(high, low + 1e-6)), sigma=0.7), spacing)


def _slopes(values: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Change per mm along each axis (3, I, J, K); 0 along an axis of one voxel."""
    return np.stack(
        [
            np.gradient(values, step, axis=axis) if values.shape[axis] > 1 else np.zeros_like(values)
            for axis, step in enumerate(spacing)
        ]
    )


def _outline(mask: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Surface voxels (N, 3) and their unit normals (N, 3); the border of the volume is no surface."""
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    low = np.array([max(0, side.start - 2) for side in box])
    crop = mask[tuple(slice(int(start), side.stop + 2) for start, side in zip(low, box, strict=True))]
    surface = np.argwhere(crop & ~ndimage.binary_erosion(crop, border_value=1))
    slopes = _slopes(ndimage.gaussian_filter(crop.astype(np.float32), sigma=1.0), spacing)
    normals = slopes[:, *surface.T].T
    length = np.linalg.norm(normals, axis=1)
    keep = length > 1e-6
    return surface[keep] + low, normals[keep] / length[keep, None]


def _fit(gradient: np.ndarray, points: np.ndarray, normals: np.ndarray) -> float | None:
    """Mean absolute change across the outline; None when less than 60% of it lies inside the image."""
    shape = np.array(gradient.shape[1:])
    inside = ((points >= 0) & (points < shape)).all(axis=1)
    if len(points) == 0 or inside.mean() < 0.6:
        return None
    here = gradient[:, *points[inside].T]
    return float(np.abs((here.T * normals[inside]).sum(axis=1)).mean())


def _shifts(points: np.ndarray) -> np.ndarray:
    """Displacements (K, 3) voxels by 30-75% of the structure's extents along a random line; always the same draw."""
    extent = np.ptp(points, axis=0) + 1 if len(points) else np.ones(3)
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(_COPIES, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    reach = np.maximum(extent * rng.uniform(0.3, 0.75, size=(_COPIES, 1)), 3.0)
    return np.rint(directions * reach).astype(np.int64)
