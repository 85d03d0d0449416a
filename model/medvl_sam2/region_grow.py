"""Masks from prompts and intensities alone, without a network.

Two uses: the always-available fallback (and first mask prompt) of the predictor, and the controls every click curve is
reported beside. All arrays are canonical (Z, Y, X); ``spacing`` is (sz, sy, sx) in mm; points are voxels (z, y, x).
"""

from __future__ import annotations

from dataclasses import dataclass

import cc3d
import edt
import numpy as np
from scipy import ndimage

MAD_TO_SIGMA = 1.4826
"""Median absolute deviation to standard deviation of a normal distribution."""


@dataclass(frozen=True)
class GrowRule:
    """How far intensities may differ and how the grown region is cleaned.

    ``k``: accepted distance from the core's median in robust standard deviations. ``floor``: smallest accepted distance
    as a share of the region's robust intensity range, for noise-free cores. ``blur_mm``: Gaussian smoothing before the
    comparison. ``vote_mm``: width of the majority vote that closes the pores noise leaves, before any morphology.
    ``open_mm``, ``close_mm``: radii of the morphology. ``edge_mm``: how far the found region may widen to reach the
    border half way to its surroundings.
    """

    k: float = 1.8
    floor: float = 0.05
    blur_mm: float = 1.0
    vote_mm: float = 1.5
    open_mm: float = 2.5
    close_mm: float = 5.0
    edge_mm: float = 2.0


DEFAULT_RULE = GrowRule()
Region = tuple[slice, slice, slice]


def bounding_region(
    low: np.ndarray, high: np.ndarray, shape: tuple[int, ...], margin: np.ndarray | float = 0
) -> Region:
    """Slices covering voxels ``low``..``high`` (inclusive) plus ``margin`` voxels, inside ``shape``."""
    start = np.clip(np.floor(low - margin).astype(int), 0, np.array(shape) - 1)
    stop = np.clip(np.ceil(high + margin).astype(int) + 1, start + 1, shape)
    return slice(start[0], stop[0]), slice(start[1], stop[1]), slice(start[2], stop[2])


def _offsets(shape: tuple[int, ...], center: np.ndarray, scale: np.ndarray) -> list[np.ndarray]:
    """Per axis the scaled distance from ``center``, shaped to broadcast over ``shape``."""
    axes = []
    for axis, size in enumerate(shape):
        line = np.abs((np.arange(size) - center[axis]) * scale[axis])
        axes.append(line.reshape([-1 if a == axis else 1 for a in range(3)]))
    return axes


def ball(shape: tuple[int, int, int], center: np.ndarray, radius_mm: float, spacing: tuple[float, ...]) -> np.ndarray:
    """Bool (Z, Y, X): voxels within ``radius_mm`` of ``center`` (z, y, x); always holds the centre voxel."""
    result = np.zeros(shape, dtype=bool)
    center = np.asarray(center, dtype=np.float64)
    reach = radius_mm / np.asarray(spacing)
    region = bounding_region(center - reach, center + reach, shape)
    local = center - np.array([s.start for s in region])
    size = tuple(s.stop - s.start for s in region)
    squares = [line**2 for line in _offsets(size, local, np.asarray(spacing))]
    result[region] = squares[0] + squares[1] + squares[2] <= radius_mm**2
    nearest = np.clip(np.rint(center).astype(int), 0, np.array(shape) - 1)
    result[tuple(nearest)] = True
    return result


def ellipsoid(shape: tuple[int, int, int], box: np.ndarray, scale: float = 1.0, power: float = 2.0) -> np.ndarray:
    """Bool (Z, Y, X): the ellipsoid inscribed in ``box`` (2, 3), inclusive corners, semi-axes times ``scale``.

    ``power`` above 2 bulges towards the box (superellipsoid |z|^p + |y|^p + |x|^p <= 1).
    """
    box = np.asarray(box, dtype=np.float64)
    center = box.mean(axis=0)
    half = (box[1] - box[0] + 1) / 2 * scale
    result = np.zeros(shape, dtype=bool)
    region = bounding_region(center - half, center + half, shape)
    local = center - np.array([s.start for s in region])
    size = tuple(s.stop - s.start for s in region)
    powers = [line**power for line in _offsets(size, local, 1 / half)]
    result[region] = powers[0] + powers[1] + powers[2] <= 1
    return result


def robust_center(values: np.ndarray) -> tuple[float, float]:
    """Median and robust standard deviation of intensities (1D, at least one)."""
    median = float(np.median(values))
    return median, float(np.median(np.abs(values - median))) * MAD_TO_SIGMA


def grow(
    image: np.ndarray,
    spacing: tuple[float, float, float],
    allowed: np.ndarray,
    core: np.ndarray,
    rule: GrowRule = DEFAULT_RULE,
) -> np.ndarray:
    """Region of the core's intensities: bool (Z, Y, X), a subset of ``allowed``, connected to ``core``.

    ``image`` (Z, Y, X) any intensity unit; ``allowed`` and ``core`` bool (Z, Y, X). Voxels of ``allowed`` whose
    smoothed intensity lies within ``rule`` of the core's median, opened, reduced to the components that touch the core,
    closed, and filled slice by slice. An empty core gives an empty region.
    """
    result = np.zeros(image.shape, dtype=bool)
    core = core & allowed
    if not core.any():
        return result
    where = np.argwhere(allowed)
    margin = np.ceil(max(rule.close_mm, 2 * rule.blur_mm) / np.asarray(spacing)) + 1
    region = bounding_region(where.min(0), where.max(0), image.shape, margin)
    local = np.asarray(image[region], dtype=np.float32)
    local_allowed, local_core = allowed[region], core[region]
    smooth = (
        ndimage.gaussian_filter(local, [rule.blur_mm / s for s in spacing], truncate=2.0) if rule.blur_mm else local
    )
    median, sigma = robust_center(smooth[local_core])
    low, high = np.percentile(smooth[local_allowed], (2, 98))
    limit = max(rule.k * sigma, rule.floor * float(high - low))
    similar = _majority((np.abs(smooth - median) <= limit) & local_allowed, spacing, rule.vote_mm) & local_allowed
    touching = _touching(_open(similar, rule.open_mm, spacing), local_core, similar)
    # The rest looks no farther than this around what touches the core, often a small part of what is allowed.
    where = np.argwhere(touching)
    margin = np.ceil(max(rule.close_mm, 3 * rule.edge_mm + max(spacing)) / np.asarray(spacing)) + 1
    near = bounding_region(where.min(0), where.max(0), touching.shape, margin)
    found = _fill(_close(touching[near], rule.close_mm, spacing)) & local_allowed[near]
    grown = np.zeros(touching.shape, dtype=bool)
    grown[near] = _reach_edge(found, smooth[near], local_allowed[near], median, spacing, rule.edge_mm)
    result[region] = grown
    return result


def _reach_edge(
    found: np.ndarray,
    smooth: np.ndarray,
    allowed: np.ndarray,
    median: float,
    spacing: tuple[float, ...],
    edge_mm: float,
) -> np.ndarray:
    """Widen a region by up to ``edge_mm`` to where intensities are half way to its surroundings.

    Voxels that share the border with another tissue lie between both intensities, so a narrow limit stops short of it.
    """
    if edge_mm <= 0 or not found.any() or found.all():
        return found
    distance = np.sqrt(_squared_distance(~found, spacing))
    shell = (distance > edge_mm) & (distance <= 3 * edge_mm + max(spacing))
    if not shell.any():
        return found
    half = abs(float(np.median(smooth[shell])) - median) / 2
    return found | ((distance <= max(edge_mm, min(spacing))) & allowed & (np.abs(smooth - median) < half))


def _majority(mask: np.ndarray, spacing: tuple[float, ...], width_mm: float) -> np.ndarray:
    """Voxels whose weighted neighbourhood is mostly in ``mask``; without it an opening eats a noisy region whole."""
    if width_mm <= 0:
        return mask
    return ndimage.gaussian_filter(mask.astype(np.float32), [width_mm / s for s in spacing], truncate=2.0) > 0.5


def _touching(opened: np.ndarray, core: np.ndarray, similar: np.ndarray) -> np.ndarray:
    """Components of ``opened`` that touch the core; of the unopened region where opening erased them."""
    for candidate in (opened, similar):
        labels = cc3d.connected_components(np.ascontiguousarray(candidate), connectivity=6)
        hit = np.unique(labels[core])
        hit = hit[hit > 0]
        if len(hit):
            return np.isin(labels, hit)
    return core


def _open(mask: np.ndarray, radius_mm: float, spacing: tuple[float, ...]) -> np.ndarray:
    """Morphological opening by a ball through two distance transforms; axes with coarser spacing are left alone."""
    if radius_mm <= 0 or mask.all() or not mask.any():
        return mask
    eroded = _squared_distance(mask, spacing) > radius_mm**2
    if not eroded.any():
        return mask
    return _squared_distance(~eroded, spacing) <= radius_mm**2


def _close(mask: np.ndarray, radius_mm: float, spacing: tuple[float, ...]) -> np.ndarray:
    """Morphological closing by a ball through two distance transforms."""
    if radius_mm <= 0 or mask.all() or not mask.any():
        return mask
    grown = _squared_distance(~mask, spacing) <= radius_mm**2
    if grown.all():
        return grown
    return (_squared_distance(grown, spacing) > radius_mm**2) | mask


def _squared_distance(mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Squared distance in mm² of every voxel of ``mask`` to the nearest one outside it (float32); 0 outside."""
    return edt.edtsq(np.ascontiguousarray(mask), anisotropy=tuple(spacing), black_border=False, parallel=1)


def _fill(mask: np.ndarray) -> np.ndarray:
    """Fill holes of every slice (tubes open at the ends have no hole in 3D)."""
    return np.stack([ndimage.binary_fill_holes(plane) if plane.any() else plane for plane in mask])
