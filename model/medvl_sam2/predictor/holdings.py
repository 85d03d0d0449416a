"""How much memory object states hold. They share most of it, so what several hold counts once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from medvl_sam2.predictor.objects import ObjectState, PastedSlice

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


@dataclass(frozen=True, eq=False)
class _Counted:
    """A state with the arrays it had when it was counted; holding them keeps their ids from being used again."""

    state: ObjectState
    pasted: Mapping[int, PastedSlice]
    arrays: tuple[Held, ...]


class Tally:
    """Bytes of the arrays of some states; taking a state out frees what no other one holds."""

    def __init__(self, states: Iterable[ObjectState] = ()) -> None:
        self._holders: Counter[int] = Counter()
        self._counted: dict[int, _Counted] = {}
        self.bytes = 0
        self.follow(states)

    def follow(self, states: Iterable[ObjectState]) -> None:
        """Count these and no others. Only new ones cost time, and old ones whose mask was pasted since."""
        wanted = {id(state): state for state in states}
        for key, known in list(self._counted.items()):
            if wanted.get(key) is not known.state or known.state.pasted is not known.pasted:
                self.remove(known.state)
        for key, state in wanted.items():
            if key not in self._counted:
                self._add(state)

    def remove(self, state: ObjectState) -> None:
        """Take out a state that was counted."""
        for array in self._counted.pop(id(state)).arrays:
            self._holders[id(array)] -= 1
            if self._holders[id(array)] == 0:
                del self._holders[id(array)]
                self.bytes -= array.nbytes

    def _add(self, state: ObjectState) -> None:
        counted = self._counted[id(state)] = _Counted(state, state.pasted, tuple(arrays_of(state)))
        for array in counted.arrays:
            if id(array) not in self._holders:
                self.bytes += array.nbytes
            self._holders[id(array)] += 1
