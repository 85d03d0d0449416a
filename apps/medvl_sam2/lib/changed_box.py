"""Only what changed of a mask, for clients that keep the last one: a correction is small where a volume is large.

What was sent of each object is remembered as bits, an eighth of a byte a voxel. Used within a turn (:mod:`lib.turns`).
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace

import numpy as np

from medvl_sam2.types import Geometry

Box = tuple[list[int], list[int]]
"""Lowest and highest voxel, both inclusive."""

_numbers = itertools.count(time.time_ns() // 1000)
"""Of masks, in all sessions and, by beginning with the time, all runs of the server: none is given twice, so a client
that has a mask from before a reset or a restart is not taken for one that has the last."""


@dataclass(frozen=True, eq=False)
class Part:
    """The voxels of a mask inside ``box``, on a grid of their own that lies where they lie in space.

    ``box`` is None, and the part is the first voxel alone, where nothing changed. ``number`` is the mask's own.
    """

    mask: np.ndarray
    geometry: Geometry
    box: Box | None
    whole: bool
    number: int


class SentMasks:
    """The last mask that a client was sent of each object."""

    def __init__(self) -> None:
        self._sent: dict[str, tuple[int, np.ndarray, list[int]]] = {}

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(bits.nbytes for _, bits, _ in self._sent.values())

    def part(self, name: str, mask: np.ndarray, geometry: Geometry, have: int | None = None) -> Part:
        """What differs in ``mask`` (I, J, K) of 0 and 1 from the last one sent of this object; else the whole.

        ``have``: number of the mask that the client has. Where it is another one than was sent last (a reply may be
        lost on its way), the client gets the whole.
        """
        last, bits, lain = self._sent.get(name, (0, None, None))
        order = sorted(range(3), key=lambda axis: -mask.strides[axis])
        view = mask.transpose(order)  # as it lies in memory: turning a volume round costs more than all else here
        new = np.packbits(view)
        number = next(_numbers)
        self._sent[name] = (number, new, order)
        if bits is None or lain != order or (have is not None and have != last):
            return Part(mask, geometry, ([0, 0, 0], [size - 1 for size in mask.shape]), True, number)
        changed = np.unpackbits(bits ^ new, count=mask.size).reshape(view.shape)
        found = _bounds(changed)
        low, high = np.zeros(3, dtype=int), np.zeros(3, dtype=int)
        if found is not None:
            low[order], high[order] = found
        affine = geometry.affine.copy()
        affine[:3, 3] = geometry.voxel_to_world(low[None].astype(float))[0]
        inside = mask[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))]
        grid = replace(geometry, shape=inside.shape, affine=affine)
        return Part(inside, grid, None if found is None else (low.tolist(), high.tolist()), False, number)

    def forget(self, name: str) -> None:
        """The client got another mask of this object meanwhile: the next part is the whole."""
        self._sent.pop(name, None)

    def clear(self) -> None:
        """Forget all."""
        self._sent.clear()


def _bounds(changed: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Lowest and highest place (3,) where ``changed`` (A, B, C) of 0 and 1 is not 0; None where it is 0 everywhere."""
    low, high = np.zeros(3, dtype=int), np.zeros(3, dtype=int)
    for axis in range(3):
        shown = np.flatnonzero(changed.any(axis=tuple({0, 1, 2} - {axis})))
        if not len(shown):
            return None
        low[axis], high[axis] = shown[0], shown[-1]
        changed = changed[(slice(None),) * axis + (slice(shown[0], shown[-1] + 1),)]
    return low, high
