"""Cases in an order fixed by seed and epoch, over ranks and worker processes, resumable at the next sample.

The order of an epoch is one permutation of the manifest; rank ``r`` of ``n`` takes every ``n``-th case from the
``r``-th on. Workers take turns within that, and a broken case still takes its turn, so the sequence is the same
for any number of workers. All a checkpoint needs is :class:`StreamState`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from medvl_sam2.datasets.case_cache import CaseCache
from medvl_sam2.datasets.manifest import Manifest
from medvl_sam2.datasets.volumes import LoadedCase, read_case
from medvl_sam2.errors import ConfigError, DataError, MedVLError

T = TypeVar("T")
Transform = Callable[[LoadedCase, np.random.Generator], T]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamState:
    """Where a stream is: ``position`` cases of its rank's share of ``epoch`` are done.

    ``seed``, ``world_size`` and ``cases`` (of the manifest) only prove that the stream is the same one.
    """

    seed: int
    world_size: int
    cases: int
    epoch: int = 0
    position: int = 0


@dataclass(frozen=True)
class _Turn(Generic[T]):
    """One case's turn: its sample, or why there is none."""

    case: str
    sample: T | None = None
    reason: str | None = None


@dataclass(frozen=True)
class _Epoch(IterableDataset[_Turn[T]], Generic[T]):
    """The turns ``indices`` of one rank and epoch; every worker takes its own."""

    manifest: Manifest
    indices: np.ndarray
    first: int
    draw: tuple[int, int]
    transform: Transform[T]
    cache: CaseCache | None

    def __iter__(self) -> Iterator[_Turn[T]]:
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for position in range(self.first + number, len(self.indices), count):
            yield self._turn(int(self.indices[position]))

    def _turn(self, index: int) -> _Turn[T]:
        record, root = self.manifest.records[index], self.manifest.root
        try:
            case = read_case(record, root) if self.cache is None else self.cache.read(record, root)
            return _Turn(record.id, self.transform(case, np.random.default_rng([*self.draw, index])))
        except (MedVLError, OSError) as error:
            return _Turn(record.id, reason=str(error))


class CaseStream(Generic[T]):
    """Iterate once for one epoch, from :attr:`state` on; the next iteration is the next epoch.

    ``transform`` makes a sample of a case, in the worker; its generator depends on seed, epoch and case only. A case
    that cannot be read or made a sample of is logged, counted in :attr:`skipped` and passed over, so ranks may give
    unequal numbers of samples an epoch: count steps, not epochs, where ranks wait for each other.
    """

    def __init__(
        self,
        manifest: Manifest,
        transform: Transform[T],
        *,
        seed: int,
        cache: CaseCache | None = None,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ) -> None:
        """Stream ``manifest`` (one side of it: see :meth:`Manifest.of`).

        Raises :class:`DataError` for an empty manifest and :class:`ConfigError` for a rank outside the world.
        """
        if not manifest.records:
            raise DataError("no case to stream; this side of the manifest is empty")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} must lie between 0 and {world_size - 1}")
        self.skipped: Counter[str] = Counter()
        self._manifest, self._transform, self._cache = manifest, transform, cache
        self._workers, self._rank, self._shuffle = workers, rank, shuffle
        self._state = StreamState(seed, world_size, len(manifest.records))

    @property
    def state(self) -> StreamState:
        """The place of the sample after the last one given out; what a checkpoint keeps, one a rank."""
        return self._state

    @state.setter
    def state(self, state: StreamState) -> None:
        mine = self._state
        for name in ("seed", "world_size", "cases"):
            if getattr(state, name) != getattr(mine, name):
                raise DataError(
                    f"the saved stream has {name} {getattr(state, name)}, this one {getattr(mine, name)}; "
                    "resume with the same manifest, seed and number of processes"
                )
        if state.epoch < 0 or not 0 <= state.position < len(self):
            raise DataError(f"position {state.position} of epoch {state.epoch} is not in a stream of {len(self)} cases")
        self._state = state

    def __len__(self) -> int:
        """Turns of this rank in a whole epoch, the same on every rank: the first cases come twice to make it even."""
        return -(-self._state.cases // self._state.world_size)

    def __iter__(self) -> Iterator[T]:
        state = self._state
        turns: DataLoader[_Turn[T]] = DataLoader(self._epoch(state), batch_size=None, num_workers=self._workers)
        good = 0
        for position, turn in enumerate(turns, start=state.position + 1):
            done = position == len(self)
            self._state = dataclasses.replace(state, epoch=state.epoch + done, position=0 if done else position)
            if turn.reason is not None:
                self.skipped[turn.case] += 1
                logger.warning("case %s skipped: %s", turn.case, turn.reason)
                continue
            good += 1
            yield turn.sample
        if not good and state.position == 0:
            raise DataError(f"none of the {len(self)} cases of this epoch could be read; the log says why")

    def _epoch(self, state: StreamState) -> _Epoch[T]:
        order = np.arange(state.cases)
        if self._shuffle:
            order = np.random.default_rng([state.seed, state.epoch]).permutation(state.cases)
        share = np.resize(order, len(self) * state.world_size)[self._rank :: state.world_size]
        draw = (state.seed, state.epoch)
        return _Epoch(self._manifest, share, state.position, draw, self._transform, self._cache)
