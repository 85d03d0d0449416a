"""The simulated annotator follows the CVPR 2025 rule."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from medvl_sam2.errors import DataError
from medvl_sam2.training import clicks
from medvl_sam2.training.clicks import box_prompt, box_prompt_2d, middle_slice, next_click, next_click_2d


def block(shape: tuple[int, ...], *spans: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(low, high) for low, high in spans)] = True
    return mask


def test_first_click_is_the_deepest_point_of_the_object() -> None:
    truth = block((20, 30, 40), (3, 12), (5, 14), (20, 29))
    click = next_click(truth, None)
    assert click is not None
    assert (click.position, click.label) == ((7, 9, 24), 1)


def test_click_goes_to_the_largest_error_not_the_thickest() -> None:
    truth = np.zeros((20, 60, 60), dtype=bool)
    prediction = truth.copy()
    truth[8:13, 8:13, 8:13] = True  # missed cube, 125 voxels, depth 3
    prediction[2, 20:50, 20:50] = True  # invented sheet, 900 voxels, depth 1
    click = next_click(truth, prediction)
    assert click is not None
    assert click.position[0] == 2
    assert click.label == 0


def test_diagonal_neighbours_are_one_component() -> None:
    truth = np.zeros((10, 10, 10), dtype=bool)
    for n in range(5):
        truth[n, n, n] = True
    truth[8, 5:9, 0] = True  # four voxels in a row: fewer than the five of the diagonal
    click = next_click(truth, None)
    assert click is not None
    assert len(set(click.position)) == 1


def test_depth_ignores_spacing_and_the_border_is_a_surface() -> None:
    # 4 x 9 x 9 voxels, open to the border on three sides: deepest half way through each axis.
    truth = block((4, 21, 21), (0, 4), (0, 9), (6, 15))
    click = next_click(truth, None)
    assert click is not None
    assert click.position[0] in (1, 2)
    depth = ndimage.distance_transform_edt(np.pad(truth, 1))[1:-1, 1:-1, 1:-1]
    assert depth[click.position] == depth.max() == 2


def test_ties_are_drawn_as_the_protocol_draws_them() -> None:
    # A rod one voxel thick: every voxel is as deep.
    truth = block((3, 3, 41), (1, 2), (1, 2), (1, 40))
    click = next_click(truth, None)
    assert click is not None
    rng = np.random.RandomState(42)
    assert click.position == (1, 1, 1 + rng.choice(39))


@pytest.mark.parametrize("seed", range(6))
def test_the_crop_changes_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.standard_normal((24, 40, 36)), 3)
    truth, prediction = field > 0.02, np.roll(field, 3, axis=2) > 0.03
    click = next_click(truth, prediction)
    assert click is not None
    labels, _ = ndimage.label(truth ^ prediction, np.ones((3, 3, 3)))
    largest = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    depth = ndimage.distance_transform_edt(np.pad(largest, 1))[1:-1, 1:-1, 1:-1]
    assert depth[click.position] == pytest.approx(depth.max())
    assert click.label == int(truth[click.position])


@pytest.mark.parametrize("seed", range(4))
def test_large_errors_are_measured_in_blocks_of_two(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocol's short cut, written out on the protocol's own padded crop."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((31, 50, 44), dtype=bool)
    low, high = rng.integers(1, 8, 3), np.array([31, 50, 44]) - rng.integers(1, 8, 3)
    field = ndimage.gaussian_filter(rng.standard_normal(tuple(high - low)), 4)
    inner = truth[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    inner |= field > np.quantile(field, 0.6)
    monkeypatch.setattr(clicks, "LARGE_CROP_VOXELS", 1000)
    click = next_click(truth, None)
    assert click is not None
    labels, _ = ndimage.label(truth, np.ones((3, 3, 3)))
    where = np.argwhere(labels == 1 + np.argmax(np.bincount(labels.ravel())[1:]))
    size = np.ptp(where, axis=0) + 1
    margin = np.maximum((size * 0.25).astype(int), 1)
    crop = np.zeros(size + 2 * margin, dtype=bool)
    crop[tuple((where - where.min(0) + margin).T)] = True
    whole = np.zeros(crop.shape + np.array(crop.shape) % 2, dtype=bool)
    whole[tuple(slice(0, n) for n in crop.shape)] = crop
    halves = np.zeros(np.array(whole.shape) // 2, dtype=bool)
    for corner in np.ndindex(2, 2, 2):
        halves |= whole[tuple(slice(start, None, 2) for start in corner)]
    coarse = ndimage.distance_transform_edt(halves)
    places = np.argwhere(crop)
    depth = coarse[tuple((places // 2).T)]
    deepest = places[depth == depth.max()] - margin + where.min(0)
    assert list(click.position) == deepest[np.random.RandomState(42).choice(len(deepest))].tolist()


def test_ties_are_drawn_the_same_way_every_time() -> None:
    truth = block((6, 6, 40), (2, 3), (2, 3), (1, 39))
    assert next_click(truth, None) == next_click(truth, None)


def test_nothing_to_correct_gives_no_click() -> None:
    truth = block((5, 5, 5), (1, 3), (1, 3), (1, 3))
    assert next_click(truth, truth.copy()) is None
    assert next_click(np.zeros_like(truth), None) is None


def test_a_volume_that_is_all_object_still_gets_a_click() -> None:
    click = next_click(np.ones((3, 4, 5), dtype=bool), None)
    assert click is not None
    assert click.label == 1


def test_shapes_are_checked() -> None:
    with pytest.raises(DataError, match="does not fit"):
        next_click(np.ones((3, 3, 3), dtype=bool), np.ones((3, 3, 4), dtype=bool))
    with pytest.raises(DataError, match="use next_click_2d"):
        next_click(np.ones((3, 3), dtype=bool), None)
    with pytest.raises(DataError, match="use next_click"):
        next_click_2d(np.ones((3, 3, 3), dtype=bool), None)


def test_training_clicks_vary_inside_the_core_only() -> None:
    truth = block((41, 41), (5, 36), (5, 36))
    depth = ndimage.distance_transform_edt(truth)
    rng = np.random.default_rng(1)
    clicks = [next_click_2d(truth, None, rng, core=0.5) for _ in range(50)]
    positions = {click.position for click in clicks if click is not None}
    assert len(positions) > 10
    assert all(depth[position] >= 0.5 * depth.max() for position in positions)


def test_box_takes_the_middle_slice_in_plane_and_all_slices_in_z() -> None:
    truth = np.zeros((12, 30, 30), dtype=bool)
    truth[2, 1:29, 1:29] = True
    truth[5, 10:14, 12:20] = True  # the middle one of slices 2, 5, 9
    truth[9, 0:3, 0:3] = True
    assert middle_slice(truth) == 5
    assert box_prompt(truth).tolist() == [[2, 10, 12], [9, 13, 19]]
    with pytest.raises(DataError, match="empty"):
        box_prompt(np.zeros_like(truth))


def test_jittered_boxes_stay_on_the_slice_and_in_order() -> None:
    truth = block((20, 20), (0, 4), (15, 20))
    rng = np.random.default_rng(3)
    boxes = np.array([box_prompt_2d(truth, rng, jitter=0.4) for _ in range(100)])
    assert boxes.min() >= 0
    assert boxes.max() <= 19
    assert (boxes[:, 1] >= boxes[:, 0]).all()
    assert len(np.unique(boxes.reshape(100, 4), axis=0)) > 5
    assert box_prompt_2d(truth).tolist() == [[0, 15], [3, 19]]
