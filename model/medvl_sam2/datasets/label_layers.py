"""Named masks of one case in as few label maps as their overlaps allow, and what they say of left and right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medvl_sam2.datasets.label_names import opposite_side
from medvl_sam2.errors import DataError
from medvl_sam2.types import Geometry

_SAMPLE = 4_000_000  # voxels that centres of structures are taken from


@dataclass(frozen=True)
class LabelLayers:
    """``maps`` (L, I, J, K) uint8 or uint16 on the stored grid: value ``n`` in any layer belongs to ``names[n - 1]``.

    ``present``: names with at least one voxel. The others are known to be absent.
    """

    maps: np.ndarray
    names: tuple[str, ...]
    present: tuple[str, ...]

    def mask(self, name: str) -> np.ndarray:
        """Bool mask (I, J, K) of a name; :class:`DataError` when the case does not label it."""
        if name not in self.names:
            raise DataError(f"structure {name!r} is not labelled in this case; labelled: {', '.join(self.names)}")
        return np.any(self.maps == self.names.index(name) + 1, axis=0)


class LayerBuilder:
    """Puts masks one after the other into the first layer they do not overlap another name in."""

    def __init__(self, shape: tuple[int, int, int], names: Sequence[str]) -> None:
        self._shape = shape
        self._names = tuple(names)
        self._present: set[str] = set()
        self._layers = [self._empty()]

    def add(self, voxels: np.ndarray, name: str) -> None:
        """Give flat C-order indices into (I, J, K) to ``name``."""
        if not voxels.size:
            return
        self._present.add(name)
        value = self._names.index(name) + 1
        for layer in self._layers:
            if np.isin(layer[voxels], (0, value)).all():
                layer[voxels] = value
                return
        self._layers.append(self._empty())
        self._layers[-1][voxels] = value

    def built(self) -> LabelLayers:
        """What was added so far."""
        maps = np.stack(self._layers).reshape(len(self._layers), *self._shape)
        return LabelLayers(maps, self._names, tuple(name for name in self._names if name in self._present))

    def _empty(self) -> np.ndarray:
        return np.zeros(math.prod(self._shape), dtype=np.uint8 if len(self._names) < 256 else np.uint16)


def side_votes(labels: LabelLayers, geometry: Geometry) -> int:
    """Pairs of a left and a right structure that lie as ``geometry`` says, less those that lie the other way round.

    0 when there is no pair or no majority.
    """
    lefts = [name for name in labels.present if "left" in name.split("_") and opposite_side(name) in labels.present]
    if not lefts:
        return 0
    step = math.ceil((labels.maps[0].size / _SAMPLE) ** (1 / 3))
    sample = labels.maps[:, ::step, ::step, ::step]
    layer, *ijk = np.nonzero(sample)
    x = geometry.voxel_to_world(np.stack(ijk, axis=1) * step)[:, 0]  # RAS+: grows to the patient's right
    values = sample[(layer, *ijk)]
    voxels = np.bincount(values, minlength=len(labels.names) + 1)
    sums = np.bincount(values, weights=x, minlength=len(labels.names) + 1)
    votes = 0
    for left in lefts:
        pair = [labels.names.index(str(name)) + 1 for name in (left, opposite_side(left))]
        if voxels[pair].all():
            left_x, right_x = sums[pair] / voxels[pair]
            votes += int(np.sign(right_x - left_x))
    return votes
