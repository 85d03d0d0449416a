"""Undo and redo over random weights: bit-equal, without computing, within a budget, one object apart from another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from medvl_sam2.errors import PromptError
from medvl_sam2.predictor import Predictor, Session, SessionConfig
from medvl_sam2.predictor.holdings import Held, Tally, arrays_of
from medvl_sam2.predictor.objects import ObjectState
from medvl_sam2.predictor.timeline import Timeline, prompt_key
from medvl_sam2.strokes import Plane, Stroke, StrokeKind
from medvl_sam2.types import Prompt, Segmentation, Volume
from small_model import oblique_volume, small_predictor

BOX = np.array([[6.0, 13, 5], [24, 27, 13]])
SCRIBBLE = Stroke(StrokeKind.SCRIBBLE, np.array([[10.0, 18, 7], [14, 19, 7], [15, 22, 7]]))
LASSO = Stroke(StrokeKind.LASSO, np.array([[8.0, 16, 9], [14, 16, 9], [14, 22, 9], [8, 22, 9]]), 0)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return small_predictor()


@pytest.fixture(scope="module")
def volume() -> Volume:
    return oblique_volume()[0]


def clicks(*points: tuple[int, int, int, int]) -> Prompt:
    array = np.array(points, dtype=np.float64).reshape(-1, 4)
    return Prompt(points=array[:, :3], labels=array[:, 3].astype(np.int64))


def mixed(count: int) -> Iterator[Prompt]:
    """Prompts of all kinds as a client sends them: mostly one edit more each time, then a new start."""
    rng, truth = np.random.default_rng(5), oblique_volume()[1]
    starts = [
        Prompt(box=BOX),
        clicks((15, 20, 9, 1)),
        Prompt(mask=truth),
        Prompt(text="the liver"),
        Prompt(box=BOX + 1),
    ]
    for n in range(count):
        if n % 10 == 0:
            prompt = starts[n // 10 % len(starts)]
        elif n % 10 == 4:
            prompt = replace(prompt, strokes=(*prompt.strokes, SCRIBBLE))
        elif n % 10 == 6:
            prompt = replace(prompt, strokes=(*prompt.strokes, LASSO))
        elif n % 10 == 8:
            prompt = replace(prompt, accepted=(Plane(2, 9),))
        else:
            point = [*rng.integers((8, 14, 5), (22, 27, 13)), n % 3 > 0]
            more = clicks(tuple(int(v) for v in point))  # type: ignore[arg-type]
            prompt = replace(
                prompt,
                points=np.concatenate([prompt.points, more.points]),
                labels=np.concatenate([prompt.labels, more.labels]),
            )
            prompt = replace(prompt, propagate=n % 10 == 9)
        yield prompt


class Watched:
    """Counts what the model computes."""

    def __init__(self, predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        segmenter = predictor.model.segmenter
        for name in ("encode", "decode", "remember"):
            monkeypatch.setattr(segmenter, name, self._counted(getattr(segmenter, name)))
        monkeypatch.setattr(predictor.model, "answer", self._counted(predictor.model.answer))

    def _counted(self, call):  # type: ignore[no-untyped-def]
        def counted(*args, **options):  # type: ignore[no-untyped-def]
            self.calls += 1
            return call(*args, **options)

        return counted


@pytest.mark.slow
def test_fifty_mixed_prompts_are_undone_and_redone_bit_for_bit(
    predictor: Predictor, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = predictor.open(volume)
    answers = [predictor.segment_prompt(session, prompt) for prompt in mixed(50)]
    assert len({answer.mask.tobytes() for answer in answers}) > 20
    watched = Watched(predictor, monkeypatch)
    for answer in reversed(answers[:-1]):
        assert np.array_equal(predictor.undo(session).mask, answer.mask)
    assert not predictor.undo(session).mask.any()
    assert not predictor.undo(session).mask.any()  # before the first step there is nothing to undo
    for answer in answers:
        again = predictor.redo(session)
        assert np.array_equal(again.mask, answer.mask)
        assert again.scores == answer.scores
    assert np.array_equal(predictor.undo(session, count=20).mask, answers[29].mask)
    assert np.array_equal(predictor.redo(session, count=20).mask, answers[49].mask)
    assert watched.calls == 0


def test_a_client_that_takes_clicks_back_and_places_them_again_computes_nothing(
    predictor: Predictor, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = predictor.open(volume)
    prompts = list(mixed(8))
    masks = [predictor.segment_prompt(session, prompt).mask for prompt in prompts]
    watched = Watched(predictor, monkeypatch)
    for n in (7, 5, 6, 2, 3, 4, 0):
        assert np.array_equal(predictor.segment_prompt(session, prompts[n]).mask, masks[n])
    assert watched.calls == 0
    other = predictor.segment_prompt(session, clicks((15, 20, 9, 1))).mask
    assert watched.calls > 0
    with pytest.raises(PromptError, match="0 were undone"):
        predictor.redo(session)  # the new prompt cut the branch off
    assert np.array_equal(predictor.undo(session).mask, masks[0])
    assert np.array_equal(predictor.redo(session).mask, other)


def test_words_beside_a_box_do_not_build_the_object_anew(predictor: Predictor, volume: Volume) -> None:
    session = predictor.open(volume)
    worded = Prompt(box=BOX, text="the liver")
    predictor.segment_prompt(session, worded)
    first = session.objects["object"]
    predictor.segment_prompt(session, replace(clicks((15, 20, 9, 0)), box=BOX, text="the liver"))
    assert session.objects["object"].before is first


def test_what_other_weights_cannot_begin_is_empty_and_can_be_corrected(
    predictor: Predictor, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = predictor.open(volume)
    predictor.segment_prompt(session, Prompt(box=BOX))
    timeline = session.timelines["object"]
    background = replace(clicks((15, 20, 9, 0)), text="a thing")  # as if its words had found something then
    timeline.place(0, session.step(background.validated(volume.geometry.shape)))
    nothing = Segmentation(np.zeros(volume.geometry.shape, np.uint8), volume.geometry, ("a thing",), {"a thing": 0.0})
    monkeypatch.setattr(predictor._editor, "_say", lambda session, text: nothing)
    answer = predictor.segment_prompt(session, clicks((15, 20, 9, 1)))
    assert answer.mask.any()


@pytest.mark.parametrize("megabytes", [0.0, 0.2])
def test_dropped_states_are_computed_anew_bit_for_bit(volume: Volume, megabytes: float) -> None:
    free = small_predictor()
    tight = Predictor(free.model, free.meta, sessions=SessionConfig(history_megabytes=megabytes))
    whole, trimmed = free.open(volume), tight.open(volume)
    prompts = list(mixed(11))
    for prompt in prompts:
        wanted = free.segment_prompt(whole, prompt).mask
        assert np.array_equal(tight.segment_prompt(trimmed, prompt).mask, wanted)
        assert _old_bytes(trimmed) <= megabytes * 1e6
    assert trimmed.bytes < whole.bytes
    assert len(trimmed.states()) < len(whole.states())
    for count in (1, 2, 5):
        assert np.array_equal(tight.undo(trimmed, count=count).mask, free.undo(whole, count=count).mask)
        assert _old_bytes(trimmed) <= megabytes * 1e6
    shorter = replace(prompts[6], strokes=prompts[6].strokes[1:])  # a state that was dropped holds the most of it
    assert np.array_equal(tight.segment_prompt(trimmed, shorter).mask, free.segment_prompt(whole, shorter).mask)


def _old_bytes(session: Session) -> int:
    states, standing = session.states(), {id(state) for state in session.objects.values()}
    return Tally(states).bytes - Tally(state for state in states if id(state) in standing).bytes


def test_what_states_share_counts_once(predictor: Predictor, volume: Volume) -> None:
    session = predictor.open(volume)
    predictor.segment_prompt(session, Prompt(box=BOX))
    predictor.segment_prompt(session, replace(clicks((15, 20, 9, 0)), box=BOX))
    states = session.states()
    assert len(states) == 2
    assert Tally(states).bytes < sum(Tally([state]).bytes for state in states)
    assert Tally([*states, *states]).bytes == Tally(states).bytes


@pytest.mark.parametrize("megabytes", [0.2, 100.0])
def test_counting_states_as_they_come_finds_what_counting_all_finds(volume: Volume, megabytes: float) -> None:
    predictor = small_predictor()
    predictor = Predictor(predictor.model, predictor.meta, sessions=SessionConfig(history_megabytes=megabytes))
    session = predictor.open(volume)
    begun = [replace(clicks((15, 20, 9, 0)), box=BOX), Prompt(box=BOX)]  # a start that was not shown, then it is
    for n, prompt in enumerate([*begun, *mixed(13)]):
        predictor.segment_prompt(session, prompt, "first" if n < 8 else "second")
        if n in (6, 13):
            predictor.undo(session, "first", 3)
        everything = Tally(session.states()).bytes
        packed = {id(s.packed): s.packed for line in session.timelines.values() for s in line.steps if s.packed}
        assert session.own_bytes == everything + sum(len(mask.content) for mask in packed.values())
    session.reset()
    assert session.own_bytes == 0


def test_a_next_prompt_counts_only_what_is_new(
    predictor: Predictor, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, counted = predictor.open(volume), 0

    def noted(state: ObjectState) -> Iterator[Held]:
        nonlocal counted
        counted += 1
        yield from arrays_of(state)

    monkeypatch.setattr("medvl_sam2.predictor.holdings.arrays_of", noted)
    seen = []
    for prompt in mixed(9):
        predictor.segment_prompt(session, prompt)
        assert session.own_bytes > 0
        seen.append(counted)
    assert len(session.states()) > 5
    assert max(np.diff(seen)) <= 2  # the new state, and the one before when its mask was pasted for it


def test_masks_of_prompts_are_held_as_compressed_bits(predictor: Predictor, volume: Volume) -> None:
    session, truth = predictor.open(volume), oblique_volume()[1]
    masks = [np.roll(truth, n, axis=0) for n in range(20)]
    for n, mask in enumerate(masks):
        timeline = session.timelines.setdefault("object", Timeline())
        timeline.place(n, session.step(Prompt(mask=mask).validated(volume.geometry.shape)))
    assert session.own_bytes < 20 * truth.nbytes / 20
    whole = [step.whole() for step in session.timelines["object"].steps]
    assert all(np.array_equal(prompt.mask, mask) for prompt, mask in zip(whole, masks, strict=True))  # type: ignore[arg-type]
    assert [prompt_key(prompt) for prompt in whole] == [step.key for step in session.timelines["object"].steps]


def test_objects_have_timelines_of_their_own(predictor: Predictor, volume: Volume) -> None:
    session, alone = predictor.open(volume), predictor.open(volume)
    first, second = clicks((15, 20, 9, 1)), clicks((15, 20, 9, 1), (18, 22, 11, 0))
    wanted = [predictor.segment_prompt(alone, prompt, "a").mask for prompt in (first, second)]
    predictor.segment_prompt(session, first, "a")
    other = predictor.segment_prompt(session, Prompt(box=BOX), "b").mask
    assert np.array_equal(predictor.segment_prompt(session, second, "a").mask, wanted[1])
    assert np.array_equal(predictor.undo(session, "a").mask, wanted[0])
    assert not predictor.undo(session, "b").mask.any()
    assert np.array_equal(predictor.redo(session, "a").mask, wanted[1])
    assert np.array_equal(predictor.redo(session, "b").mask, other)


def test_moves_that_make_no_sense_say_why(predictor: Predictor, volume: Volume) -> None:
    session = predictor.open(volume)
    predictor.segment_prompt(session, Prompt(box=BOX), "a")
    with pytest.raises(PromptError, match=r"no object 'b'.*'a'"):
        predictor.undo(session, "b")
    with pytest.raises(PromptError, match="0 were undone"):
        predictor.redo(session, "a")
    with pytest.raises(PromptError, match="from 1 on"):
        predictor.undo(session, "a", 0)
    with pytest.raises(PromptError, match="nothing says where"):
        predictor.segment_prompt(session, Prompt(), "c")
    assert set(session.timelines) == {"a"}


def test_prompts_are_the_same_by_value() -> None:
    shape = (40, 34, 18)
    prompts = [prompt.validated(shape) for prompt in mixed(50)]
    again = [prompt.validated(shape) for prompt in mixed(50)]
    assert [prompt_key(prompt) for prompt in prompts] == [prompt_key(prompt) for prompt in again]
    assert len({prompt_key(prompt) for prompt in prompts}) == 50
