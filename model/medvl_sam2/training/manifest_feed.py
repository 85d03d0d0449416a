"""What the stages that learn from a manifest share: the feed of one side, its tokenizer, and held-out figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from tqdm import tqdm

from medvl_sam2.datasets.case_cache import CaseCache
from medvl_sam2.datasets.json_records import to_plain
from medvl_sam2.datasets.manifest import CaseRecord, Manifest, Split
from medvl_sam2.datasets.volumes import LoadedCase, read_case
from medvl_sam2.modeling.compute import autocast
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.training.case_feed import CaseFeed
from medvl_sam2.training.stage import Draw, Stage
from medvl_sam2.training.taught_texts import corpus_of
from medvl_sam2.training.trainer import TrainerConfig

_SURVEYED = 400
"""So many cases, spread over the training side, give the texts for a tokenizer where none is given."""
_LEAST_DRAWS = 4
"""Batches that the held-out loss is taken over at least."""

T = TypeVar("T")


@dataclass(frozen=True)
class FeedConfig:
    """How the cases of a manifest are read."""

    root: Path | None = None
    """Folder that the manifest's paths start from; default: its own."""
    cache: Path | None = None
    """Folder of cases once read; None reads the data set's own files every time."""
    cache_gib: float = 50.0
    keep: int = 16
    """Cases kept in memory by every process."""
    workers: int = 2
    """Threads of every process that read ahead."""
    held_out: int = 50
    """Held-out cases measured before and after; 0: none, and none need be there."""


def manifest_feed(
    records: Sequence[CaseRecord],
    root: Path,
    reduced: Callable[[LoadedCase], T],
    config: FeedConfig,
    seed: int,
    batch: int,
) -> CaseFeed[T]:
    """The cases of ``records`` below ``root``, each as what ``reduced`` makes of it; two batches at least are kept.

    ``reduced`` raises :class:`MedVLError` for a case that teaches nothing. Raises :class:`DataError` without records.
    """
    cache = None if config.cache is None else CaseCache(config.cache, int(config.cache_gib * 2**30))

    def read(number: int) -> T:
        record = records[number]
        return reduced(read_case(record, root) if cache is None else cache.read(record, root))

    names = [record.id for record in records]
    facts = [to_plain(record) for record in records]
    return CaseFeed(names, read, seed, max(config.keep, 2 * batch), config.workers, facts)


def trained_tokenizer(manifest: Manifest, vocab_size: int) -> Tokenizer:
    """A tokenizer of the texts of the training side."""
    records = manifest.of(Split.TRAIN).records
    numbers = np.unique(np.linspace(0, len(records) - 1, min(len(records), _SURVEYED)).astype(int))
    return Tokenizer.train((text for n in numbers for text in corpus_of(records[n])), vocab_size)


def held_out_draws(cases: int, batch: int) -> int:
    """Batches that show ``cases`` held-out cases; of few cases each comes several times, with other tasks."""
    return max(_LEAST_DRAWS, -(-cases // batch))


def held_out_figures(stage: Stage, loop: TrainerConfig, draws: int) -> dict[str, float]:
    """Mean loss and figures over ``draws`` batches of the stage's feed; the same cases, tasks and noise every time."""
    sums: dict[str, list[float]] = {}
    for step in tqdm(range(draws), desc="held-out batches", mininterval=5):
        torch.manual_seed(step)
        with torch.no_grad(), autocast(loop.device, loop.precision):
            loss, figures = stage.loss(Draw(loop.seed, step))
        for name, value in {"loss": float(loss), **figures}.items():
            if math.isfinite(value):
                sums.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in sums.items()}
