"""Batches for pretraining, drawn by worker processes when the accelerator would otherwise wait for the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from medvl_sam2.training.samples import LabelledVolume
from medvl_sam2.training.slice_batches import SliceSampler, WholeSlice, Window


@dataclass(frozen=True)
class BatchShape:
    """Rows of one batch: whole slices with ``concepts`` names each, single windows, and stacks of ``clip_length``."""

    whole_slices: int
    concepts: int
    windows: int
    clips: int = 0
    clip_length: int = 1


@dataclass(frozen=True)
class RowBatch:
    """One drawn batch, on the CPU."""

    whole: list[WholeSlice]
    windows: list[Window]
    clips: list[Window]


class _RowSource(Dataset[RowBatch]):
    """Batch ``(step, number)``, whoever draws it."""

    def __init__(
        self, volumes: Sequence[LabelledVolume], weights: Sequence[float], shape: BatchShape, seed: int, size: int
    ) -> None:
        self.sampler = SliceSampler(volumes, weights, seed, size)
        self.shape, self.seed = shape, seed

    def __getitem__(self, place: tuple[int, int]) -> RowBatch:
        sampler, shape = self.sampler, self.shape
        sampler.rng = np.random.default_rng([self.seed, *place])
        return RowBatch(
            [sampler.whole_slice(shape.concepts) for _ in range(shape.whole_slices)],
            [sampler.window() for _ in range(shape.windows)],
            [sampler.window(shape.clip_length) for _ in range(shape.clips)],
        )


def batch_stream(
    volumes: Sequence[LabelledVolume],
    weights: Sequence[float],
    shape: BatchShape,
    seed: int,
    image_size: int,
    workers: int,
    step: int = 0,
    number: int = 0,
) -> Iterator[RowBatch]:
    """Endless :class:`RowBatch` from ``step`` on, drawn by ``workers`` processes (0: this one).

    ``seed``, step and ``number`` (of the process in a shared training) fix every batch, whatever the workers.
    """
    source = _RowSource(volumes, weights, shape, seed, image_size)
    places = ((n, number) for n in itertools.count(step))
    if workers == 0:
        return map(source.__getitem__, places)
    loader = DataLoader(
        source,
        batch_size=None,
        sampler=places,
        num_workers=workers,
        worker_init_fn=_one_thread,
        prefetch_factor=4,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    return iter(loader)


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
