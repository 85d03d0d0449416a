"""Cases drawn by number, whoever learns from them.

The n-th case of a run is the same for any number of processes, workers and restarts: one permutation of all cases an
epoch, as :class:`~medvl_sam2.datasets.stream.CaseStream` has it, but with any place in it at hand. A case that cannot
be read is named in the log, and the next one of its epoch stands in for it.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np
from tqdm import tqdm

from medvl_sam2.errors import DataError, MedVLError
from medvl_sam2.training.run_settings import digest

logger = logging.getLogger(__name__)

T = TypeVar("T")
U = TypeVar("U")


class CaseFeed(Generic[T]):
    """Cases by their number in the run; some are kept in memory and the next ones read ahead."""

    def __init__(
        self,
        names: Sequence[str],
        read: Callable[[int], T],
        seed: int,
        keep: int = 16,
        workers: int = 0,
        facts: object = None,
    ) -> None:
        """``read`` makes the case ``names[n]`` of its number ``n``; ``workers`` threads call it.

        It raises :class:`MedVLError` for a case that cannot be used. ``facts``: plain values that tell the cases from
        others of the same names. Raises :class:`DataError` without names.
        """
        if not names:
            raise DataError("no case to learn from; give a manifest with cases on this side, or generate some")
        self.skipped: dict[str, str] = {}
        self.digest = digest(names, facts)
        """Which cases they are, with what is known of each, in which order; files are named and not opened."""
        self._names, self._read, self._seed, self._keep = tuple(names), read, seed, keep
        self._pool = ThreadPoolExecutor(workers) if workers else None
        self._held: OrderedDict[int, Future[T | None]] = OrderedDict()
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self._names)

    def cases(self, first: int, count: int, ahead: int | None = None) -> list[T]:
        """Cases number ``first`` to ``first + count - 1``; as many from ``ahead`` on are read meanwhile.

        Raises :class:`DataError` when no case of an epoch can be read.
        """
        for number in range(first, first + count):
            self._ask(self._index(number))  # so that the pool reads them side by side
        found = [self._case(number) for number in range(first, first + count)]
        if self._pool is not None and ahead is not None:
            for number in range(ahead, ahead + count):
                self._ask(self._index(number))
        return found

    def readable(self, count: int) -> list[T]:
        """Those of the first ``count`` cases that can be read, each once."""
        numbers = tqdm(range(min(count, len(self))), desc="cases", unit="case", mininterval=5)
        found = [self._ask(self._index(number)).result() for number in numbers]
        return [case for case in found if case is not None]

    def mapped(self, turn: Callable[[str, Callable[[], T]], U], facts: object = None) -> CaseFeed[U]:
        """The same cases in the same order, each as ``turn`` makes it of its name and the way to read it; all are kept.

        ``facts``: plain values that tell what ``turn`` makes from what another one does.
        """

        def read(number: int) -> U:
            return turn(self._names[number], lambda: self._read(number))

        return CaseFeed(self._names, read, self._seed, len(self), 0, [self.digest, facts])

    def _case(self, number: int) -> T:
        for later in range(len(self)):
            epoch, offset = divmod(number, len(self))
            case = self._ask(self._index(epoch * len(self) + (offset + later) % len(self))).result()
            if case is not None:
                return case
        raise DataError(f"none of the {len(self)} cases could be read; the log says why")

    def _index(self, number: int) -> int:
        epoch, offset = divmod(number, len(self))
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self)))
        return int(self._order[1][offset])

    def _ask(self, index: int) -> Future[T | None]:
        if index not in self._held:
            self._held[index] = self._submitted(index)
            while len(self._held) > max(1, self._keep):
                self._held.popitem(last=False)
        self._held.move_to_end(index)
        return self._held[index]

    def _submitted(self, index: int) -> Future[T | None]:
        if self._pool is not None:
            return self._pool.submit(self._try, index)
        done: Future[T | None] = Future()
        done.set_result(self._try(index))
        return done

    def _try(self, index: int) -> T | None:
        name = self._names[index]
        try:
            return self._read(index)
        except (MedVLError, OSError) as error:
            if name not in self.skipped:
                logger.warning("case %s skipped: %s", name, error)
            self.skipped[name] = str(error)
            return None
