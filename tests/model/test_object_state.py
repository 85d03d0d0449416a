"""What an object's mask keeps at full resolution while its logits are coarse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medvl_sam2.geometry import SliceCrop
from medvl_sam2.intensity import SliceIntensity
from medvl_sam2.predictor.edits import CanonicalClick
from medvl_sam2.predictor.objects import ObjectState
from medvl_sam2.predictor.placed_segmenter import PlacedSegmenter
from medvl_sam2.predictor.stack import SliceStack
from medvl_sam2.types import Modality
from small_model import small_model

SHAPE = (12, 90, 120)
SPACING = (3.0, 1.0, 0.8)


def window(half_mm: float, stack_size: int) -> SliceCrop:
    corners = np.array([[45 - half_mm, 60 - half_mm / 0.8], [45 + half_mm, 60 + half_mm / 0.8]])
    return SliceCrop.around(corners, SPACING[1:], 1.0, stack_size, 10.0)


@pytest.fixture
def thin() -> np.ndarray:
    """A slanted rod two voxels thick: finer than the decoder's cells in any window that holds it."""
    mask = np.zeros(SHAPE, dtype=bool)
    for z in range(3, 9):
        for y in range(20, 70):
            mask[z, y, y + 10 : y + 12] = True
    return mask


@pytest.fixture
def state(thin: np.ndarray) -> ObjectState:
    """The rod taken over in a tight window, with the logits that its cells give."""
    segmenter = PlacedSegmenter(small_model().segmenter)
    image = np.zeros(SHAPE, dtype=np.int16)
    crop = window(32.0, segmenter.config.image_size)
    stack = SliceStack(segmenter, image, SliceIntensity.of(image, Modality.CT), crop)
    state = ObjectState(stack, 3, 8)
    size = segmenter.mask_size
    rows = np.linspace(0, size - 1, size)
    soft = np.exp(-((rows[:, None] - rows[None]) ** 2) / 4)
    state.logits = {z: torch.from_numpy(12 * soft - 6).float() for z in range(3, 9)}
    return state


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_cells_alone_lose_a_thin_object(state: ObjectState, thin: np.ndarray) -> None:
    assert dice(state.mask(), thin) < 0.7  # the control of the tests below


def test_a_wider_window_leaves_the_mask_as_it_is(state: ObjectState, thin: np.ndarray) -> None:
    state.keep(thin)
    assert np.array_equal(state.mask(), thin)
    moved = state.moved(window(44.0, state.stack.crop.size))
    assert np.array_equal(moved.mask(), thin)
    assert np.array_equal(moved.moved(window(42.0, state.stack.crop.size)).mask(), thin)


def test_only_where_the_logits_move_against_it_the_mask_follows_them(state: ObjectState, thin: np.ndarray) -> None:
    state.keep(thin)
    before = state.mask()
    size = state.stack.segmenter.mask_size
    state.logits[5] = state.logits[5].clone()
    state.logits[5][: size // 4] = -9.0  # a quarter of one slice is taken away
    state.logits[6] = state.logits[6] - 0.3  # hardly moved, though some change sign
    after = state.mask()
    changed = np.argwhere(before != after)
    assert set(changed[:, 0]) == {5}
    assert changed[:, 1].max() < 45
    rows = state.stack.crop.forward_points(changed[:, 1:].astype(float))[:, 1] / state.stack.crop.size * size
    assert rows.max() < size // 4 + 1
    held = np.argwhere(before[5] & after[5]).astype(float)
    left = state.stack.crop.forward_points(held)[:, 1] / state.stack.crop.size * size
    assert left.min() > size // 4 - 1  # also where the cells had drawn nothing there is nothing left


def test_slices_beyond_the_kept_ones_follow_the_logits(state: ObjectState, thin: np.ndarray) -> None:
    state.keep(thin)
    state.high = 10
    size = state.stack.segmenter.mask_size
    for z in (9, 10):
        state.logits[z] = torch.full((size, size), 5.0)
    after = state.mask()
    assert np.array_equal(after[:9], thin[:9])
    assert after[9:11].any()
    assert not after[11].any()


def test_a_clicked_voxel_is_kept_whatever_was_drawn(state: ObjectState, thin: np.ndarray) -> None:
    state.clicks.append(CanonicalClick((5.0, 45.0, 55.0), 0))
    state.clicks.append(CanonicalClick((5.0, 30.0, 80.0), 1))
    wanted = thin.copy()
    wanted[5, 45, 55] = False
    wanted[5, 30, 80] = True
    state.keep(thin)
    assert np.array_equal(state.mask(), wanted)
