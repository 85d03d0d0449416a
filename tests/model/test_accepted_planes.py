"""An accepted plane never changes silently, whatever is asked for: over random weights, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from medvl_sam2.predictor import Predictor, Session
from medvl_sam2.strokes import Plane, Stroke, StrokeKind
from medvl_sam2.types import Prompt, Segmentation, Volume
from small_model import oblique_volume, small_predictor

BOX = np.array([[6.0, 13, 5], [24, 27, 13]])
ELSEWHERE = np.array([[28.0, 4, 12], [34, 9, 15]])
"""A box whose window and range leave out most of what :data:`BOX` shows."""
LOW, HIGH = (8, 14, 5), (22, 27, 13)
WORDS = {"the liver": True, "the spleen": False}
"""Whether words find something."""


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    """Random weights, whose masks follow the intensities by half; words find the ellipsoid or nothing."""
    base = small_predictor()
    config = replace(base.interactive.config, rough_weight=0.5, edit_reach_mm=9.0, edit_share=0.2)
    predictor = Predictor(base.model, base.meta, config)

    def say(session: Session, text: str) -> Segmentation:
        truth = oblique_volume()[1].astype(np.uint8) * WORDS[text]
        return Segmentation(truth, session.volume.geometry, (text,), {text: 0.5}, f"This is {text}.")

    predictor._editor._say = say
    return predictor


@pytest.fixture(scope="module")
def volume() -> Volume:
    return oblique_volume()[0]


def shown(mask: np.ndarray, plane: Plane) -> np.ndarray:
    return mask.take(plane.index, axis=plane.axis)


def click(*point: int, label: int = 1) -> Prompt:
    return Prompt(points=np.array([point], dtype=float), labels=np.array([label]))


@dataclass
class Edits:
    """What an annotator has placed: points with their label, and strokes."""

    points: list[tuple[int, int, int, int]]
    strokes: list[Stroke]

    def prompt(self) -> Prompt:
        array = np.array(self.points, dtype=float).reshape(-1, 4)
        return Prompt(array[:, :3], array[:, 3].astype(int), strokes=tuple(self.strokes))

    def touched(self, known: Edits, plane: Plane) -> bool:
        """Whether something lies on a plane that ``known`` has not: more than that may not open it."""
        points = [point[:3] for point in self.points if point not in known.points]
        strokes = [stroke.points for stroke in self.strokes if not any(stroke is other for other in known.strokes)]
        for line in (*(np.array([point]) for point in points), *strokes):
            if line[:, plane.axis].min() <= plane.index <= line[:, plane.axis].max():
                return True
        return False


class Annotator:
    """Asks for anything, at random; keeps what it saw."""

    def __init__(self, predictor: Predictor, volume: Volume, seed: int) -> None:
        self.predictor, self.session = predictor, predictor.open(volume)
        self.rng = np.random.default_rng(seed)
        self.edits = Edits([(15, 20, 9, 1)], [])
        self.start: Prompt = Prompt(box=BOX)
        self.planes: set[Plane] = set()
        self.seen: dict[int, tuple[np.ndarray, set[Plane]]] = {}
        """Mask and accepted planes by a step's number."""
        self.compared = 0

    def voxel(self) -> tuple[int, int, int]:
        i, j, k = self.rng.integers(LOW, HIGH)
        return int(i), int(j), int(k)

    def change(self) -> None:
        """One thing more, or less, or another start."""
        kinds = ["click", "scribble", "lasso", "back", "accept", "accept", "accept", "release", "box", "words", "mask"]
        kind = self.rng.choice(kinds)
        i, j, k = self.voxel()
        if kind == "click":
            self.edits.points.append((i, j, k, int(self.rng.integers(2))))
        elif kind == "scribble":
            line = np.array([[i, j, k], [i + 2, j, k], [i + 2, j + 3, k]], dtype=float)
            self.edits.strokes.append(Stroke(StrokeKind.SCRIBBLE, line, int(self.rng.integers(2))))
        elif kind == "lasso":
            line = np.array([[i, j, k], [i + 5, j, k], [i + 5, j + 5, k]], dtype=float)
            self.edits.strokes.append(Stroke(StrokeKind.LASSO, line, int(self.rng.integers(2))))
        elif kind == "back" and len(self.edits.points) > 1:
            self.edits.points.pop(int(self.rng.integers(1, len(self.edits.points))))
        elif kind == "accept":
            axis = int(self.rng.integers(3))
            self.planes.add(Plane(axis, (i, j, k)[axis]))
        elif kind == "release" and self.planes:
            self.planes.remove(sorted(self.planes, key=lambda p: (p.axis, p.index))[0])
        elif kind == "box":
            self.start = Prompt(box=(BOX, BOX + 1, ELSEWHERE)[self.rng.integers(3)])
        elif kind == "words":
            self.start = Prompt(text=str(self.rng.choice(list(WORDS))))
        elif kind == "mask":
            mask = oblique_volume()[1].copy()
            mask[: self.rng.integers(10, 20)] = False
            self.start = Prompt(mask=mask)

    def step(self) -> None:
        """Ask for all that is placed, or move along the timeline, and check what the accepted planes show."""
        before = self.predictor.undo if self.rng.random() < 0.5 else self.predictor.redo
        timeline = self.session.timelines.get("object")
        if timeline is not None and self.rng.random() < 0.2 and 1 < timeline.position < len(timeline.steps):
            before(self.session)
            return self.check_known()
        known = Edits(list(self.edits.points), list(self.edits.strokes))
        last, accepted = self.last()
        start = self.start
        for _ in range(int(self.rng.integers(1, 4))):
            self.change()
        prompt = replace(self.edits.prompt(), box=self.start.box, mask=self.start.mask, text=self.start.text)
        prompt = replace(prompt, accepted=tuple(self.planes), propagate=bool(self.rng.random() < 0.2))
        mask = self.predictor.segment_prompt(self.session, prompt).mask
        standing = self.session.timelines["object"].standing
        assert standing is not None
        if standing.order in self.seen:
            return self.check_known()
        self.seen[standing.order] = (mask, set(self.planes))
        if self.start.mask is not None and self.start is not start:
            last = self.start.mask  # what the annotator sent shows what they see
        for plane in self.planes if last is not None else ():
            if not self.edits.touched(known, plane):
                assert np.array_equal(shown(mask, plane), shown(last, plane)), (plane, plane in accepted)
                self.compared += 1
        return None

    def last(self) -> tuple[np.ndarray | None, set[Plane]]:
        timeline = self.session.timelines.get("object")
        return self.seen[timeline.standing.order] if timeline is not None and timeline.standing else (None, set())

    def check_known(self) -> None:
        """Going back and forth shows what stood there."""
        mask, _ = self.last()
        timeline = self.session.timelines["object"]
        assert mask is not None
        again = self.predictor.segment_prompt(self.session, timeline.steps[timeline.position - 1].whole()).mask
        assert np.array_equal(again, mask)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_no_sequence_of_prompts_changes_an_accepted_plane(predictor: Predictor, volume: Volume, seed: int) -> None:
    annotator = Annotator(predictor, volume, seed)
    for _ in range(14):
        annotator.step()
    assert annotator.compared >= 5


@pytest.mark.parametrize("plane", [Plane(0, 15), Plane(1, 20), Plane(2, 9)])
def test_an_opened_plane_keeps_what_lies_beyond_the_present_window(
    predictor: Predictor, volume: Volume, plane: Plane
) -> None:
    session = predictor.open(volume)
    first = predictor.segment_prompt(session, Prompt(box=BOX)).mask
    moved = Prompt(box=ELSEWHERE, accepted=(plane,))
    held = predictor.segment_prompt(session, moved).mask
    assert np.array_equal(shown(held, plane), shown(first, plane))
    crop, low, high = (getattr(session.objects["object"], name) for name in ("stack", "low", "high"))
    y0, y1, x0, x1 = crop.crop.bounds(crop.plane)
    within = np.zeros(session.image.shape, dtype=bool)
    within[low : high + 1, y0:y1, x0:x1] = True
    beyond = shown(first.astype(bool) & ~session.transform.inverse_array(within), plane)
    assert beyond.any()
    corner = [33, 8, 14]
    corner[plane.axis] = plane.index
    placed = predictor.segment_prompt(session, replace(click(*corner, label=0), box=ELSEWHERE, accepted=(plane,))).mask
    away = np.abs(np.indices(first.shape) - np.reshape(corner, (3, 1, 1, 1))) * np.reshape([1.5, 2, 4], (3, 1, 1, 1))
    far = shown(away.max(axis=0) > 20, plane)  # from the edit in mm, which reaches up to 0.2 of a diagonal of 78 mm
    assert (beyond & far).any()
    assert np.array_equal(shown(placed, plane)[far], shown(held, plane)[far])
    released = predictor.segment_prompt(session, Prompt(box=ELSEWHERE)).mask
    assert np.array_equal(released, held)  # taken back and released: the mask of the box, with the plane as it was


def test_words_that_find_nothing_leave_accepted_planes(predictor: Predictor, volume: Volume) -> None:
    session = predictor.open(volume)
    first = predictor.segment_prompt(session, Prompt(text="the liver")).mask
    planes = (Plane(2, 9), Plane(0, 14))
    answer = predictor.segment_prompt(session, Prompt(text="the spleen", accepted=planes))
    assert answer.text == "This is the spleen."
    for plane in planes:
        assert np.array_equal(shown(answer.mask, plane), shown(first, plane))
    alone = answer.mask.copy()
    alone[:, :, 9], alone[14] = 0, 0
    assert not alone.any()
    released = predictor.segment_prompt(session, Prompt(text="the spleen")).mask
    assert np.array_equal(released, answer.mask)  # until something changes it


def test_planes_accepted_with_the_first_prompt_show_its_answer(predictor: Predictor, volume: Volume) -> None:
    cut = Stroke(StrokeKind.LASSO, np.array([[8.0, 16, 9], [14, 16, 9], [14, 22, 9], [8, 22, 9]]), 0)
    prompt = replace(click(15, 20, 9), box=BOX, strokes=(cut,))
    plain = predictor.segment_prompt(predictor.open(volume), prompt).mask
    carried = predictor.segment_prompt(predictor.open(volume), replace(prompt, propagate=True)).mask
    planes = tuple(Plane(2, int(k)) for k in np.flatnonzero((plain != carried).any(axis=(0, 1))) if k != 9)
    assert planes
    held = predictor.segment_prompt(predictor.open(volume), replace(prompt, accepted=planes, propagate=True)).mask
    for plane in planes:
        assert np.array_equal(shown(held, plane), shown(plain, plane))


def test_an_edit_beside_the_same_mask_keeps_what_was_accepted(predictor: Predictor, volume: Volume) -> None:
    session, plane = predictor.open(volume), Plane(2, 9)
    start = Prompt(mask=oblique_volume()[1])
    cut = replace(click(15, 20, 9, label=0), mask=start.mask)
    predictor.segment_prompt(session, start)
    mask = predictor.segment_prompt(session, cut).mask
    more = replace(cut, points=np.array([[15.0, 20, 9], [15, 20, 10]]), labels=np.array([0, 1]), accepted=(plane,))
    assert np.array_equal(shown(predictor.segment_prompt(session, more).mask, plane), shown(mask, plane))
