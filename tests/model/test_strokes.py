"""Strokes that cannot be meant are refused with the reason, quickly; the others become the right voxels."""

from __future__ import annotations

import time

import numpy as np
import pytest

from medvl_sam2.errors import PromptError
from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.predictor.edits import MAX_ANCHORS, CanonicalStroke
from medvl_sam2.strokes import MAX_CORNERS, MAX_STROKE_POINTS, Plane, Stroke, StrokeKind, flat_axis
from medvl_sam2.types import MAX_POINTS, MAX_STROKES, Geometry, Prompt

SHAPE = (30, 24, 16)
SQUARE = [[4, 5, 3], [12, 5, 3], [12, 9, 3], [4, 9, 3]]


def scribble(*points: tuple[float, float, float], label: int = 1) -> Stroke:
    return Stroke(StrokeKind.SCRIBBLE, np.array(points, dtype=float), label)


def lasso(points: object, label: int = 1) -> Stroke:
    return Stroke(StrokeKind.LASSO, np.array(points, dtype=float), label)


def circle(corners: int) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([12 + 8 * np.cos(angle), 11 + 8 * np.sin(angle), np.full(corners, 3.0)], axis=1)


def test_a_lasso_at_half_voxels_is_flat_in_every_frame() -> None:
    """Halves round to the even one: 2.5 and 1.5 share a slice, and would not once the axis was flipped."""
    outline = np.array([[2.0, 2.0, 2.5], [9.0, 2.0, 1.5], [9.0, 9.0, 2.5]])
    well = lasso(outline).well_formed()
    assert (well.points[:, 2] == 2.0).all()
    assert np.array_equal(well.points[:, :2], outline[:, :2])


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (Prompt(strokes=(scribble((1, 1, 1)),)), "a scribble of one voxel is a point"),
        (Prompt(strokes=(scribble((1, 1, 1), (1.2, 1, 1)),)), "a scribble of one voxel"),
        (Prompt(strokes=(scribble((1, 1, 1), (1, 1, np.nan)),)), "not finite"),
        (Prompt(strokes=(scribble((1, 1, 1), (1, 1, 16)),)), r"\[1.0, 1.0, 16.0\] lies outside the volume"),
        (Prompt(strokes=(scribble((1, 1, 1), (2, 2, 2), label=3),)), "label 3"),
        (Prompt(strokes=(Stroke(StrokeKind.SCRIBBLE, np.zeros((MAX_STROKE_POINTS + 1, 3))),)), "give at most 10000"),
        (Prompt(strokes=(Stroke(StrokeKind.SCRIBBLE, np.zeros((4, 2))),)), "must be voxels"),
        (Prompt(strokes=(scribble((1, 1, 1), (2, 2, 2)),) * (MAX_STROKES + 1)), "201 strokes"),
        (Prompt(strokes=(lasso([[4, 5, 3], [12, 5, 3], [12, 9, 5], [4, 9, 3]]),)), "leaves its plane"),
        (Prompt(strokes=(lasso([[4, 5, 3], [12, 9, 3], [12, 5, 3], [4, 9, 3]]),)), "crosses itself"),
        (Prompt(strokes=(lasso([[4, 5, 3], [12, 5, 3]]),)), "at least three"),
        (Prompt(strokes=(lasso([[4, 5, 3], [4, 5, 3], [12, 5, 3], [4, 5, 3]]),)), "at least three"),
        (Prompt(strokes=(lasso([[4, 5, 3], [8, 5, 3], [12, 5, 3]]),)), "no area"),
        (Prompt(strokes=(lasso(circle(MAX_CORNERS + 1)),)), "give at most 1000"),
        (Prompt(box=np.array([[5, 5, 5], [4, 9, 9]])), "inverted"),
        (Prompt(box=np.array([[5, 5, 5], [9, 9, np.inf]])), "finite"),
        (Prompt(points=np.zeros((10**6, 3)), labels=np.zeros(10**6)), f"give at most {MAX_POINTS}"),
        (Prompt(points=np.array([[np.inf, 0, 0]]), labels=np.array([1])), "not finite"),
        (Prompt(accepted=(Plane(2, 16),)), "no plane 16 on axis 2"),
        (Prompt(accepted=(Plane(3, 0),)), "no plane 0 on axis 3"),
    ],
)
def test_bad_prompts_are_refused_at_once(prompt: Prompt, reason: str) -> None:
    started = time.process_time()
    with pytest.raises(PromptError, match=reason):
        prompt.validated(SHAPE)
    assert time.process_time() - started < 1.0


def test_the_largest_lasso_is_checked_in_time() -> None:
    started = time.process_time()
    whole = Prompt(strokes=(lasso(circle(MAX_CORNERS)),)).validated(SHAPE)
    assert len(whole.strokes[0].points) == MAX_CORNERS
    assert time.process_time() - started < 1.0


def test_a_lasso_may_be_closed_by_its_first_corner() -> None:
    for corners in (SQUARE, [*SQUARE, SQUARE[0]], [SQUARE[0], *SQUARE]):
        assert len(Prompt(strokes=(lasso(corners),)).validated(SHAPE).strokes[0].points) == len(corners)


def test_planes_are_found_on_every_axis() -> None:
    for axis in range(3):
        points = np.random.default_rng(axis).uniform(3, 9, (5, 3))
        points[:, axis] = 4.2
        assert flat_axis(points) == axis
    assert flat_axis(np.array([[0.0, 0, 0], [3, 4, 5]])) is None


def frame(axes: tuple[int, int, int], signs: tuple[int, int, int]) -> CanonicalTransform:
    """An anisotropic grid whose axes i, j, k run along the given world axes."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, (world, sign, edge) in enumerate(zip(axes, signs, (0.8, 1.5, 4.0), strict=True)):
        affine[world, column] = sign * edge
    return CanonicalTransform(Geometry(SHAPE, affine))


FRAMES = [frame((0, 1, 2), (-1, -1, 1)), frame((2, 0, 1), (1, 1, -1)), frame((1, 2, 0), (-1, 1, 1))]


@pytest.mark.parametrize("transform", FRAMES)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_lasso_encloses_the_same_stored_voxels_in_every_frame(transform: CanonicalTransform, axis: int) -> None:
    corners = np.insert(np.array([[4.0, 5], [12, 5], [12, 9], [8, 13], [4, 9]]), axis, 7.0, axis=1)
    edit = CanonicalStroke.of(lasso(corners, 0), transform)
    stored = transform.inverse_points(edit.voxels).astype(int)
    assert (stored[:, axis] == 7).all()
    a, b = np.delete(stored, axis, axis=1).T
    expected = {(x, y) for x in range(4, 13) for y in range(5, 14) if y <= 9 or (y <= x + 5 and y <= 21 - x)}
    assert set(zip(a.tolist(), b.tolist(), strict=True)) == expected
    anchors = transform.inverse_points(edit.anchors)
    assert 1 <= len(anchors) <= MAX_ANCHORS
    assert {tuple(p) for p in anchors.astype(int).tolist()} <= {tuple(p) for p in stored.tolist()}
    assert transform.forward_plane(axis, 7) == (edit.normal, int(edit.voxels[0, edit.normal or 0]))


@pytest.mark.parametrize("transform", FRAMES)
def test_a_scribble_runs_through_neighbouring_voxels_in_every_frame(transform: CanonicalTransform) -> None:
    drawn = scribble((2, 3, 1), (20, 3, 6), (20, 15, 6), (5, 20, 12))
    edit = CanonicalStroke.of(drawn, transform)
    stored = transform.inverse_points(edit.voxels)
    for corner in drawn.points:
        assert (np.abs(stored - corner).max(axis=1) == 0).any()
    assert np.abs(np.diff(edit.voxels, axis=0)).max() == 1
    assert len(np.unique(edit.voxels, axis=0)) == len(edit.voxels)
    assert len(edit.anchors) <= MAX_ANCHORS
    assert edit.slices == sorted({int(z) for z in edit.anchors[:, 0]})


@pytest.mark.parametrize("transform", FRAMES)
def test_planes_cross_frames_and_come_back(transform: CanonicalTransform) -> None:
    values = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    for axis in range(3):
        canonical, index = transform.forward_plane(axis, 5)
        there = transform.forward_array(values).take(index, axis=canonical)
        assert set(there.ravel().tolist()) == set(values.take(5, axis=axis).ravel().tolist())
        assert transform.inverse_plane(canonical, index) == (axis, 5)
