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
SUSPECT_MEAN = 0.7
"""Mean rank below which a set of labels is suspect; chance is 0.5, see :func:`suspicion`."""

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
    if int(mask.sum()) < MIN_VOXELS:
        return None
    edges, normals = _outline(mask, spacing)
    gradient = _gradient(image, spacing, modality)
    own = _fit(gradient, edges, normals)
    displaced = [_fit(gradient, edges + shift, normals) for shift in _shifts(mask)]
    judged = [value for value in displaced if value is not None]
    if own is None or len(judged) < _COPIES // 3:
        return None
    return float(np.mean([(value < own) + 0.5 * (value == own) for value in judged]))


def judge_labels(volume: Volume, masks: Mapping[str, np.ndarray]) -> Plausibility:
    """Ranks of the named masks (I, J, K) of one volume."""
    ranks = {}
    for name, mask in masks.items():
        rank = edge_rank(volume.array, mask > 0, volume.geometry.spacing, volume.modality)
        if rank is not None:
            ranks[name] = rank
    return Plausibility(float(np.mean(list(ranks.values()))) if ranks else None, ranks)


def suspicion(judged: Sequence[Plausibility]) -> str | None:
    """Why a set of labels cannot be trusted, or None. The mean is over all structures of all its volumes."""
    ranks = [rank for one in judged for rank in one.ranks.values()]
    if not ranks:
        return None
    mean = float(np.mean(ranks))
    # With few structures chance alone moves the mean: allow for its spread (uniform ranks: sigma 0.29).
    limit = SUSPECT_MEAN - min(0.2, 0.29 / np.sqrt(len(ranks)) * 0.5)
    if mean >= limit:
        return None
    return (
        f"outlines follow the image no better than displaced copies do (mean rank {mean:.2f} over {len(ranks)} "
        f"structures, chance is 0.50, at least {limit:.2f} is expected); look at the labels before training on them"
    )


def _gradient(image: np.ndarray, spacing: Sequence[float], modality: Modality) -> np.ndarray:
    """Intensity change per mm (3, I, J, K), extremes clipped so that bone and metal do not decide alone."""
    values = np.asarray(image, dtype=np.float32)
    low, high = _CT_RANGE if modality is Modality.CT else np.percentile(values, (1.0, 99.0))
    smooth = ndimage.gaussian_filter(np.clip(values, low, max(high, low + 1e-6)), sigma=0.7)
    axes = [np.gradient(smooth, step, axis=axis) if smooth.shape[axis] > 1 else np.zeros_like(smooth)
            for axis, step in enumerate(spacing)]
    return np.stack(axes)


def _outline(mask: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Surface voxels (N, 3) and their unit normals (N, 3)."""
    solid = mask.astype(np.float32)
    surface = np.argwhere(mask & ~ndimage.binary_erosion(mask, border_value=1))
    smooth = ndimage.gaussian_filter(solid, sigma=1.0)
    axes = [np.gradient(smooth, step, axis=axis) if mask.shape[axis] > 1 else np.zeros_like(smooth)
            for axis, step in enumerate(spacing)]
    normals = np.stack([axis[tuple(surface.T)] for axis in axes], axis=1)
    length = np.linalg.norm(normals, axis=1)
    keep = length > 1e-6
    return surface[keep], normals[keep] / length[keep, None]


def _fit(gradient: np.ndarray, points: np.ndarray, normals: np.ndarray) -> float | None:
    """Mean absolute change across the outline; None when less than 60% of it lies inside the image."""
    shape = np.array(gradient.shape[1:])
    inside = ((points >= 0) & (points < shape)).all(axis=1)
    if len(points) == 0 or inside.mean() < 0.6:
        return None
    here = gradient[:, *points[inside].T]
    return float(np.abs((here.T * normals[inside]).sum(axis=1)).mean())


def _shifts(mask: np.ndarray) -> np.ndarray:
    """Displacements (K, 3) voxels by 20-50% of the structure's extents, at least 2 voxels; always the same draw."""
    where = np.argwhere(mask)
    extent = where.max(axis=0) - where.min(axis=0) + 1
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(_COPIES, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    reach = np.maximum(extent * rng.uniform(0.2, 0.5, size=(_COPIES, 1)), 2.0)
    return np.rint(directions * reach * 1.5).astype(np.int64)
