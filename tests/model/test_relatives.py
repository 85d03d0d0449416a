"""The relatives' mask and box scores by hand, and where they part from ours."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medvl_sam2.errors import DataError
from medvl_sam2.evaluation import boxes, metrics, relatives
from medvl_sam2.evaluation.boxes import FractionBox
from medvl_sam2.evaluation.surface import surface_dice


def block(shape: tuple[int, int, int], low: tuple[int, int, int], high: tuple[int, int, int]) -> np.ndarray:
    """Bool mask with the voxels from low to high, both inclusive."""
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))] = True
    return mask


SHAPE = (8, 20, 10)
TRUTH = block(SHAPE, (2, 4, 1), (3, 8, 4))  # 2 x 5 x 4 = 40 voxels
FOUND = block(SHAPE, (2, 6, 1), (3, 9, 4))  # 32 voxels, 24 of them shared


def test_dice_rules_by_hand() -> None:
    counts = metrics.overlap(TRUTH, FOUND)
    assert (counts.both, counts.truth, counts.prediction) == (24, 40, 32)
    assert counts.dice == pytest.approx(48 / 72)
    assert relatives.m3d_dice(counts) == pytest.approx(48 / 73)
    assert relatives.medsam2_dice(counts) == pytest.approx(49 / 73)
    assert relatives.totalsegmentator_dice(counts) == pytest.approx(48 / (72 + 1e-6))


def test_soft_dice_of_hard_probabilities_is_the_rule_for_masks() -> None:
    counts = metrics.overlap(TRUTH, FOUND)
    assert relatives.m3d_soft_dice(TRUTH, FOUND.astype(np.float32)) == pytest.approx(relatives.m3d_dice(counts))
    half = np.full(SHAPE, 0.5)
    assert relatives.m3d_soft_dice(TRUTH, half) == pytest.approx(2 * 20 / (800 + 40 + 1))
    with pytest.raises(DataError, match="do not fit"):
        relatives.m3d_soft_dice(TRUTH, half[:4])


def test_empty_truths_part_the_rules() -> None:
    nothing = np.zeros(SHAPE, dtype=bool)
    invented, agreed = metrics.overlap(nothing, FOUND), metrics.overlap(nothing, nothing)
    assert agreed.dice is None
    assert invented.dice == 0.0
    assert relatives.m3d_soft_dice(nothing, nothing.astype(float)) == 0.0  # right, and still nought
    assert relatives.medsam2_dice(agreed) == 1.0
    assert math.isnan(relatives.totalsegmentator_dice(invented))
    assert math.isnan(relatives.totalsegmentator_surface_dice(nothing, FOUND, (1, 1, 1)))
    assert relatives.totalsegmentator_surface_dice(TRUTH, nothing, (1, 1, 1)) == 0.0


def test_medsam2_mean_over_the_labels_of_the_truth() -> None:
    truth = np.zeros(SHAPE, dtype=np.uint8)
    truth[0], truth[1] = 3, 7  # 200 voxels each
    found = np.where(truth == 3, 3, 0).astype(np.uint8)
    found[5] = 9  # a label the truth lacks is not looked at
    assert relatives.medsam2_dice_of_labels(truth, found) == pytest.approx((401 / 401 + 1 / 201) / 2)
    with pytest.raises(DataError, match="one value only"):
        relatives.medsam2_dice_of_labels(np.zeros(SHAPE), found)


def test_surface_tolerance_is_three_millimetres() -> None:
    shifted = np.roll(TRUTH, 1, axis=1)
    spacing = (5.0, 2.6, 1.0)
    ours = surface_dice(TRUTH, shifted, spacing, 2.0)
    assert ours is not None
    assert relatives.totalsegmentator_surface_dice(TRUTH, shifted, spacing) == pytest.approx(1.0)
    assert ours < 0.95


def test_box_as_text_and_back() -> None:
    box = boxes.box_of(TRUTH)
    assert box is not None
    assert str(box) == "[0.25, 0.2, 0.1, 0.375, 0.4, 0.4]"
    assert boxes.parse_box(f"It is at {box}.") == box
    assert boxes.box_of(np.zeros(SHAPE, dtype=bool)) is None
    assert boxes.parse_box("[0.1, 0.2, 0.3]") is None
    with pytest.raises(DataError, match="not a volume"):
        boxes.box_of(TRUTH[0])


def test_voxel_iou_by_hand_and_enclosing_iou_is_stricter() -> None:
    truth, found = boxes.box_of(TRUTH), boxes.box_of(FOUND)
    assert truth is not None
    assert found is not None
    score = boxes.score_box(truth, found, SHAPE)
    assert score.iou == pytest.approx(24 / (40 + 32 - 24))
    # Inclusive corners as fractions: 0.125 x 0.1 x 0.3 shared, 0.125 x 0.25 x 0.3 round both.
    assert score.m3d == pytest.approx(0.1 / 0.25, rel=1e-3)
    assert boxes.score_box(truth, None, SHAPE) == boxes.BoxScore(0.0, -1.0)


def test_a_thin_object_found_exactly_scores_one_by_voxels_and_nought_by_m3d() -> None:
    thin = boxes.box_of(block(SHAPE, (2, 4, 1), (2, 8, 4)))
    assert thin is not None
    assert boxes.score_box(thin, thin, SHAPE) == boxes.BoxScore(1.0, 0.0)


def test_voxel_iou_matches_masks_on_random_boxes() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        masks = []
        for _ in range(2):
            ends = [np.sort(rng.integers(0, n, size=2)) for n in SHAPE]
            masks.append(block(SHAPE, tuple(e[0] for e in ends), tuple(e[1] for e in ends)))
        first, second = (boxes.box_of(mask) for mask in masks)
        assert first is not None
        assert second is not None
        expected = (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()
        assert boxes.voxel_iou(first, second, SHAPE) == pytest.approx(expected)
        assert boxes.voxel_iou(second, first, SHAPE) == pytest.approx(expected)


def test_swapped_corners_hold_nothing() -> None:
    turned = FractionBox((0.5, 0.5, 0.5), (0.1, 0.1, 0.1))
    assert boxes.voxel_iou(turned, turned, SHAPE) == 0.0
