"""What a prompt means in the scene: elements on slices, in boxes and under clicks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medvl_sam2.geometry import SliceCrop
from medvl_sam2.modeling.scene_pointer import SceneElements
from medvl_sam2.predictor.places import (
    OUTSIDE_VOLUME,
    MatchRule,
    Part,
    agreement,
    element_in_box,
    element_on_plane,
    elements_at,
    place_on_slices,
)

SHAPE = (40, 60, 80)
"""Canonical volume; the scene's grid (20, 30, 20) has cells of 2 x 2 x 4 voxels."""


@pytest.fixture
def elements() -> SceneElements:
    """Organ 0 fills cells 4..11 of every axis, organ 1 the top plane, a lesion slot sits inside organ 0."""
    maps = torch.full((4, 20, 30, 20), -6.0)
    maps[0, 4:12, 4:12, 4:12] = 6.0
    maps[1, 19] = 6.0
    maps[2, 6:8, 6:8, 6:8] = 6.0
    return SceneElements(torch.zeros(4, 8), maps, organs=2)


def test_places_land_on_the_volumes_voxels(elements: SceneElements) -> None:
    crop = SliceCrop.around(np.array([[0, 0], [79, 79]]), (1.5, 1.5), 1.0, 80, 1.0)
    seen = place_on_slices(elements.maps, crop, 80, [0, 15, 39], SHAPE)
    assert seen.shape == (4, 3, 80, 80)
    rows, columns = np.nonzero((seen[0, 1] > 0).numpy())
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (8, 24, 16, 48)
    assert not (seen[0, 0] > 0).any()
    assert (seen[1, 2, :60] > 0).all()
    assert (seen[:, :, 60:] == OUTSIDE_VOLUME).all()  # the slice has 60 rows


def cells_of(part: Part | None) -> list[list[int]]:
    """First and last cell of a part."""
    assert part is not None
    cells = np.argwhere(part.found)
    return [cells.min(axis=0).tolist(), cells.max(axis=0).tolist()]


ORGAN, LESION = [[4, 4, 4], [11, 11, 11]], [[6, 6, 6], [7, 7, 7]]


def test_a_box_means_the_element_it_was_drawn_round(elements: SceneElements) -> None:
    rule = MatchRule()
    assert cells_of(element_in_box(elements, np.array([[8, 8, 16], [23, 23, 47]]), SHAPE, rule)) == ORGAN
    assert cells_of(element_in_box(elements, np.array([[12, 12, 24], [15, 15, 31]]), SHAPE, rule)) == LESION
    assert element_in_box(elements, np.array([[0, 0, 0], [39, 59, 79]]), SHAPE, rule) is None  # far too large
    assert element_in_box(elements, np.array([[8, 8, 16], [23, 23, 28]]), SHAPE, rule) is None  # half the organ
    assert element_in_box(elements, np.array([[30, 40, 60], [31, 41, 61]]), SHAPE, rule) is None  # nothing there
    assert element_in_box(elements, np.array([[1000, 5, 5], [1000, 6, 6]]), (1001, 60, 80), rule) is None


def test_specks_do_not_make_an_element_fill_a_box(elements: SceneElements) -> None:
    elements.maps[:] = -6.0
    elements.maps[0, 4:7, 4:7, 4:7] = 6.0
    elements.maps[0, 15, 15, 15] = 6.0  # the box reaches from the organ's corner to the speck
    box = np.array([[8, 8, 16], [31, 31, 63]])
    assert element_in_box(elements, box, SHAPE, MatchRule()) is None
    elements.maps[0, 4:7, 4:7, 4:7] = -6.0
    elements.maps[0, 4, 4, 4] = 6.0  # two specks in opposite corners
    assert element_in_box(elements, box, SHAPE, MatchRule()) is None


def test_pieces_of_an_element_in_the_box_are_meant_together(elements: SceneElements) -> None:
    elements.maps[0, 7:9, 4:12, 4:12] = -6.0
    elements.maps[0, 17:19] = 6.0
    part = element_in_box(elements, np.array([[8, 8, 16], [23, 23, 47]]), SHAPE, MatchRule())
    assert cells_of(part) == ORGAN
    assert part is not None
    assert not part.found[7:9].any()
    assert part.fit == pytest.approx(1.0)


def test_a_box_may_show_one_section_of_what_wanders_through_the_slices(elements: SceneElements) -> None:
    elements.maps[:] = -6.0
    for plane in range(4, 12):
        elements.maps[1, plane, 2 * plane : 2 * plane + 4, 8:12] = 6.0
    rule, section = MatchRule(), [[8, 32, 32], [23, 39, 47]]  # planes 4..11, rows 16..19: those of plane 8
    assert cells_of(element_in_box(elements, np.array(section), SHAPE, rule)) == [[4, 8, 8], [11, 25, 11]]
    short, aside = np.array([[14, 32, 32], [17, 39, 47]]), np.array([[8, 44, 32], [23, 51, 47]])
    assert element_in_box(elements, short, SHAPE, rule) is None
    assert element_in_box(elements, aside, SHAPE, rule) is None


def test_a_stray_cell_is_not_part_of_what_is_meant(elements: SceneElements) -> None:
    elements.maps[0, 0, 29, 19] = 6.0
    rule = MatchRule()
    boxed = element_in_box(elements, np.array([[8, 8, 16], [23, 23, 47]]), SHAPE, rule)
    (clicked,) = elements_at(elements, (9.0, 9.0, 17.0), SHAPE, rule)
    assert cells_of(boxed) == cells_of(clicked) == ORGAN
    assert clicked.box(SHAPE).tolist() == [[8, 8, 16], [23, 23, 47]]
    assert float(clicked.place[0, 29, 19]) == OUTSIDE_VOLUME


def test_a_click_may_mean_the_lesion_or_its_organ(elements: SceneElements) -> None:
    rule = MatchRule()
    assert [cells_of(part) for part in elements_at(elements, (13.0, 13.0, 26.0), SHAPE, rule)] == [LESION, ORGAN]
    assert [cells_of(part) for part in elements_at(elements, (9.0, 9.0, 17.0), SHAPE, rule)] == [ORGAN]
    assert [cells_of(part) for part in elements_at(elements, (39.0, 0.0, 0.0), SHAPE, rule)] == [
        [[19, 0, 0], [19, 29, 19]]
    ]
    assert elements_at(elements, (0.0, 59.0, 79.0), SHAPE, rule) == []


def test_agreement_counts_what_lies_beyond_the_window(elements: SceneElements) -> None:
    """The organ is 16 x 32 voxels of 1 mm on the slice; a window inside it shows a mask that fills it."""
    (part,) = elements_at(elements, (9.0, 9.0, 17.0), SHAPE, MatchRule())
    spacing = (1.0, 1.0, 1.0)
    whole = SliceCrop.around(np.array([[0, 0], [79, 79]]), spacing[1:], 1.0, 80, 1.0)
    mask = np.zeros((80, 80), bool)
    mask[8:24, 16:48] = True
    assert agreement(part, mask, whole, 15, SHAPE, spacing) == pytest.approx(1.0, abs=0.02)  # corners are rounded
    assert agreement(part, mask, whole, 30, SHAPE, spacing) == 0.0  # the organ ends below
    small = SliceCrop.around(np.array([[12, 24], [19, 31]]), spacing[1:], 1.0, 16, 1.0)
    inside = agreement(part, np.ones((16, 16), bool), small, 15, SHAPE, spacing)
    assert inside == pytest.approx(2 * 64 / (64 + 512))


@pytest.mark.parametrize(
    ("axis", "index", "box"),
    [
        (0, 15, [[15, 8, 16], [15, 23, 47]]),
        (1, 18, [[8, 18, 16], [23, 18, 47]]),
        (2, 20, [[8, 8, 20], [23, 23, 20]]),
    ],
)
def test_a_box_on_any_plane_finds_the_element_it_cuts(
    elements: SceneElements, axis: int, index: int, box: list[list[int]]
) -> None:
    drawn = np.array(box, dtype=float)
    part = element_on_plane(elements, drawn, axis, SHAPE, MatchRule())
    assert part is not None
    assert part.box(SHAPE).tolist() == [[8, 8, 16], [23, 23, 47]]
    assert part.fit == pytest.approx(1.0)
    other = [n for n in range(3) if n != axis]
    small = drawn.copy()
    small[1, other] = small[0, other] + 5  # holds a corner of the section only
    assert element_on_plane(elements, small, axis, SHAPE, MatchRule()) is None
    away = drawn.copy()
    away[:, axis] = (36, 36, 60)[axis]  # beyond the organ's last plane
    assert element_on_plane(elements, away, axis, SHAPE, MatchRule()) is None
