"""Encoded slices within budgets, bit-equal from every tier, and encoded once for all annotators."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medvl_sam2.geometry import SliceCrop
from medvl_sam2.modeling.slice_segmenter import SliceFeatures
from medvl_sam2.predictor import CacheConfig, Predictor
from medvl_sam2.predictor.feature_cache import FeatureCache
from medvl_sam2.types import Prompt
from small_model import oblique_volume, small_predictor

CROP = SliceCrop((10.0, 12.0), 40.0, 64, (1.0, 1.5))
EACH = 4 * (64 + 32 + 16)
"""Bytes of one slice of :func:`features`."""


def features(z: int, dtype: torch.dtype = torch.float32) -> SliceFeatures:
    values = torch.randn(112, generator=torch.Generator().manual_seed(z)).to(dtype)
    parts = (values[:64].reshape(1, 1, 8, 8), values[64:96].reshape(1, 2, 4, 4), values[96:].reshape(1, 4, 2, 2))
    return SliceFeatures(*parts, torch.zeros(1, 4, 2, 2))


def same(one: SliceFeatures | None, other: SliceFeatures) -> bool:
    return one is not None and all(
        torch.equal(getattr(one, part), getattr(other, part)) for part in ("fine", "middle", "coarse")
    )


@pytest.fixture
def image() -> np.ndarray:
    return np.zeros((4, 3, 2), dtype=np.int16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_go_to_files_and_come_back_bit_for_bit(
    image: np.ndarray, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    each = EACH * dtype.itemsize // 4
    cache = FeatureCache(CacheConfig(device_megabytes=3.5 * each / 1e6, disk_megabytes=4.5 * each / 1e6))
    for z in range(10):
        cache.put(image, CROP, z, features(z, dtype))
        assert cache.bytes[0] <= 3.5 * each
        assert cache.bytes[2] <= 4.5 * each
    assert cache.bytes == (3 * each, 0, 4 * each)
    assert cache.slices(image, CROP) == set(range(3, 10))  # the oldest are gone
    assert cache.get(image, CROP, 2) is None
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) == 4 * each
    for z in (3, 9, 4, 5, 3):
        assert same(cache.get(image, CROP, z), features(z, dtype))
        assert cache.bytes == (3 * each, 0, 4 * each)
    cache.close()
    assert cache.bytes == (0, 0, 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("harm", ["missing", "cut off", "empty", "folder"])
def test_a_lost_file_is_a_slice_that_is_not_held(
    image: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cache = FeatureCache(CacheConfig(device_megabytes=1.5 * EACH / 1e6, disk_megabytes=4.5 * EACH / 1e6))
    for z in range(3):
        cache.put(image, CROP, z, features(z))
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        if harm in ("missing", "folder"):
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: EACH // 2 if harm == "cut off" else 0])
    if harm == "folder":
        next(tmp_path.iterdir()).rmdir()
    assert cache.get(image, CROP, 0) is None
    assert cache.bytes == (EACH, 0, EACH)  # what was lost does not count
    for z in range(6):
        cache.put(image, CROP, z, features(z))
    for z in range(1, 6):
        assert same(cache.get(image, CROP, z), features(z))
    cache.close()


def test_without_a_budget_for_files_there_are_none(
    image: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cache = FeatureCache(CacheConfig(device_megabytes=2 * EACH / 1e6))
    for z in range(5):
        cache.put(image, CROP, z, features(z))
    assert cache.slices(image, CROP) == {3, 4}
    assert not list(tmp_path.iterdir())
    tiny = FeatureCache(CacheConfig(device_megabytes=0))
    tiny.put(image, CROP, 0, features(0))
    assert tiny.get(image, CROP, 0) is None


def test_images_and_windows_are_told_apart_and_go_with_the_image(image: np.ndarray) -> None:
    cache = FeatureCache()
    other, wider = image.copy(), replace(CROP, extent_mm=80.0)
    for n, (array, crop) in enumerate(((image, CROP), (other, CROP), (image, wider))):
        cache.put(array, crop, 0, features(n))
    assert same(cache.get(other, CROP, 0), features(1))
    assert same(cache.get(image, wider, 0), features(2))
    del array, other
    gc.collect()
    assert same(cache.get(image, CROP, 0), features(0))
    assert cache.bytes[0] == 2 * EACH


def test_a_row_of_a_batch_does_not_hold_the_batch(image: np.ndarray) -> None:
    cache = FeatureCache()
    batch = torch.randn(50, 4, 2, 2)
    whole = SliceFeatures(batch, batch.clone(), batch.clone(), batch[:1])
    cache.put(image, CROP, 0, whole.rows(slice(7, 8)))
    held = cache.get(image, CROP, 0)
    assert held is not None
    assert torch.equal(held.fine, batch[7:8])
    assert held.fine.untyped_storage().nbytes() == held.fine.nbytes


def test_threads_share_it(image: np.ndarray) -> None:
    cache = FeatureCache(CacheConfig(device_megabytes=5 * EACH / 1e6, disk_megabytes=6 * EACH / 1e6))
    wrong: list[int] = []

    def work(seed: int) -> None:
        for z in np.random.default_rng(seed).integers(0, 20, 150):
            found = cache.get(image, CROP, int(z))
            if found is None:
                cache.put(image, CROP, int(z), features(int(z)))
            elif not same(found, features(int(z))):
                wrong.append(int(z))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache.close()
    assert not wrong


def prompts() -> list[Prompt]:
    box = np.array([[6.0, 13, 5], [24, 27, 13]])
    points = np.array([[15.0, 20, 9], [18, 22, 11], [38, 2, 3]])
    return [Prompt(points=points[:n], labels=np.array([1, 0, 1])[:n], box=box) for n in range(4)]


def watch(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    encode = predictor.model.segmenter.encode
    monkeypatch.setattr(predictor.model.segmenter, "encode", lambda images: calls.append(len(images)) or encode(images))
    return calls


def test_two_annotators_of_an_image_encode_once_and_get_what_a_lone_one_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    volume, _ = oblique_volume()
    shared, lone = small_predictor(), small_predictor()
    first, second = shared.open(volume), shared.open(volume)
    assert first.image is second.image
    calls = watch(shared, monkeypatch)
    alone = [lone.segment_prompt(lone.open(volume), prompt).mask for prompt in prompts()]
    session = lone.open(volume)
    stepwise = [lone.segment_prompt(session, prompt).mask for prompt in prompts()]
    for prompt, wanted in zip(prompts(), stepwise, strict=True):
        assert np.array_equal(shared.segment_prompt(first, prompt).mask, wanted)
    encoded = len(calls)
    assert encoded > 0
    for prompt, wanted in zip(prompts(), stepwise, strict=True):
        assert np.array_equal(shared.segment_prompt(second, prompt).mask, wanted)
    assert len(calls) == encoded
    assert np.array_equal(alone[0], stepwise[0])
    assert first.shared.look is second.shared.look is not None


def test_masks_do_not_depend_on_the_budget() -> None:
    volume, _ = oblique_volume()
    ample, none = small_predictor(), small_predictor()
    none = Predictor(none.model, none.meta, cache=CacheConfig(device_megabytes=0))
    one, other = ample.open(volume), none.open(volume)
    for prompt in prompts():
        assert np.array_equal(ample.segment_prompt(one, prompt).mask, none.segment_prompt(other, prompt).mask)
    assert none.cache.bytes == (0, 0, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs CUDA")
def test_slices_wait_in_pinned_memory(image: np.ndarray) -> None:
    cache = FeatureCache(CacheConfig(device_megabytes=2 * EACH / 1e6, pinned_megabytes=3 * EACH / 1e6))
    for z in range(8):
        parts = features(z)
        cache.put(image, CROP, z, SliceFeatures(*(getattr(parts, n).cuda() for n in parts.__dataclass_fields__)))
    assert cache.bytes == (2 * EACH, 3 * EACH, 0)
    back = cache.get(image, CROP, 3)
    assert back is not None
    assert back.fine.is_cuda
    assert torch.equal(back.fine.cpu(), features(3).fine)
