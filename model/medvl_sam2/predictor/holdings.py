"""How much memory object states hold. They share most of it, so what several hold counts once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from torch import Tensor

from medvl_sam2.predictor.objects import ObjectState

Held = np.ndarray | Tensor


def arrays_of(state: ObjectState) -> Iterator[Held]:
    """All arrays of a state but the encoded slices, which belong to its stack."""
    yield from state.logits.values()
    yield from state.rough.values()
    for memory in state.memory.conditioning.values():
        yield from (memory.features, memory.position, memory.pointer)
    for pasted in state.pasted.values():
        yield from (pasted.below, pasted.above, pasted.inside)
    for kept in state.kept.values():
        yield from (kept.mask, kept.logits)
    yield from state.accepted.values()


class Tally:
    """Bytes of the arrays of some states; taking a state out frees what no other one holds."""

    def __init__(self, states: Iterable[ObjectState]) -> None:
        self._holders: Counter[int] = Counter()
        self.bytes = 0
        for state in states:
            for array in arrays_of(state):
                if self._holders[id(array)] == 0:
                    self.bytes += array.nbytes
                self._holders[id(array)] += 1

    def remove(self, state: ObjectState) -> None:
        """Take out a state that was counted."""
        for array in arrays_of(state):
            self._holders[id(array)] -= 1
            if self._holders[id(array)] == 0:
                self.bytes -= array.nbytes
