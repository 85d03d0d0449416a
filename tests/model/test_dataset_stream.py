"""The stream: one order for any number of workers, shares of ranks, and going on at the very next sample."""

from __future__ import annotations

import errno
import itertools
import logging
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import dataset_folders as folders
from dataset_folders import axes_affine, broken_gzip, phantom, save_nifti
from medvl_sam2.datasets import case_cache
from medvl_sam2.datasets.case_cache import CaseCache
from medvl_sam2.datasets.manifest import CaseRecord, ImageFile, LabelFile, Manifest, Split
from medvl_sam2.datasets.stream import CaseStream, StreamState
from medvl_sam2.datasets.volumes import LoadedCase
from medvl_sam2.errors import ConfigError, DataError
from medvl_sam2.types import Modality

CASES, BROKEN = 11, (3, 7)
Drawn = tuple[str, int, float]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Eleven cases, two of them broken."""
    root = tmp_path_factory.mktemp("cases")
    records = []
    for number in range(CASES):
        case = phantom(axes_affine("LPS", turn=True), number)
        image = f"{number}/ct.nii.gz"
        if number in BROKEN:
            broken_gzip(root / image)
        else:
            save_nifti(root / image, case.array, case.affine)
        label = LabelFile(f"{number}/mask.nii.gz", dict(enumerate(folders.NAMES, start=1)))
        save_nifti(root / label.path, case.labels, case.affine)
        records.append(
            CaseRecord(f"c{number}", "set", f"p{number}", Split.TRAIN, Modality.CT, "x", ImageFile(image), (label,))
        )
    return Manifest(tuple(records), root)


def drawn(case: LoadedCase, rng: np.random.Generator) -> Drawn:
    """A sample that depends on the case and on the generator."""
    assert case.labels is not None
    return case.record.id, int(case.volume.array.sum()), float(rng.random())


def endless(stream: CaseStream[Drawn]) -> Iterator[Drawn]:
    while True:
        yield from stream


def first(stream: CaseStream[Drawn], count: int) -> list[Drawn]:
    return list(itertools.islice(endless(stream), count))


def test_an_epoch_is_a_permutation_without_the_broken_cases(manifest: Manifest) -> None:
    stream = CaseStream(manifest, drawn, seed=5)
    epochs = [list(stream) for _ in range(2)]
    whole = sorted(f"c{n}" for n in range(CASES) if n not in BROKEN)
    assert [sorted(name for name, _, _ in epoch) for epoch in epochs] == [whole, whole]
    assert [name for name, _, _ in epochs[0]] != [name for name, _, _ in epochs[1]]
    assert len({value for _, _, value in epochs[0]}) == len(whole)  # every case has a generator of its own
    assert {value for _, _, value in epochs[0]}.isdisjoint(value for _, _, value in epochs[1])
    assert stream.skipped == {"c3": 2, "c7": 2}
    assert stream.state == StreamState(5, 1, CASES, epoch=2)


def test_seed_decides_the_order(manifest: Manifest) -> None:
    orders = [[name for name, _, _ in CaseStream(manifest, drawn, seed=seed)] for seed in (5, 5, 6)]
    assert orders[0] == orders[1] != orders[2]
    plain = [name for name, _, _ in CaseStream(manifest, drawn, seed=5, shuffle=False)]
    assert plain == [f"c{n}" for n in range(CASES) if n not in BROKEN]


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_samples(manifest: Manifest, workers: int) -> None:
    alone, shared = CaseStream(manifest, drawn, seed=5), CaseStream(manifest, drawn, seed=5, workers=workers)
    assert list(shared) == list(alone)
    assert shared.state == alone.state
    assert shared.skipped == alone.skipped


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [1, 4, 9, 12])
def test_resumes_at_the_next_sample(manifest: Manifest, workers: int, done: int) -> None:
    """Also across the end of an epoch (nine whole cases) and beside broken cases."""
    expected = first(CaseStream(manifest, drawn, seed=8), done + 7)
    stopped = CaseStream(manifest, drawn, seed=8, workers=workers)
    assert first(stopped, done) == expected[:done]
    resumed = CaseStream(manifest, drawn, seed=8, workers=2 - workers)
    resumed.state = StreamState(**vars(stopped.state))  # as a checkpoint keeps it: a few integers
    assert first(resumed, 7) == expected[done:]
    assert first(stopped, 7) == expected[done:]


def test_ranks_share_an_epoch_evenly(manifest: Manifest) -> None:
    streams = [CaseStream(manifest, drawn, seed=5, rank=rank, world_size=3) for rank in range(3)]
    assert [len(stream) for stream in streams] == [4, 4, 4]
    turns = [[name for name, _, _ in stream] + sorted(stream.skipped.elements()) for stream in streams]
    assert {len(names) for names in turns} == {4}
    names = list(itertools.chain(*turns))
    assert set(names) == {f"c{n}" for n in range(CASES)}
    assert len(names) == CASES + 1  # one case comes twice to make the shares even
    assert all(stream.state.epoch == 1 for stream in streams)


def test_broken_cases_are_named_in_the_log(manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        list(CaseStream(manifest, drawn, seed=5, workers=2))
    assert sorted(message.split(":")[0] for message in caplog.messages) == ["case c3 skipped", "case c7 skipped"]


def test_a_transform_may_refuse_a_case_but_not_fail(manifest: Manifest) -> None:
    def picky(case: LoadedCase, rng: np.random.Generator) -> str:
        if case.record.id == "c0":
            raise DataError("no lesion in it")
        return case.record.id

    stream = CaseStream(manifest, picky, seed=1)
    assert "c0" not in list(stream)
    assert stream.skipped["c0"] == 1

    def wrong(case: LoadedCase, rng: np.random.Generator) -> str:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(CaseStream(manifest, wrong, seed=1))


def test_nothing_readable_is_an_error_not_an_endless_loop(manifest: Manifest) -> None:
    broken = Manifest(tuple(manifest.records[n] for n in BROKEN), manifest.root)
    with pytest.raises(DataError, match="none of the 2 cases"):
        first(CaseStream(broken, drawn, seed=1), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, "seed 6, this one 5"),
        ({"world_size": 2}, "world_size 2, this one 1"),
        ({"cases": 10}, "cases 10, this one 11"),
        ({"position": 11}, "position 11 of epoch 0"),
        ({"epoch": -1}, "epoch -1"),
    ],
)
def test_the_state_of_another_stream_is_refused(manifest: Manifest, change: dict[str, int], message: str) -> None:
    stream = CaseStream(manifest, drawn, seed=5)
    with pytest.raises(DataError, match=message):
        stream.state = StreamState(**{"seed": 5, "world_size": 1, "cases": CASES, **change})
    assert stream.state == StreamState(5, 1, CASES)


def test_wrong_options_are_refused(manifest: Manifest) -> None:
    with pytest.raises(ConfigError, match="rank 2"):
        CaseStream(manifest, drawn, seed=1, rank=2, world_size=2)
    with pytest.raises(DataError, match="this side of the manifest is empty"):
        CaseStream(manifest.of(Split.TEST), drawn, seed=1)


def test_workers_share_one_small_cache(manifest: Manifest, tmp_path: Path) -> None:
    """Room for three of nine cases, two workers and three epochs: same samples, budget kept, files removed in use."""
    size = phantom(axes_affine("LPS")).array.nbytes * 3 // 2 + 2500
    cache = CaseCache(tmp_path / "cache", 3 * size)
    plain, cached = CaseStream(manifest, drawn, seed=5), CaseStream(manifest, drawn, seed=5, cache=cache, workers=2)
    for _ in range(3):
        assert list(cached) == list(plain)
        held = list(cache.folder.glob("*.npz"))
        assert 1 <= len(held) <= 3
        assert sum(path.stat().st_size for path in held) <= cache.max_bytes
    assert not list(cache.folder.glob("*.writing"))


def test_a_cache_that_may_only_be_read_still_serves(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache, record = CaseCache(tmp_path / "cache", 10**7), manifest.records[0]
    cache.read(record, manifest.root)
    (file,) = cache.folder.glob("*.npz")
    whole = file.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "read-only")

    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", refuse)
        patch.setattr(case_cache, "read_case", None)  # it comes from the cache
        assert cache.read(record, manifest.root).record == record
    file.write_bytes(whole[:-40])
    with monkeypatch.context() as patch:
        patch.setattr(case_cache, "FileLock", refuse)
        assert cache.read(record, manifest.root).record == record
    assert "cannot be written ([Errno 30] read-only); going on without it" in caplog.text
    assert file.read_bytes() == whole[:-40]  # nothing is removed without the lock
    cache.read(record, manifest.root)
    assert file.read_bytes() == whole
    with pytest.raises(DataError, match="cannot be made"):
        CaseCache(file / "inside", 1)


def _hammer(cache: CaseCache, manifest: Manifest, seed: int) -> None:
    whole = [n for n in range(CASES) if n not in BROKEN]
    for number in np.random.default_rng(seed).choice(whole, 40):
        case = cache.read(manifest.records[number], manifest.root)
        assert np.array_equal(case.volume.array, phantom(axes_affine("LPS", turn=True), int(number)).array)


def test_processes_that_evict_each_other_read_true_cases(manifest: Manifest, tmp_path: Path) -> None:
    cache = CaseCache(tmp_path / "cache", 20_000)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_hammer, args=(cache, manifest, seed)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sum(path.stat().st_size for path in cache.folder.glob("*.npz")) <= cache.max_bytes
