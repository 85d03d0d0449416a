"""Batches for pretraining, drawn by worker processes when the accelerator would otherwise wait for the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

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


class _RowSource(IterableDataset[RowBatch]):
    """Endless batches; every worker draws from its own generator."""

    def __init__(
        self, volumes: Sequence[LabelledVolume], weights: Sequence[float], shape: BatchShape, seed: int, size: int
    ) -> None:
        self.volumes, self.weights, self.shape, self.seed, self.size = volumes, weights, shape, seed, size

    def __iter__(self) -> Iterator[RowBatch]:
        worker = get_worker_info()
        number = 0 if worker is None else worker.id
        if worker is not None:
            torch.set_num_threads(1)
        sampler = SliceSampler(self.volumes, self.weights, 0, self.size)
        sampler.rng = np.random.default_rng([self.seed, number])
        shape = self.shape
        while True:
            yield RowBatch(
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
) -> Iterator[RowBatch]:
    """Endless :class:`RowBatch` from ``workers`` processes (0: this one); seed and workers fix the stream."""
    source = _RowSource(volumes, weights, shape, seed, image_size)
    if workers == 0:
        return iter(source)
    loader = DataLoader(
        source,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    return iter(loader)
