"""First prompts on a hand-made scene: what starts from an element, in which window, and what does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from medvl_sam2.geometry import SliceCrop
from medvl_sam2.intensity import SliceIntensity
from medvl_sam2.modeling.scene_pointer import SceneElements
from medvl_sam2.modeling.slice_segmenter import SliceFeatures, SliceOutput, SlicePrompt
from medvl_sam2.predictor.edits import CanonicalClick
from medvl_sam2.predictor.first_prompts import FirstPrompts, InteractiveConfig
from medvl_sam2.predictor.objects import ObjectState
from medvl_sam2.predictor.placed_segmenter import PlacedSegmenter
from medvl_sam2.predictor.places import MatchRule, elements_at
from medvl_sam2.predictor.stack import SliceStack
from medvl_sam2.types import Modality
from small_model import small_model

SHAPE, SPACING = (24, 48, 64), (4.0, 2.0, 1.5)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).normal(40, 10, SHAPE).astype(np.int16)


@pytest.fixture(scope="module")
def intensity(image: np.ndarray) -> SliceIntensity:
    return SliceIntensity.of(image, Modality.CT)


@pytest.fixture(scope="module")
def first() -> FirstPrompts:
    return FirstPrompts(PlacedSegmenter(small_model().segmenter), InteractiveConfig())


@pytest.fixture
def elements() -> SceneElements:
    """Organ 0 on planes 6..11, rows 12..23, columns 16..31 of the volume; a lesion in it; a stray cell far away."""
    maps = torch.full((3, 12, 24, 32), -7.0)
    maps[0, 3:6, 6:12, 8:16] = 7.0
    maps[0, 11, 23, 31] = 7.0
    maps[1, 4:6, 8:10, 10:12] = 7.0
    return SceneElements(torch.zeros(3, 8), maps, organs=1)


@torch.inference_mode()
def test_a_box_round_an_element_starts_from_its_map(
    first: FirstPrompts, image: np.ndarray, intensity: SliceIntensity, elements: SceneElements
) -> None:
    box = np.array([[6.0, 12.0, 16.0], [11.0, 23.0, 31.0]])
    state = first.from_box(image, SPACING, intensity, box, elements)
    assert state.from_scene
    assert sorted(state.rough) == list(range(6, 12))
    inside = SliceCrop.forward_points(state.stack.crop, np.array([[17.5, 23.5]]))[0] / 4
    column, row = (int(v) for v in inside)
    assert float(state.rough[8][row, column]) > 0.9
    assert float(state.rough[8][0, 0]) < 0.1
    other = first.from_box(image, SPACING, intensity, np.array([[0.0, 0.0, 0.0], [4.0, 40.0, 60.0]]), elements)
    assert not other.from_scene


@torch.inference_mode()
def test_a_click_means_the_part_the_decoder_agrees_with(
    first: FirstPrompts, image: np.ndarray, intensity: SliceIntensity, elements: SceneElements
) -> None:
    crop = SliceCrop.around(np.array([[12, 16], [23, 31]]), SPACING[1:], 1.7, first.segmenter.config.image_size, 1.0)
    click = CanonicalClick((9.0, 17.0, 21.0), 1)  # in the lesion
    size = first.segmenter.mask_size

    def meant(rows: slice, columns: slice) -> np.ndarray | None:
        full = torch.full((1, *SHAPE[1:]), -5.0)
        full[0, rows, columns] = 5.0
        small = SliceCrop(crop.center_mm, crop.extent_mm, size, crop.spacing_yx)
        state = ObjectState(SliceStack(first.segmenter, image, intensity, crop), 9, 9, start=9)
        state.logits[9] = small.sample(full, pad=-5.0)[0, 0]
        part = first._part_meant(state, elements, click, SPACING)
        return None if part is None else np.argwhere(part.found).max(axis=0)

    organ, lesion = meant(slice(12, 24), slice(16, 32)), meant(slice(16, 20), slice(20, 24))
    assert organ is not None
    assert lesion is not None
    assert organ.tolist() == [5, 11, 15]  # without the stray cell
    assert lesion.tolist() == [5, 9, 11]
    assert meant(slice(0, 12), slice(0, 16)) is None


@torch.inference_mode()
def test_a_click_on_a_part_works_in_the_parts_own_window_and_range(
    first: FirstPrompts, image: np.ndarray, intensity: SliceIntensity, elements: SceneElements
) -> None:
    click = CanonicalClick((8.0, 22.0, 30.0), 1)
    (part,) = elements_at(elements, click.position, SHAPE, MatchRule())
    whole = SliceCrop.whole(SHAPE[1:], SPACING[1:], first.segmenter.config.image_size, 1.0)
    fresh = ObjectState(SliceStack(first.segmenter, image, intensity, whole), 6, 11, start=8, clicks=[click])
    state = first._from_part(fresh, part, SPACING)
    assert list(state.memory.conditioning) == [8]
    assert state.stack.crop.extent_mm == pytest.approx(1.7 * 24.0)
    assert set(state.logits) <= set(range(6, 12))
    assert state.mask()[8, 22, 30]


@torch.inference_mode()
def test_a_box_that_fits_loosely_asks_what_is_on_the_slice(
    first: FirstPrompts, image: np.ndarray, intensity: SliceIntensity, elements: SceneElements
) -> None:
    strict = FirstPrompts(first.segmenter, InteractiveConfig(match=MatchRule(agreement=1.01)))
    tight, loose = np.array([[6.0, 12.0, 16.0], [11.0, 23.0, 31.0]]), np.array([[6.0, 12.0, 16.0], [11.0, 23.0, 39.0]])
    assert strict.from_box(image, SPACING, intensity, tight, elements).from_scene
    state = strict.from_box(image, SPACING, intensity, loose, elements)
    assert not state.from_scene
    assert state.rough  # the intensity-grown region stands


@torch.inference_mode()
def test_the_window_holds_the_element_where_the_box_shows_one_section(
    first: FirstPrompts, image: np.ndarray, intensity: SliceIntensity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An organ that wanders: the box was drawn on the middle slice and given the first and last slice."""
    decode = first.segmenter.decode

    def echo(features: SliceFeatures, prompt: SlicePrompt) -> SliceOutput:
        assert prompt.mask_logits is not None
        return replace(decode(features, prompt), logits=prompt.mask_logits)

    monkeypatch.setattr(first.segmenter, "decode", echo)
    maps = torch.full((2, 12, 24, 32), -7.0)
    for plane in range(2, 10):
        maps[0, plane, 2 * plane : 2 * plane + 4, 10:16] = 7.0
    box = np.array([[4.0, 24.0, 20.0], [19.0, 31.0, 31.0]])  # planes 2..9; rows of plane 6
    state = first.from_box(image, SPACING, intensity, box, SceneElements(torch.zeros(2, 8), maps, organs=1))
    assert state.from_scene
    corners = SliceCrop.forward_points(state.stack.crop, np.array([[8.0, 20.0], [43.0, 31.0]]))
    assert corners.min() >= 0
    assert corners.max() <= first.segmenter.config.image_size - 1
    assert sorted(state.rough) == list(range(4, 20))
    mask = state.mask()
    assert mask.any(axis=(1, 2)).nonzero()[0].tolist() == list(range(4, 20))
    for z in range(4, 20):  # the decoder that repeats its mask prompt draws every slice's own section of the map
        plane = 4 * (z // 2)
        rows, columns = np.nonzero(mask[z])
        assert abs(rows.mean() - (plane + 3.5)) < 2  # planes lie four rows apart, and the map is smooth
        assert abs(columns.mean() - 25.5) < 0.6
        assert 40 < mask[z].sum() < 130  # of 96; less where the map turns into the next plane
