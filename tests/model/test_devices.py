"""Where the predictor computes and in which numbers; a GPU is pretended, so that it is tested on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from medvl_sam2.checkpoint import CheckpointMeta
from medvl_sam2.errors import ConfigError
from medvl_sam2.modeling.compute import Precision, compute_device
from medvl_sam2.modeling.slice_segmenter import SlicePrompt, SliceSegmenter
from medvl_sam2.predictor import Predictor, placed_segmenter
from medvl_sam2.predictor.placed_segmenter import PlacedSegmenter
from medvl_sam2.types import Prompt, Volume
from pretended_gpu import GPU, OnGpu, pretended_gpu
from small_model import SMALL_SLICES, oblique_volume, small_model, small_predictor

POINT, SECOND = [15, 20, 9], [18, 24, 9]


@pytest.fixture(scope="module")
def volume() -> Volume:
    return oblique_volume()[0]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Predictor]:
    with pretended_gpu(monkeypatch):
        meta = CheckpointMeta(name="test", version="0", notice="random test weights")
        yield Predictor(small_model().to(GPU), meta, precision="float32")


def clicks(*points: list[int], box: bool = False) -> Prompt:
    """Foreground points, the last of several background; with a box round the object."""
    labels = [1] * len(points)
    if len(points) > 1:
        labels[-1] = 0
    corners = np.array([[7, 14, 6], [23, 26, 12]]) if box else None
    return Prompt(np.array(points).reshape(-1, 3), np.array(labels), corners)


def test_the_pretence_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_gpu(monkeypatch):
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert isinstance(there, OnGpu)
        assert there.device == GPU
        assert (there + there).cpu().tolist() == [2, 2, 2]
        with pytest.raises(RuntimeError, match="same device"):
            there + here
        with pytest.raises(TypeError, match="cuda"):
            there.numpy()


def test_objects_are_the_same_as_on_the_cpu(on_gpu: Predictor, volume: Volume) -> None:
    """From a box, a click and a mask, with a correction, a pass through the whole object, undo and redo."""
    prompts = {"box": [clicks(box=True), clicks(POINT, SECOND, box=True)], "click": [clicks(POINT)]}
    found: list[list[np.ndarray]] = []
    for predictor in (on_gpu, small_predictor()):
        session, masks = predictor.open(volume), []
        for name, steps in prompts.items():
            masks += [predictor.segment_prompt(session, prompt, name).mask for prompt in steps]
        everywhere = Prompt(steps[-1].points, steps[-1].labels, propagate=True)
        masks.append(predictor.segment_prompt(session, everywhere, name).mask)
        masks += [predictor.undo(session, name).mask, predictor.redo(session, name).mask]
        taken = Prompt(np.array([POINT]), np.array([1]), mask=masks[0] > 0)
        found.append([*masks, predictor.segment_prompt(session, taken, "mask").mask])
    assert any(mask.any() for mask in found[0])
    for there, here in zip(*found, strict=True):
        assert np.array_equal(there, here)


def test_words_are_the_same_as_on_the_cpu(on_gpu: Predictor, volume: Volume) -> None:
    there, here = on_gpu, small_predictor()
    sessions = there.open(volume), here.open(volume)
    names = ("liver", "lesion")
    both = [predictor.segment_classes(s, names) for predictor, s in zip((there, here), sessions, strict=True)]
    assert np.array_equal(both[0].mask, both[1].mask)
    assert both[0].scores == pytest.approx(both[1].scores, abs=1e-5)
    assert there.answer(sessions[0], "Is there a lesion?") == here.answer(sessions[1], "Is there a lesion?")
    assert there.report(sessions[0]) == here.report(sessions[1])
    said = [predictor.segment_text(s, "the liver") for predictor, s in zip((there, here), sessions, strict=True)]
    assert said[0].text == said[1].text
    assert np.array_equal(said[0].mask, said[1].mask)
    assert there.uncertainty(sessions[0]) == pytest.approx(here.uncertainty(sessions[1]), abs=1e-5)
    assert sessions[0].shared.look.elements.maps.device.type == "cpu"


@pytest.mark.parametrize(
    ("name", "gpus", "wanted"),
    [("auto", 0, "cpu"), ("auto", 2, "cuda"), ("cpu", 2, "cpu"), ("cuda", 1, "cuda"), ("cuda:1", 2, "cuda:1")],
)
def test_a_device_by_name(name: str, gpus: int, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert str(compute_device(name)) == wanted


@pytest.mark.parametrize(("name", "complaint"), [("gpu", "use auto"), ("mps", "not supported"), ("cuda:2", "2 CUDA")])
def test_a_device_that_is_not_there_is_refused(name: str, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=complaint):
        compute_device(name)


@pytest.mark.parametrize(
    ("units", "size", "asked", "wanted"),
    [
        (True, 256, "auto", "bfloat16"),
        (True, 64, "auto", "float32"),
        (False, 256, "auto", "float32"),
        (True, 256, "float32", "float32"),
        (False, 64, "bfloat16", "bfloat16"),
    ],
)
def test_bfloat16_where_it_pays(
    units: bool, size: int, asked: Precision, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placed_segmenter, "has_bfloat16_units", lambda _: units)
    model = SliceSegmenter(replace(SMALL_SLICES, image_size=size))
    assert PlacedSegmenter(model, asked).precision == wanted


@torch.inference_mode()
def test_bfloat16_gives_the_same_twice_and_nearly_that_of_float32() -> None:
    model = small_model().segmenter
    exact, rounded = PlacedSegmenter(model, "float32"), PlacedSegmenter(model, "bfloat16")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(5)) * 2 - 1
    prompt = SlicePrompt(torch.full((2, 1, 2), 30.0), torch.ones(2, 1, dtype=torch.int32))
    logits = []
    for segmenter in (exact, rounded, rounded):
        features = segmenter.encode(images)
        first = segmenter.decode(features, prompt)
        memory = segmenter.remember(features, first.logits, first.presence, first.pointer, prompted=True)
        fused = segmenter.attend(features, 1, {0: memory}, {}, 4, reverse=False)
        logits.append(segmenter.decode(features, SlicePrompt.empty(2), fused).logits)
        held = torch.float32 if segmenter is exact else torch.bfloat16
        assert {part.dtype for part in (features.fine, features.middle, features.coarse)} == {held}
        assert logits[-1].dtype == torch.float32
    assert torch.equal(logits[1], logits[2])
    gap = float((logits[1] - logits[0]).abs().max() / logits[0].abs().max())
    assert 0 < gap < 0.05
