"""Surface Dice in double precision, equal to the last bit to the published reference on the same masks.

Rule: Nikolov et al., arXiv 1809.04430, with the areas of marching cubes for every 2x2x2 neighbourhood; the CVPR 2025
challenge scores by it. MONAI has the table and sums areas in single precision, which is off by about 1e-7.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

# Public there is only the table of areas, already rounded to single precision.
from monai.metrics.utils import ENCODING_KERNEL, _get_neighbour_code_to_normals_table
from scipy import ndimage

from medvl_sam2.errors import DataError


def surface_dice(
    truth: np.ndarray, prediction: np.ndarray, spacing: tuple[float, float, float], tolerance_mm: float = 2.0
) -> float | None:
    """Normalised surface Dice of bool (Z, Y, X) arrays at a tolerance in mm; ``spacing`` in mm along the axes.

    None when both are empty, 0 when one is.
    """
    if truth.shape != prediction.shape:
        raise DataError(f"prediction of shape {prediction.shape} does not fit the truth of shape {truth.shape}")
    truth, prediction = truth.astype(bool, copy=False), prediction.astype(bool, copy=False)
    if not truth.any() and not prediction.any():
        return None
    if not truth.any() or not prediction.any():
        return 0.0
    crop = _common_crop(truth, prediction)
    # Surface elements lie on voxel corners, one more than voxels along each axis.
    codes = [_codes(np.pad(mask[crop], (0, 1))) for mask in (truth, prediction)]
    borders = [(code != 0) & (code != 255) for code in codes]
    areas = _areas(spacing)
    near = total = 0.0
    for own, other in ((0, 1), (1, 0)):
        distance = ndimage.distance_transform_edt(~borders[other], sampling=spacing)[borders[own]]
        area = areas[codes[own][borders[own]]]
        # Sorted, because a sum of floats depends on its order and a score may not depend on that of the voxels.
        order = np.lexsort((area, distance))
        distance, area = distance[order], area[order]
        near += np.sum(area[distance <= tolerance_mm])
        total += np.sum(area)
    return float(near / total)


def _common_crop(truth: np.ndarray, prediction: np.ndarray) -> tuple[slice, ...]:
    """Smallest box round both masks."""
    both = truth | prediction
    spans = []
    for axis in range(both.ndim):
        hits = np.flatnonzero(both.any(axis=tuple(a for a in range(both.ndim) if a != axis)))
        spans.append(slice(int(hits[0]), int(hits[-1]) + 1))
    return tuple(spans)


def _codes(mask: np.ndarray) -> np.ndarray:
    """For every voxel corner the pattern, one bit a voxel, of the eight voxels that meet there."""
    return ndimage.correlate(mask.astype(np.uint8), np.array(ENCODING_KERNEL[3]), mode="constant", cval=0)


@lru_cache(maxsize=64)
def _areas(spacing: tuple[float, float, float]) -> np.ndarray:
    """Surface area in mm2 of each of the 256 patterns."""
    normals = _get_neighbour_code_to_normals_table().numpy().astype(np.float64)
    z, y, x = spacing
    scaled = np.stack([normals[..., 0] * y * x, normals[..., 1] * z * x, normals[..., 2] * z * y], axis=-1)
    return np.array([sum(np.linalg.norm(normal) for normal in pattern) for pattern in scaled])
