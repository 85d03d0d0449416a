"""Where the scene's map says things are: its elements on slices and in windows, and the element a prompt means."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from medvl_sam2.geometry import SliceCrop
from medvl_sam2.modeling.scene_pointer import SceneElements

_NEIGHBOURS = np.ones((3, 3, 3), dtype=bool)
OUTSIDE_VOLUME = -8.0
"""Logit of what lies beyond the volume."""


@dataclass(frozen=True, eq=False)
class Part:
    """What is meant of an element: bool cells ``found`` (d, h, w) and its map ``place`` (d, h, w) as logits.

    ``fit``: how well it fills the box that was drawn round it, 0 to 1; 0 where there was none.
    """

    found: np.ndarray
    place: Tensor
    fit: float = 0.0

    def box(self, shape: tuple[int, ...]) -> np.ndarray:
        """Canonical box (2, 3), inclusive corners, of the voxels of a volume (Z, Y, X) that the part covers."""
        cells = np.argwhere(self.found)
        scale = np.array(shape) / np.array(self.found.shape)
        low, high = cells.min(axis=0) * scale, (cells.max(axis=0) + 1) * scale - 1
        return np.stack([np.floor(low), np.minimum(np.ceil(high), np.array(shape) - 1)])


@dataclass(frozen=True)
class MatchRule:
    """When a prompt is taken to mean an element of the scene.

    ``inside``: least share of a piece of the element that a box holds; ``filled``: least share of each box edge that
    the element spans there; ``certain``: least probability at a click; ``agreement``: least Dice on the prompted slice
    between the element and what the slice decoder makes of the prompt; ``clear``: a box that fits this well needs no
    agreement. ``piece``: smaller pieces, as a share of the largest, are specks; ``solid``: least share of the box that
    the element fills.
    """

    inside: float = 0.75
    filled: float = 0.6
    certain: float = 0.6
    agreement: float = 0.5
    clear: float = 0.7
    piece: float = 0.1
    solid: float = 0.03


def place_on_slices(
    place: Tensor, crop: SliceCrop, size: int, slices: list[int] | np.ndarray, shape: tuple[int, ...]
) -> Tensor:
    """Maps (K, d, h, w) that span a canonical volume (Z, Y, X) of ``shape``, seen through a window.

    Returns (K, n, size, size) on ``slices``; ``size`` pixels may be coarser than the window's own.
    """
    cell = crop.size / size
    pixels = (np.arange(size) + 0.5) * cell - 0.5
    diagonal = crop.inverse_points(np.stack([pixels, pixels], axis=1))  # (y, x)
    heights = 2 * (np.asarray(slices) + 0.5) / shape[0] - 1
    rows, columns = (2 * (diagonal[:, axis] + 0.5) / shape[axis + 1] - 1 for axis in (0, 1))
    z, y, x = np.meshgrid(heights, rows, columns, indexing="ij")
    grid = torch.from_numpy(np.stack([x, y, z], axis=-1).astype(np.float32))[None]
    maps = place[None].float().cpu()
    sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)[0]
    return sampled.masked_fill(torch.from_numpy((np.abs(x) > 1) | (np.abs(y) > 1)), OUTSIDE_VOLUME)


def parts_of(place: Tensor) -> list[Part]:
    """The connected parts of a map (d, h, w), largest first."""
    labels, _ = ndimage.label((place > 0).cpu().numpy(), _NEIGHBOURS)
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    return [Part(labels == n, _alone(place, labels == n)) for n in np.argsort(counts)[::-1] if counts[n]]


def element_in_box(elements: SceneElements, box: np.ndarray, shape: tuple[int, ...], rule: MatchRule) -> Part | None:
    """The element that a canonical box (2, 3), inclusive corners, was drawn round; None when none fits.

    The box bounds the object in all three axes, or it was drawn on the middle slice and given the object's first and
    last slice. Of an element in several pieces (the colon often is) those in the box are meant.
    """
    window = _cells(elements, box, shape)
    cells = elements.maps.shape[1]
    middle = min(int((np.ceil(box[:, 0].mean()) + 0.5) * cells / shape[0]), cells - 1)
    best, best_score = None, 0.0
    for number, labels in _within(elements, window):
        for part, shares in (_bounded(labels, window, rule), _bounded_on_slice(labels, window, middle, rule)):
            score = float(np.prod(shares))
            if min(shares) >= rule.filled and score > best_score:
                best, best_score = Part(part, _alone(elements.maps[number], part), min(shares)), score
    return best


def element_on_plane(
    elements: SceneElements, box: np.ndarray, axis: int, shape: tuple[int, ...], rule: MatchRule
) -> Part | None:
    """The element whose section a canonical box (2, 3) on the plane across ``axis`` was drawn round; None for none."""
    window = _cells(elements, box, shape)
    flat = tuple(part for n, part in enumerate(window) if n != axis)
    best, best_score = None, 0.0
    for number, labels in _within(elements, window):
        row = labels.take(window[axis].start, axis=axis)
        section, shares = _bounded(row, flat, rule)
        score = float(np.prod(shares))
        if min(shares) >= rule.filled and score > best_score:
            part = np.isin(labels, np.setdiff1d(row[section], [0]))
            best, best_score = Part(part, _alone(elements.maps[number], part), min(shares)), score
    return best


def _cells(elements: SceneElements, box: np.ndarray, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The cells of the scene's grid that a canonical box (2, 3), inclusive corners, covers."""
    cells = np.array(elements.maps.shape[1:])
    scale = cells / np.array(shape)
    low = np.minimum(np.floor(box[0] * scale + 0.25).astype(int), cells - 1)
    high = np.maximum(np.ceil((box[1] + 1) * scale - 0.25).astype(int), low + 1)
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))


def _within(elements: SceneElements, window: tuple[slice, ...]) -> Iterator[tuple[int, np.ndarray]]:
    """Elements that show in a window: their number and their pieces (d, h, w), numbered from 1."""
    maps = elements.maps > 0
    shown = maps[(slice(None), *window)].flatten(1).any(dim=1)
    for number in torch.nonzero(shown)[:, 0].tolist():
        yield number, ndimage.label(maps[number].cpu().numpy(), _NEIGHBOURS)[0]


def _bounded(labels: np.ndarray, window: tuple[slice, ...], rule: MatchRule) -> tuple[np.ndarray, list[float]]:
    """The pieces of ``labels`` in a window, on any axes: the share of them inside, and of each edge they span."""
    counts = np.bincount(labels.ravel())
    inside = np.bincount(labels[window].ravel(), minlength=len(counts)) / counts.clip(1)
    inside[0] = 0
    own = (inside >= rule.inside) & (counts >= rule.piece * (counts * (inside >= rule.inside)).max())
    part = np.isin(labels, np.flatnonzero(own))
    if not part.any() or part[window].mean() < rule.solid:
        return part, [0.0]
    return part, [float(part[window].sum() / part.sum()), *_edges(part[window])]


def _bounded_on_slice(
    labels: np.ndarray, window: tuple[slice, ...], row: int, rule: MatchRule
) -> tuple[np.ndarray, list[float]]:
    """The pieces whose section on ``row`` lies in the window; shares as above, there and in z."""
    section, shares = _bounded(labels[row], window[1:], rule)
    part = np.isin(labels, np.setdiff1d(labels[row][section], [0]))
    if not part.any():
        return part, [0.0]
    rows = part.sum(axis=(1, 2))
    return part, [*shares, float(rows[window[0]].sum() / rows.sum()), *_edges(rows[window[0]] > 0)]


def elements_at(
    elements: SceneElements, position: tuple[float, float, float], shape: tuple[int, ...], rule: MatchRule
) -> list[Part]:
    """What a click at a canonical voxel (z, y, x) may mean: the lesion there and the organ it lies in, if certain."""
    cells = np.array(elements.maps.shape[1:])
    z, y, x = np.clip(((np.array(position) + 0.5) / np.array(shape) * cells).astype(int), 0, cells - 1)
    chance = torch.sigmoid(elements.maps[:, z, y, x].float())
    parts = []
    for first, last in ((elements.organs, len(chance)), (0, elements.organs)):
        values = chance[first:last]
        if len(values) and float(values.max()) >= rule.certain:
            place = elements.maps[first + int(values.argmax())]
            labels, _ = ndimage.label((place > 0).cpu().numpy(), _NEIGHBOURS)
            part = labels == labels[z, y, x]
            parts.append(Part(part, _alone(place, part)))
    return parts


def agreement(
    part: Part, mask: np.ndarray, crop: SliceCrop, z: int, shape: tuple[int, ...], spacing: tuple[float, float, float]
) -> float:
    """Dice on canonical slice ``z`` between a part and a bool ``mask`` (h, h) that fills a window.

    The part counts with its whole area on the slice, also beyond the window.
    """
    cells = np.array(part.found.shape)
    row = min(int((z + 0.5) * cells[0] / shape[0]), cells[0] - 1)
    cell_mm2 = float(np.prod(np.array(shape[1:]) * np.array(spacing[1:]) / cells[1:]))
    pixel_mm2 = (crop.extent_mm / len(mask)) ** 2
    seen = (place_on_slices(part.place[None], crop, len(mask), [z], shape)[0, 0] > 0).numpy()
    areas = float(part.found[row].sum()) * cell_mm2 + float(mask.sum()) * pixel_mm2
    return 2 * float((seen & mask).sum()) * pixel_mm2 / areas if areas else 0.0


def _edges(found: np.ndarray) -> list[float]:
    """Share of every edge of an array that its true cells span."""
    spans = ndimage.find_objects(found.astype(np.uint8))
    if not spans:
        return [0.0]
    return [(s.stop - s.start) / n for s, n in zip(spans[0], found.shape, strict=True)]


def _alone(place: Tensor, part: np.ndarray) -> Tensor:
    """A map (d, h, w) without its other components; one cell round the part keeps its values."""
    near = torch.from_numpy(ndimage.binary_dilation(part, _NEIGHBOURS))
    place = place.float().cpu()
    return torch.where(near, place, place.clamp(max=OUTSIDE_VOLUME))
