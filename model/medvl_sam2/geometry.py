"""Frame changes: stored voxels to canonical voxels, canonical slices to model pixels, one grid to another.

Nothing here looks at intensities. Frames are defined in :mod:`medvl_sam2.types`. Voxel and pixel indices are centres:
voxel ``v`` of a row of ``n`` covers ``[v - 0.5, v + 0.5]``, and model pixel ``p`` covers ``[p - 0.5, p + 0.5]``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional
from scipy import ndimage

from medvl_sam2.errors import GeometryError
from medvl_sam2.types import Geometry

# World direction (RAS+) towards which the canonical axes (z, y, x) grow: Superior, Posterior, Left.
_WORLD_AXIS = (2, 1, 0)
_WORLD_SIGN = (1.0, -1.0, -1.0)
_POOL_ABOVE = 1.5  # voxels per model pixel above which bilinear sampling alone would alias


class CanonicalTransform:
    """Stored voxel (i, j, k) to canonical voxel (z, y, x): an axis permutation and flips, never a resampling.

    An oblique grid gets the assignment whose axes lie nearest to Superior, Posterior and Left in sum, each stored
    axis used once.
    """

    def __init__(self, geometry: Geometry) -> None:
        """Choose the axes of ``geometry``."""
        self.geometry = geometry
        columns = geometry.affine[:3, :3]
        cosines = columns / np.linalg.norm(columns, axis=0)
        self._axes: tuple[int, ...] = max(
            itertools.permutations(range(3)),
            key=lambda axes: sum(abs(cosines[world, axis]) for world, axis in zip(_WORLD_AXIS, axes, strict=True)),
        )
        self._flips = tuple(
            bool(cosines[world, axis] * sign < 0)
            for world, sign, axis in zip(_WORLD_AXIS, _WORLD_SIGN, self._axes, strict=True)
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Canonical shape (Z, Y, X)."""
        z, y, x = (self.geometry.shape[axis] for axis in self._axes)
        return z, y, x

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel edges in mm along (z, y, x)."""
        z, y, x = (self.geometry.spacing[axis] for axis in self._axes)
        return z, y, x

    @property
    def canonical_geometry(self) -> Geometry:
        """The same grid seen as a (Z, Y, X) array: its affine takes canonical voxels to RAS+ mm."""
        to_stored = np.eye(4)
        to_stored[:3, :3] = 0.0
        for canonical, (axis, flip) in enumerate(zip(self._axes, self._flips, strict=True)):
            to_stored[axis, canonical] = -1.0 if flip else 1.0
            to_stored[axis, 3] = self.geometry.shape[axis] - 1.0 if flip else 0.0
        return Geometry(self.shape, self.geometry.affine @ to_stored)

    def forward_array(self, stored: np.ndarray) -> np.ndarray:
        """Stored (..., I, J, K) to canonical (..., Z, Y, X), a view (negative strides where an axis is flipped).

        Raises :class:`GeometryError` when the last three sizes are not the grid's. Inverse: :meth:`inverse_array`.
        """
        self._require(stored.shape, self.geometry.shape, "stored")
        lead = stored.ndim - 3
        turned = stored.transpose(*range(lead), *(lead + axis for axis in self._axes))
        z, y, x = self._flip_index()
        return turned[..., z, y, x]

    def inverse_array(self, canonical: np.ndarray) -> np.ndarray:
        """Canonical (..., Z, Y, X) back to stored (..., I, J, K), a view."""
        self._require(canonical.shape, self.shape, "canonical")
        lead = canonical.ndim - 3
        z, y, x = self._flip_index()
        back = np.argsort(self._axes)
        return canonical[..., z, y, x].transpose(*range(lead), *(lead + int(axis) for axis in back))

    def forward_points(self, ijk: np.ndarray) -> np.ndarray:
        """Stored voxels (N, 3) to canonical voxels (N, 3) as (z, y, x), float, exact for whole indices."""
        points = np.asarray(ijk, dtype=np.float64).reshape(-1, 3)[:, list(self._axes)]
        last = np.asarray(self.shape, dtype=np.float64) - 1.0
        return np.where(self._flips, last - points, points)

    def inverse_points(self, zyx: np.ndarray) -> np.ndarray:
        """Canonical voxels (N, 3) back to stored voxels (N, 3) as (i, j, k)."""
        points = np.asarray(zyx, dtype=np.float64).reshape(-1, 3)
        last = np.asarray(self.shape, dtype=np.float64) - 1.0
        return np.where(self._flips, last - points, points)[:, np.argsort(self._axes)]

    def forward_box(self, box: np.ndarray) -> np.ndarray:
        """Stored corners (2, 3), both inclusive, to canonical corners (2, 3), lowest first."""
        return np.sort(self.forward_points(box), axis=0)

    def inverse_box(self, box: np.ndarray) -> np.ndarray:
        """Canonical corners (2, 3) back to stored corners (2, 3), lowest first."""
        return np.sort(self.inverse_points(box), axis=0)

    def forward_plane(self, axis: int, index: int) -> tuple[int, int]:
        """Plane ``index`` of stored axis ``axis`` (i, j, k are 0, 1, 2) as canonical axis (z, y, x) and index."""
        canonical = self._axes.index(axis)
        return canonical, self.shape[canonical] - 1 - index if self._flips[canonical] else index

    def inverse_plane(self, axis: int, index: int) -> tuple[int, int]:
        """Plane ``index`` of canonical axis ``axis`` as stored axis and index."""
        return self._axes[axis], self.shape[axis] - 1 - index if self._flips[axis] else index

    def _flip_index(self) -> tuple[slice, ...]:
        return tuple(slice(None, None, -1) if flip else slice(None) for flip in self._flips)

    @staticmethod
    def _require(shape: tuple[int, ...], expected: tuple[int, int, int], frame: str) -> None:
        if tuple(shape[-3:]) != expected:
            raise GeometryError(f"array of shape {tuple(shape)} is not on the {frame} grid {expected}")


@dataclass(frozen=True)
class SliceCrop:
    """A square in-plane window of canonical slices, seen as ``size`` x ``size`` model pixels.

    ``center_mm`` (y, x) is canonical voxel index times spacing, ``extent_mm`` the edge of the window,
    ``spacing_yx`` the in-plane voxel edges in mm. Square pixels in mm, whatever the voxels are.
    """

    center_mm: tuple[float, float]
    extent_mm: float
    size: int
    spacing_yx: tuple[float, float]

    def __post_init__(self) -> None:
        """Refuse an impossible window with :class:`GeometryError`."""
        numbers = (*self.center_mm, self.extent_mm, *self.spacing_yx)
        if not all(math.isfinite(n) for n in numbers) or min(self.extent_mm, self.size, *self.spacing_yx) <= 0:
            raise GeometryError(f"{self} is not a window; extent, size and spacing must be positive and finite")

    @classmethod
    def around(
        cls,
        box_yx: np.ndarray | Sequence[Sequence[float]],
        spacing_yx: tuple[float, float],
        factor: float,
        size: int,
        min_extent_mm: float,
    ) -> SliceCrop:
        """Window centred on ``box_yx`` (2, 2), lowest and highest voxel (y, x) inclusive.

        Its edge is ``factor`` times the longer box edge in mm, at least ``min_extent_mm``.
        """
        low, high = np.sort(np.asarray(box_yx, dtype=np.float64), axis=0)
        spacing = np.asarray(spacing_yx, dtype=np.float64)
        center = (low + high) / 2.0 * spacing
        edge = float(((high - low + 1.0) * spacing).max())
        pair = (float(spacing[0]), float(spacing[1]))
        return cls((float(center[0]), float(center[1])), max(edge * factor, min_extent_mm), size, pair)

    @classmethod
    def whole(
        cls, shape_yx: tuple[int, int], spacing_yx: tuple[float, float], size: int, min_mm_per_px: float = 0.0
    ) -> SliceCrop:
        """Window over the whole slice (Y, X); pixels are at least ``min_mm_per_px`` wide so a patch is not blown up."""
        center = ((shape_yx[0] - 1) / 2.0 * spacing_yx[0], (shape_yx[1] - 1) / 2.0 * spacing_yx[1])
        edge = max(shape_yx[0] * spacing_yx[0], shape_yx[1] * spacing_yx[1], size * min_mm_per_px)
        return cls(center, float(edge), size, (float(spacing_yx[0]), float(spacing_yx[1])))

    @property
    def mm_per_px(self) -> float:
        """Edge of one model pixel in mm."""
        return self.extent_mm / self.size

    def forward_points(self, yx: np.ndarray) -> np.ndarray:
        """Canonical voxels (N, 2) as (y, x) to model pixels (N, 2) as **(x, y)**, float, not clipped to the window.

        The order is what a SAM prompt encoder takes. Inverse: :meth:`inverse_points`.
        """
        mm = np.asarray(yx, dtype=np.float64).reshape(-1, 2) * np.asarray(self.spacing_yx)
        pixels = (mm - np.asarray(self.center_mm)) / self.mm_per_px + (self.size - 1) / 2.0
        return pixels[:, ::-1].copy()

    def inverse_points(self, xy: np.ndarray) -> np.ndarray:
        """Model pixels (N, 2) as (x, y) back to canonical voxels (N, 2) as (y, x), float."""
        pixels = np.asarray(xy, dtype=np.float64).reshape(-1, 2)[:, ::-1]
        mm = (pixels - (self.size - 1) / 2.0) * self.mm_per_px + np.asarray(self.center_mm)
        return mm / np.asarray(self.spacing_yx)

    def bounds(self, shape_yx: tuple[int, int]) -> tuple[int, int, int, int]:
        """Rectangle ``(y0, y1, x0, x1)``, ends exclusive, of the voxels whose centre lies in the window.

        Empty (``y0 == y1`` or ``x0 == x1``) when window and slice do not meet.
        """
        (y0, y1), (x0, x1) = self._range(0, shape_yx[0]), self._range(1, shape_yx[1])
        return y0, y1, x0, x1

    def sample(self, slices: torch.Tensor, mode: str = "bilinear", pad: float = 0.0) -> torch.Tensor:
        """Canonical slices (N, C, Y, X) or (N, Y, X) to model pixels (N, C, size, size) float32 (C = 1 for the latter).

        ``pad`` fills the part of the window beyond the slice. ``bilinear`` averages voxels first when a model pixel
        spans more than 1.5 of them; ``nearest`` never mixes values (label maps).
        """
        if slices.ndim == 3:
            slices = slices[:, None]
        if slices.ndim != 4:
            raise GeometryError(f"slices of shape {tuple(slices.shape)} must be (N, C, Y, X) or (N, Y, X)")
        shape = (int(slices.shape[2]), int(slices.shape[3]))
        pools = [self._pool(axis) if mode == "bilinear" else 1 for axis in (0, 1)]
        (y0, y1), (x0, x1) = (self._range(axis, shape[axis], pools[axis] + 1) for axis in (0, 1))
        if y0 >= y1 or x0 >= x1:
            return slices.new_full((*slices.shape[:2], self.size, self.size), pad, dtype=torch.float32)
        region = slices[:, :, y0:y1, x0:x1].to(torch.float32)
        if pad:
            region = region - pad
        if max(pools) > 1:
            region = functional.avg_pool2d(region, pools, ceil_mode=True, count_include_pad=False)
        rows = []
        for axis, start in ((0, y0), (1, x0)):
            step = self.mm_per_px / self.spacing_yx[axis]
            first = self.center_mm[axis] / self.spacing_yx[axis] - (self.size - 1) / 2.0 * step
            pool = pools[axis]
            rows.append(((first - start - (pool - 1) / 2.0) / pool, step / pool))
        grid = _grid(rows, (self.size, self.size), (region.shape[2], region.shape[3]), region)
        out = functional.grid_sample(region, grid, mode=mode, padding_mode="zeros", align_corners=False)
        return out + pad if pad else out

    def paste_region(
        self, logits: torch.Tensor, out_shape: tuple[int, int]
    ) -> tuple[torch.Tensor, tuple[int, int, int, int]]:
        """Window values (N, h, w) or (N, 1, h, w) on the canonical slice grid, only where the window covers it.

        ``h`` and ``w`` may be lower than ``size``: the same window on coarser pixels. Returns float32 values
        (N, y1 - y0, x1 - x0) and :meth:`bounds`.
        """
        if logits.ndim == 4 and logits.shape[1] == 1:
            logits = logits[:, 0]
        if logits.ndim != 3:
            raise GeometryError(f"logits of shape {tuple(logits.shape)} must be (N, h, w) or (N, 1, h, w)")
        y0, y1, x0, x1 = self.bounds(out_shape)
        target = (y1 - y0, x1 - x0)
        if min(target) == 0:
            return logits.new_zeros((logits.shape[0], *target), dtype=torch.float32), (y0, y1, x0, x1)
        source = (int(logits.shape[1]), int(logits.shape[2]))
        rows = []
        for axis, start in ((0, y0), (1, x0)):
            step = self.spacing_yx[axis] / (self.extent_mm / source[axis])
            center = self.center_mm[axis] / self.spacing_yx[axis]
            rows.append(((start - center) * step + (source[axis] - 1) / 2.0, step))
        values = logits[None].to(torch.float32)  # the slices ride as channels: one grid serves them all
        grid = _grid(rows, target, source, values)
        out = functional.grid_sample(values, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return out[0], (y0, y1, x0, x1)

    def paste(self, logits: torch.Tensor, out_shape: tuple[int, int], outside: float) -> torch.Tensor:
        """Like :meth:`paste_region` on the full slice: (N, Y, X) float32, ``outside`` beyond the window."""
        values, (y0, y1, x0, x1) = self.paste_region(logits, out_shape)
        out = values.new_full((values.shape[0], *out_shape), outside)
        out[:, y0:y1, x0:x1] = values
        return out

    def _pool(self, axis: int) -> int:
        step = self.mm_per_px / self.spacing_yx[axis]
        return int(step + 0.5) if step > _POOL_ABOVE else 1

    def _range(self, axis: int, count: int, margin: int = 0) -> tuple[int, int]:
        """Voxels of one axis inside the window, ends clipped to the slice; ``margin`` more on both sides."""
        low = (self.center_mm[axis] - self.extent_mm / 2.0) / self.spacing_yx[axis]
        high = (self.center_mm[axis] + self.extent_mm / 2.0) / self.spacing_yx[axis]
        start = min(max(math.ceil(low - 1e-6) - margin, 0), count)
        return start, max(start, min(math.floor(high + 1e-6) + 1 + margin, count))


def _grid(
    rows: Sequence[tuple[float, float]], target: tuple[int, int], source: tuple[int, int], like: torch.Tensor
) -> torch.Tensor:
    """Sampling grid (N, h, w, 2): output index ``t`` of an axis reads source index ``first + step * t``."""
    theta = torch.zeros(2, 3, dtype=torch.float64)
    for axis, (first, step) in enumerate(rows):
        # With align_corners=False index u of n sits at (2u + 1) / n - 1, on both sides of the map.
        middle = first + step * (target[axis] - 1) / 2.0
        theta[1 - axis, 1 - axis] = step * target[axis] / source[axis]
        theta[1 - axis, 2] = (2.0 * middle + 1.0) / source[axis] - 1.0
    grid = functional.affine_grid(theta[None].to(like), [1, 1, *target], align_corners=False)
    return grid.expand(like.shape[0], -1, -1, -1)


def resample_to(array: np.ndarray, from_geometry: Geometry, to_geometry: Geometry, nearest: bool = True) -> np.ndarray:
    """Place ``array`` (I, J, K) of one grid on another by their affines; 0 where the first grid does not reach.

    ``nearest`` keeps the dtype and never invents a label; otherwise trilinear float32.
    """
    if tuple(array.shape) != from_geometry.shape:
        raise GeometryError(f"array of shape {array.shape} is not on its grid {from_geometry.shape}")
    if from_geometry.matches(to_geometry):
        return array.copy() if nearest else array.astype(np.float32)
    matrix = np.linalg.inv(from_geometry.affine) @ to_geometry.affine
    source = array.astype(np.uint8) if array.dtype == np.bool_ else array
    source = source if nearest else source.astype(np.float32)
    # grid-constant: half a voxel beyond the last centre still belongs to the grid.
    placed = ndimage.affine_transform(
        source, matrix[:3, :3], matrix[:3, 3], to_geometry.shape, order=0 if nearest else 1, mode="grid-constant"
    )
    return placed.astype(array.dtype if nearest else np.float32, copy=False)


def global_view(volume: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
    """Canonical volume (Z, Y, X) resized to ``size`` (D, H, W): (1, D, H, W) float32.

    Axes that shrink are averaged (no aliasing), axes that grow are interpolated linearly.
    """
    if volume.ndim != 3:
        raise GeometryError(f"volume of shape {tuple(volume.shape)} must be (Z, Y, X)")
    view = volume[None, None].to(torch.float32)
    shrunk = [min(have, want) for have, want in zip(volume.shape, size, strict=True)]
    if shrunk != list(volume.shape):
        view = functional.adaptive_avg_pool3d(view, (shrunk[0], shrunk[1], shrunk[2]))
    if shrunk != list(size):
        view = functional.interpolate(view, size=size, mode="trilinear", align_corners=False)
    return view[0]
