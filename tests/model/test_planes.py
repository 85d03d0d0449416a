"""Boxes on one plane: which axis they leave open, and what fills it."""

from __future__ import annotations

import numpy as np
import pytest

from medvl_sam2.predictor.planes import completed, thickened, thin_axis

SHAPE = (20, 60, 80)
SPACING = (4.0, 1.0, 0.5)


@pytest.mark.parametrize(
    ("box", "shape", "axis"),
    [
        ([[5, 10, 10], [5, 30, 40]], SHAPE, 0),
        ([[2, 10, 10], [9, 10, 40]], SHAPE, 1),
        ([[2, 10, 10.2], [9, 30, 9.8]], SHAPE, 2),
        ([[2, 10, 10], [9, 30, 40]], SHAPE, None),
        ([[5, 10, 10], [5, 10, 40]], SHAPE, None),  # a line says nothing of a plane
        ([[0, 10, 10], [0, 30, 40]], (1, 60, 80), None),  # the volume is one slice
    ],
)
def test_the_axis_across_a_flat_box(box: list[list[float]], shape: tuple[int, ...], axis: int | None) -> None:
    assert thin_axis(np.array(box, dtype=float), shape) == axis


def test_a_flat_box_is_thickened_in_mm_inside_the_volume() -> None:
    on_slice = np.array([[5.0, 10, 10], [5, 29, 49]])  # 20 mm by 20 mm
    assert thickened(on_slice, 0, SHAPE, SPACING).tolist() == [[2, 10, 10], [8, 29, 49]]
    along = np.array([[0.0, 10, 3], [4, 29, 3]])  # 20 mm by 20 mm on a plane of x
    assert thickened(along, 2, SHAPE, SPACING).tolist() == [[0, 10, 0], [4, 29, 23]]


def test_the_first_mask_that_the_box_runs_through_completes_it() -> None:
    box = np.array([[2.0, 10, 30], [9, 20, 30]])  # on a plane of x
    other = np.zeros(SHAPE[1:], dtype=bool)
    other[40:50, 20:60] = True
    mask = other.copy()
    mask[12:18, 25:44] = True
    empty = np.zeros_like(mask)
    assert completed(box, mask, other).tolist() == [[2, 10, 25], [9, 20, 43]]
    assert completed(box, empty, other, mask).tolist() == [[2, 10, 25], [9, 20, 43]]
    assert completed(box, empty, other).tolist() == box.tolist()
