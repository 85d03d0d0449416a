"""The locality contract: an edit stays in its region, accepted planes stay as they are, propagation is asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.predictor import Predictor
from medvl_sam2.predictor.edits import CanonicalClick, CanonicalStroke, Edit
from medvl_sam2.predictor.locality import EditRegion
from medvl_sam2.strokes import Plane, Stroke, StrokeKind
from medvl_sam2.types import Geometry, Prompt, Volume
from small_model import oblique_volume, small_predictor

BOX = np.array([[6, 13, 5], [24, 27, 13]])
CLICK = Prompt(points=np.array([[15.0, 20, 9]]), labels=np.array([1]), box=BOX)
SCRIBBLE = Stroke(StrokeKind.SCRIBBLE, np.array([[10.0, 18, 7], [10, 22, 7], [16, 24, 7]]), 1)
CUT = Stroke(StrokeKind.LASSO, np.array([[8.0, 16, 9], [14, 16, 9], [14, 22, 9], [8, 22, 9]]), 0)
FILL = Stroke(StrokeKind.LASSO, np.array([[12.0, 15, 6], [12, 25, 6], [12, 25, 12], [12, 15, 12]]), 1)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    """Random weights, whose masks follow the intensities by half, so that edits have something to change."""
    base = small_predictor()
    config = replace(base.interactive.config, rough_weight=0.5, edit_reach_mm=9.0, edit_share=0.2)
    return Predictor(base.model, base.meta, config)


@pytest.fixture(scope="module")
def study() -> tuple[Volume, np.ndarray]:
    return oblique_volume()


def turned(volume: Volume, axes: tuple[int, int, int], flips: tuple[bool, bool, bool]) -> tuple[Volume, np.ndarray]:
    """The same volume stored in another axis order; returns it with the 4x4 map from old stored voxels to new."""
    move = np.zeros((4, 4))
    move[3, 3] = 1
    for new, (old, flip) in enumerate(zip(axes, flips, strict=True)):
        move[new, old] = -1 if flip else 1
        move[new, 3] = volume.array.shape[old] - 1 if flip else 0
    index = tuple(slice(None, None, -1) if flip else slice(None) for flip in flips)
    array = np.ascontiguousarray(volume.array.transpose(axes)[index])
    geometry = Geometry(array.shape, volume.geometry.affine @ np.linalg.inv(move))
    return Volume(array, geometry, volume.modality), move


def moved(points: np.ndarray, move: np.ndarray) -> np.ndarray:
    return np.asarray(points) @ move[:3, :3].T + move[:3, 3]


@pytest.mark.parametrize("stroke", [SCRIBBLE, CUT, FILL, replace(FILL, label=0)])
def test_a_strokes_own_voxels_follow_its_label(
    predictor: Predictor, study: tuple[Volume, np.ndarray], stroke: Stroke
) -> None:
    session = predictor.open(study[0])
    mask = predictor.segment_prompt(session, replace(CLICK, strokes=(stroke,))).mask
    voxels = session.transform.inverse_points(CanonicalStroke.of(stroke, session.transform).voxels).astype(int)
    assert len(voxels) > 8
    assert (mask[tuple(voxels.T)] == stroke.label).all()


@pytest.mark.parametrize(
    ("axes", "flips"), [((2, 0, 1), (True, False, True)), ((1, 0, 2), (False, True, False)), ((0, 2, 1), (True,) * 3)]
)
def test_prompts_mean_the_same_on_every_stored_grid(
    predictor: Predictor,
    study: tuple[Volume, np.ndarray],
    axes: tuple[int, int, int],
    flips: tuple[bool, bool, bool],
) -> None:
    prompt = replace(CLICK, strokes=(SCRIBBLE, CUT, FILL), accepted=(Plane(2, 8), Plane(0, 12)))
    plain = predictor.segment_prompt(predictor.open(study[0]), replace(prompt, propagate=True)).mask
    volume, move = turned(study[0], axes, flips)
    planes = []
    for plane in prompt.accepted:
        corner = np.zeros((1, 3))
        corner[0, plane.axis] = plane.index
        axis = axes.index(plane.axis)
        planes.append(Plane(axis, int(moved(corner, move)[0, axis])))
    there = Prompt(
        moved(prompt.points, move),
        prompt.labels,
        np.sort(moved(BOX, move), axis=0),
        strokes=tuple(replace(s, points=moved(s.points, move)) for s in prompt.strokes),
        accepted=tuple(planes),
        propagate=True,
    )
    mask = predictor.segment_prompt(predictor.open(volume), there).mask
    index = tuple(slice(None, None, -1) if flip else slice(None) for flip in flips)
    assert np.array_equal(mask, plain.transpose(axes)[index])


EDITS = [
    Prompt(points=np.array([[22.0, 20, 9]]), labels=np.array([1])),
    Prompt(points=np.array([[15.0, 20, 9]]), labels=np.array([0])),
    Prompt(strokes=(SCRIBBLE,)),
    Prompt(strokes=(replace(SCRIBBLE, label=0),)),
    Prompt(strokes=(CUT,)),
    Prompt(strokes=(FILL,)),
]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_changes_its_region_only_and_towards_its_label(
    predictor: Predictor, study: tuple[Volume, np.ndarray], edit: Prompt
) -> None:
    session = predictor.open(study[0])
    before = predictor.segment_prompt(session, Prompt(box=BOX)).mask > 0
    state = session.objects["object"]
    after = predictor.segment_prompt(session, replace(edit, box=BOX)).mask > 0
    made = session.objects["object"].clicks[-1]
    region = session.transform.inverse_array(
        predictor.interactive.region(state, session.spacing, made).inside(session.image.shape)
    )
    changed = before != after
    assert changed.any()
    assert not changed[~region].any()
    assert (after[changed] == bool(made.label)).all()
    assert 0 < region.mean() < 0.9


def test_regions_are_measured_in_mm_from_the_edit() -> None:
    spacing, shape = (4.0, 1.0, 0.5), (20, 60, 80)
    click: Edit = CanonicalClick((10.0, 30.0, 40.0), 1)
    region = EditRegion.around(click, shape, spacing, 8.0)
    assert region.low.tolist() == [8, 22, 24]
    assert region.high.tolist() == [12, 38, 56]
    assert region.inside(shape).sum() == 5 * 17 * 33
    edge = EditRegion.around(CanonicalClick((0.0, 59.0, 0.0), 0), shape, spacing, 8.0)
    assert edge.inside(shape).sum() == 3 * 9 * 17


@pytest.mark.parametrize("normal", [0, 1, 2])
def test_a_lasso_reaches_over_its_own_area_only(normal: int) -> None:
    spacing, shape = (4.0, 1.0, 0.5), (20, 60, 80)
    middle = (10, 30, 40)[normal]
    corners = np.insert(np.array([[5.0, 5], [15, 5], [5, 15]]), normal, middle, axis=1)
    edit = CanonicalStroke.through(StrokeKind.LASSO, corners, 1)
    inside = EditRegion.around(edit, shape, spacing, 8.0).inside(shape)
    steps = int(8.0 / spacing[normal])
    assert np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {normal}))).tolist() == list(
        range(middle - steps, middle + steps + 1)
    )
    shadow = inside.take(middle, axis=normal)
    assert shadow.sum() == 66
    for index in range(middle - steps, middle + steps + 1):
        assert np.array_equal(inside.take(index, axis=normal), shadow)


def test_an_accepted_plane_changes_only_when_it_is_prompted_itself(
    predictor: Predictor, study: tuple[Volume, np.ndarray]
) -> None:
    session = predictor.open(study[0])
    planes = (Plane(2, 9), Plane(0, 14), Plane(1, 21))

    def shown(mask: np.ndarray) -> list[np.ndarray]:
        return [mask.take(plane.index, axis=plane.axis) for plane in planes]

    accepted = shown(predictor.segment_prompt(session, CLICK).mask)
    near = replace(CLICK, points=np.array([[15.0, 20, 9], [18, 22, 10], [13, 18, 8]]), labels=np.array([1, 1, 0]))
    free = predictor.segment_prompt(predictor.open(study[0]), near).mask
    assert any((a != b).any() for a, b in zip(accepted, shown(free), strict=True))  # the control
    held = predictor.segment_prompt(session, replace(near, accepted=planes)).mask
    assert all(np.array_equal(a, b) for a, b in zip(accepted, shown(held), strict=True))
    assert (held != free).any()
    for change in (
        replace(near, accepted=planes, propagate=True),
        replace(near, accepted=planes, box=BOX + 1),  # the object is built again
        replace(near, accepted=planes),
        replace(CLICK, accepted=planes),  # back to the first click
    ):
        mask = predictor.segment_prompt(session, change).mask
        assert all(np.array_equal(a, b) for a, b in zip(accepted, shown(mask), strict=True))
    cut = replace(CLICK, accepted=planes, strokes=(CUT,))  # lies in plane k = 9, crosses i = 14 and j = 21
    mask = predictor.segment_prompt(session, cut).mask
    assert not mask[8:15, 16:23, 9].any()
    assert accepted[0][8:15, 16:23].any()


def test_a_plane_no_longer_accepted_stays_until_something_changes_it(
    predictor: Predictor, study: tuple[Volume, np.ndarray]
) -> None:
    session = predictor.open(study[0])
    predictor.segment_prompt(session, CLICK)
    held = replace(CLICK, strokes=(SCRIBBLE,), accepted=(Plane(2, 8), Plane(2, 6)))
    mask = predictor.segment_prompt(session, held).mask
    assert np.array_equal(predictor.segment_prompt(session, replace(held, accepted=())).mask, mask)


def test_propagation_is_asked_for_and_recomputes_all_but_what_was_prompted(
    predictor: Predictor, study: tuple[Volume, np.ndarray]
) -> None:
    session = predictor.open(study[0])
    prompt = replace(CLICK, strokes=(CUT,))
    local = session.transform.forward_array(predictor.segment_prompt(session, prompt).mask)
    asked = predictor.segment_prompt(session, replace(prompt, propagate=True)).mask
    everywhere = session.transform.forward_array(asked)
    state = session.objects["object"]
    assert state.propagated
    prompted = sorted(state.memory.conditioning)
    assert set(prompted) >= {state.start, *(z for edit in state.clicks for z in edit.slices if z <= state.high)}
    for z in prompted:
        assert np.array_equal(local[z], everywhere[z])
    assert (local != everywhere).any()
    voxels = CanonicalStroke.of(CUT, session.transform).voxels
    assert not everywhere[tuple(voxels.T)].any()
    again = predictor.segment_prompt(session, replace(prompt, propagate=True)).mask
    assert np.array_equal(again, asked)
    assert np.array_equal(
        predictor.segment_prompt(session, CLICK).mask, predictor.segment_prompt(predictor.open(study[0]), CLICK).mask
    )  # taking the cut back takes the propagation back


@torch.inference_mode()
def test_propagation_goes_no_farther_than_a_box_and_needs_no_visible_start(
    predictor: Predictor, study: tuple[Volume, np.ndarray]
) -> None:
    session = predictor.open(study[0])
    predictor.segment_prompt(session, Prompt(box=BOX))
    state = session.objects["object"]
    low, high = session.transform.forward_box(BOX)[:, 0].astype(int)
    carried = predictor.interactive.propagate(state, session.spacing)
    shown = np.flatnonzero(carried.mask().any(axis=(1, 2)))
    assert shown.min() >= low
    assert shown.max() <= high
    beyond = replace(state, start=high + 2)
    assert predictor.interactive.propagate(beyond, session.spacing).start == high
    assert beyond.start == high + 2  # the given state stays


@pytest.mark.parametrize("thin", [0, 1, 2])
def test_a_box_on_one_plane_finds_how_far_the_object_goes(study: tuple[Volume, np.ndarray], thin: int) -> None:
    base = small_predictor()
    config = replace(base.interactive.config, rough_weight=1.0)  # random weights: the intensities alone decide
    predictor = Predictor(base.model, base.meta, config)
    volume, truth = study
    middle = (15, 20, 9)[thin]
    outline = np.argwhere(truth.take(middle, axis=thin))
    box = np.insert(np.stack([outline.min(axis=0), outline.max(axis=0)]), thin, middle, axis=1)
    session = predictor.open(volume)
    mask = predictor.segment_prompt(session, Prompt(box=box)).mask > 0
    assert 2 * (truth & mask).sum() / (truth.sum() + mask.sum()) > 0.6
    thick = np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {thin})))
    wanted = np.flatnonzero(truth.any(axis=tuple({0, 1, 2} - {thin})))
    assert len(thick) >= 0.6 * len(wanted)
    again = predictor.segment_prompt(session, Prompt(box=box)).mask > 0
    assert np.array_equal(mask, again)
    assert len(list(session.objects["object"].history())) == 1  # the same box goes on from what there is


def test_strokes_alone_start_an_object_and_objects_do_not_mix(
    predictor: Predictor, study: tuple[Volume, np.ndarray]
) -> None:
    session = predictor.open(study[0])
    first = predictor.segment_prompt(session, Prompt(strokes=(SCRIBBLE,)), "a").mask
    second = predictor.segment_prompt(session, Prompt(strokes=(FILL, CUT)), "b").mask
    assert first[10, 18, 7]
    assert second[12, 20, 7]
    assert not second[8:15, 16:23, 9].any()
    assert np.array_equal(predictor.segment_prompt(session, Prompt(strokes=(SCRIBBLE,)), "a").mask, first)
    alone = predictor.segment_prompt(predictor.open(study[0]), Prompt(strokes=(FILL, CUT)), "b").mask
    assert np.array_equal(alone, second)


def test_words_start_an_object_that_clicks_correct(
    predictor: Predictor, study: tuple[Volume, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    volume, truth = study
    session = predictor.open(volume)
    said = predictor.segment_text(session, "the liver")
    calls: list[str] = []

    def text(_: object, words: str) -> object:
        calls.append(words)
        return replace(said, mask=truth.astype(np.uint8), scores={"liver": 0.8})

    monkeypatch.setattr(predictor._editor, "_say", text)
    started = predictor.segment_prompt(session, Prompt(text="the liver"), "liver")
    assert np.array_equal(started.mask > 0, truth)
    assert started.scores == {"liver": 0.8}
    click = Prompt(points=np.array([[22.0, 20, 9]]), labels=np.array([0]))
    corrected = predictor.segment_prompt(session, click, "liver").mask > 0
    assert not corrected[22, 20, 9]
    assert 0 < (corrected != truth).sum() < truth.sum() / 2
    assert np.array_equal(predictor.segment_prompt(session, Prompt(text="the liver"), "liver").mask > 0, truth)
    assert calls == ["the liver"]
    monkeypatch.setattr(predictor._editor, "_say", lambda *_: replace(said, mask=np.zeros_like(said.mask), text="No."))
    nothing = predictor.segment_prompt(session, Prompt(text="the spleen"), "spleen")
    assert not nothing.mask.any()
    assert nothing.text == "No."
    assert "spleen" not in session.objects


def test_frames_of_these_tests_are_not_trivial(study: tuple[Volume, np.ndarray]) -> None:
    transform = CanonicalTransform(study[0].geometry)
    assert transform.shape != study[0].array.shape
    assert len(set(transform.spacing)) == 3


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_box_of_which_one_slice_lies_in_the_volume_is_no_box_on_a_plane(
    predictor: Predictor, study: tuple[Volume, np.ndarray], axis: int
) -> None:
    volume, _ = study
    session, flat = predictor.open(volume), BOX.astype(float)
    flat[:, axis] = 0
    thick = flat.copy()
    thick[0, axis] = -6
    on_plane = predictor.segment_prompt(session, Prompt(box=flat)).mask
    one_slice = predictor.segment_prompt(session, Prompt(box=thick)).mask  # the plane's object is not gone on from
    assert len(list(session.objects["object"].history())) == 1
    bounded = session.transform.forward_plane(axis, 0)[0] == 0  # a box bounds the object along the slices
    if bounded:
        assert not one_slice.take(range(1, volume.array.shape[axis]), axis=axis).any()
    assert session.objects["object"].across is None
    assert (on_plane != one_slice).any()
    again = predictor.segment_prompt(predictor.open(volume), Prompt(box=thick)).mask
    assert np.array_equal(again, one_slice)


def test_what_was_placed_last_wins_also_when_the_object_is_built_again(
    predictor: Predictor, study: tuple[Volume, np.ndarray]
) -> None:
    session, inside = predictor.open(study[0]), (12, 20, 9)
    filled = Prompt(box=BOX, strokes=(FILL,))
    assert predictor.segment_prompt(session, filled).mask[inside] == 1
    cleared = replace(filled, points=np.array([inside], dtype=float), labels=np.array([0]))
    assert predictor.segment_prompt(session, cleared).mask[inside] == 0
    moved = replace(cleared, box=BOX + 1)
    assert predictor.segment_prompt(session, moved).mask[inside] == 0
    alone = predictor.segment_prompt(predictor.open(study[0]), moved).mask
    assert alone[inside] == 1  # nobody knows which came first: points, then strokes
    filled_again = replace(moved, strokes=(FILL, replace(FILL, points=FILL.points[::-1])))
    assert predictor.segment_prompt(session, filled_again).mask[inside] == 1


def test_the_same_mask_goes_on_from_what_there_is(predictor: Predictor, study: tuple[Volume, np.ndarray]) -> None:
    session = predictor.open(study[0])
    start = Prompt(mask=study[1])
    predictor.segment_prompt(session, start)
    first = session.objects["object"]
    predictor.segment_prompt(session, replace(EDITS[1], mask=study[1].copy()))
    assert session.objects["object"].before is first
    other = study[1].copy()
    other[:12] = False
    predictor.segment_prompt(session, replace(EDITS[1], mask=other))
    assert len(list(session.objects["object"].history())) == 2


@torch.inference_mode()
def test_propagation_keeps_a_prompted_slice_whose_mask_is_finer_than_its_logits(
    predictor: Predictor, study: tuple[Volume, np.ndarray]
) -> None:
    session = predictor.open(study[0])
    predictor.segment_prompt(session, CLICK)
    state = session.objects["object"].snapshot()
    z = state.high
    state.paste_changed()
    thin = np.zeros_like(state.on_window(z))
    thin[len(thin) // 2] = True
    state.logits[z] = torch.full_like(state.logits_at(z), -1.0)
    state.paste_changed()
    state.hold(z, thin)
    state.clicks.append(CanonicalClick((float(z), *np.array(CLICK.points[0, :2])), 0))  # somebody judged the slice
    carried = predictor.interactive.propagate(state, session.spacing)
    carried.paste_changed()
    assert carried.high >= z
    assert np.array_equal(carried.on_window(z), thin)
