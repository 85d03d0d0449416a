"""The brush: how thick a stroke gets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from medvl_sam2.predictor.first_prompts import InteractiveConfig
from medvl_sam2.region_assist import GROW_BRUSH, IntensityRule, depth, stroke

SPACING = (3.0, 1.0, 0.8)
SHAPE = (30, 120, 150)
POINT = np.array([15.0, 60.0, 110.0])


@pytest.fixture
def rod() -> np.ndarray:
    """A rod along x, 10 mm wide; what is missing lies 40 mm further on."""
    mask = np.zeros(SHAPE, dtype=bool)
    mask[13:17, 55:65, 20:60] = True
    return mask


def test_depth_is_half_the_smallest_thickness_in_mm(rod: np.ndarray) -> None:
    assert depth(rod, np.array(SPACING)) == pytest.approx(5.0, abs=1.0)
    thick = np.zeros((200, 200, 200), dtype=bool)
    thick[20:180, 20:180, 20:180] = True  # measured on every fourth voxel
    assert depth(thick, np.ones(3)) == pytest.approx(80, rel=0.06)


def test_a_far_foreground_stroke_is_held_by_the_thickness_of_the_object(rod: np.ndarray) -> None:
    image = np.zeros(SHAPE, dtype=np.int16)  # no edge holds the stroke back
    free = stroke(image, SPACING, rod, POINT, 1, 0.0, IntensityRule())
    held = stroke(image, SPACING, rod, POINT, 1, 0.0, InteractiveConfig().assist_rule)
    assert held[tuple(POINT.astype(int))]
    assert np.ptp(np.argwhere(free)[:, 1]) > 40
    assert np.ptp(np.argwhere(held)[:, 1]) <= 30


def test_of_a_mask_far_too_small_a_stroke_keeps_a_share(rod: np.ndarray) -> None:
    speck = np.zeros(SHAPE, dtype=bool)
    speck[tuple(np.argwhere(rod)[0])] = True
    held, free = InteractiveConfig().assist_rule.brush, GROW_BRUSH
    wide = free.radius(speck, POINT, 1, np.array(SPACING), 0.0)
    assert held.radius(speck, POINT, 1, np.array(SPACING), 0.0) == pytest.approx(0.3 * wide)
    line = np.zeros((1, 96, 96), dtype=bool)
    line[0, np.arange(96), 95 - np.arange(96)] = True  # every other voxel would miss it
    assert depth(line, np.ones(3)) >= 1.0


def test_background_strokes_and_empty_masks_are_not_held(rod: np.ndarray) -> None:
    held, free = replace(GROW_BRUSH, depth_share=1.0), GROW_BRUSH
    inside = np.array([15.0, 60.0, 40.0])
    spacing = np.array(SPACING)
    assert held.radius(rod, inside, 0, spacing, 0.0) == free.radius(rod, inside, 0, spacing, 0.0)
    empty = np.zeros(SHAPE, dtype=bool)
    assert held.radius(empty, POINT, 1, spacing, 0.0) == free.radius(empty, POINT, 1, spacing, 0.0)
