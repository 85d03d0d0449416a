"""Measurements of a scene: what the dense map of organs and lesions says in numbers, for the language model to read."""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

ORGAN_FEATURES = 14
LESION_FEATURES = 20
"""Without the shares of the host organs, which follow."""
LESION_SIZE, LESION_SPREAD, LESION_CENTRE = slice(3, 5), slice(5, 8), slice(8, 11)
"""Columns of a lesion's :func:`size_features`, of its spread, and of its centre as a share of the view."""
LESION_KINDS_AT = 14
"""Column of a lesion's first kind."""
LESION_VALUE, LESION_CONTRAST = 18, 19
"""Columns of a lesion's value in the view, and of how far it lies above its organ's."""
_REFERENCE_MM = 300.0
_NEIGHBOURS = np.ones((3, 3, 3), dtype=bool)
_LEAST_CELLS = 3.0
"""Summed share below which an organ is not there."""
LEAST_LESION_CELLS = 3.0
"""Summed share of the smallest lesion. In cells, as specks are: 12 mm fill about nine of a usual abdomen, two of a
view of half a metre, where so small a lesion is not told from noise."""


class SceneFacts(NamedTuple):
    """Measurements of a batch: ``organs`` (B, organs, F) and ``lesions`` (B, slots, G), largest lesion first."""

    organs: Tensor
    lesions: Tensor


def lesion_parts(
    share: np.ndarray, threshold: float, slots: int, least: float = LEAST_LESION_CELLS
) -> list[np.ndarray]:
    """Lesions of one volume from the lesion share (d, h, w): connected cells above ``threshold``, by mass.

    At most ``slots`` bool masks, the one with most mass first; specks of less than ``least`` cells are left out.
    """
    parts, count = ndimage.label(share > threshold, _NEIGHBOURS)
    if not count:
        return []
    mass = ndimage.sum_labels(share, parts, np.arange(1, count + 1))
    order = [part for part in np.argsort(-mass) if mass[part] >= least]
    return [parts == part + 1 for part in order[:slots]]


def size_features(volume_mm3: float) -> tuple[float, float]:
    """A lesion's volume and the diameter of a ball of it, near unit scale."""
    return float(np.log1p(volume_mm3 / 1000) / 3), float((6 * volume_mm3 / np.pi) ** (1 / 3) / 30)


def measure_scene(
    logits: Tensor,
    mean: Tensor,
    extent_mm: Tensor | None,
    organs: int,
    slots: int,
    threshold: float,
    least: float = LEAST_LESION_CELLS,
) -> SceneFacts:
    """Facts of every volume of a batch; not differentiable. Lesions of less than ``least`` cells are left out.

    ``logits`` (B, organs + 1 + kinds, d, h, w): share of each organ, any lesion, kinds of lesion. ``mean`` (B, d, h, w)
    the cells' mean value in [0, 1]. ``extent_mm`` (B, 3) edges (z, y, x) of the view; None takes 300 mm.
    """
    shares = torch.sigmoid(logits.float()).cpu().numpy()
    values = mean.float().cpu().numpy()
    extents = np.full((len(shares), 3), _REFERENCE_MM) if extent_mm is None else extent_mm.cpu().double().numpy()
    organ_rows, lesion_rows = [], []
    for share, value, extent in zip(shares, values, extents, strict=True):
        grid = _Grid(value.shape, extent)
        facts = np.stack([grid.organ(part, value) for part in share[:organs]])
        rows = np.zeros((slots, LESION_FEATURES + organs))
        for slot, inside in enumerate(lesion_parts(share[organs], threshold, slots, least)):
            rows[slot] = _lesion(inside, share, value, grid, facts)
        organ_rows.append(facts)
        lesion_rows.append(rows)
    return SceneFacts(
        torch.from_numpy(np.stack(organ_rows)).float().to(logits.device),
        torch.from_numpy(np.stack(lesion_rows)).float().to(logits.device),
    )


def _lesion(
    inside: np.ndarray, share: np.ndarray, value: np.ndarray, grid: _Grid, organs: np.ndarray
) -> np.ndarray | list[float]:
    """(G,): certainty, size, place in the view and in its organ, kind, attenuation and host of one lesion."""
    count = len(organs)
    spans = ndimage.find_objects(inside.astype(np.uint8))[0]
    weight = share[count] * inside
    total = float(weight.sum())
    volume = total * grid.cell_mm3
    centre = grid.centre(weight)
    spread = grid.spread(weight, centre)
    near = (slice(None), *spans)
    hosts = (share[:count][near] * weight[spans]).sum(axis=(1, 2, 3)) / total
    host = organs[int(hosts.argmax())]
    relative = (centre - host[5:8] * grid.extent) / np.maximum(host[8:11] * _REFERENCE_MM, 5.0)
    kind = (share[count + 1 :][near] * weight[spans]).sum(axis=(1, 2, 3)) / total
    core = weight >= 0.8 * weight.max()
    attenuation = float(value[core].mean())
    return [
        1.0, float(weight.max()), total / max(1, int(inside.sum())), *size_features(volume),
        *(spread / 10), *(centre / grid.extent),
        *np.clip(relative, -3, 3), *kind, attenuation, attenuation - host[11], *hosts,
    ]  # fmt: skip


class _Grid:
    """Cell centres of one view in mm, and what can be measured on them."""

    def __init__(self, shape: tuple[int, ...], extent: np.ndarray):
        self.extent = extent
        self.axes = [(np.arange(n) + 0.5) / n * edge for n, edge in zip(shape, extent, strict=True)]
        self.cell_mm3 = float(np.prod(extent / np.array(shape)))

    def centre(self, weight: np.ndarray) -> np.ndarray:
        total = max(float(weight.sum()), 1e-6)
        return np.array([(self._along(weight, n) * self.axes[n]).sum() / total for n in range(3)])

    def spread(self, weight: np.ndarray, centre: np.ndarray) -> np.ndarray:
        total = max(float(weight.sum()), 1e-6)
        squares = [(self._along(weight, n) * (self.axes[n] - centre[n]) ** 2).sum() / total for n in range(3)]
        return np.sqrt(np.array(squares))

    def organ(self, share: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """Presence, volume, centre, spread, attenuation and contact with the ends of the view, near unit scale."""
        weight = share * (share > 0.3)
        total = float(weight.sum())
        if total < _LEAST_CELLS:
            return np.concatenate([[float(share.max())], np.zeros(ORGAN_FEATURES - 1)])
        centre = self.centre(weight)
        core = weight * weight
        ends = [float(weight[0].sum()), float(weight[-1].sum())]
        return np.array([
            float(share.max()), np.log1p(total * self.cell_mm3 / 1000) / 5, *((centre - self.extent / 2) / 100),
            *(centre / self.extent), *(self.spread(weight, centre) / _REFERENCE_MM),
            float((core * mean).sum() / core.sum()), *(np.array(ends) / total),
        ])  # fmt: skip

    @staticmethod
    def _along(weight: np.ndarray, axis: int) -> np.ndarray:
        return cast(np.ndarray, weight.sum(axis=tuple(n for n in range(3) if n != axis)))
