"""The predictor over random weights: frames, clicks, caching, text paths and refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from medvl_sam2.errors import PromptError
from medvl_sam2.modeling.prompts import REPORT_PROMPTS
from medvl_sam2.predictor import Predictor
from medvl_sam2.predictor.phrases import organs_within, trained_question, vocabulary_matches
from medvl_sam2.types import Prompt, Volume
from medvl_sam2.vocabulary import CLASSES
from small_model import oblique_volume, small_predictor


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return small_predictor()


@pytest.fixture(scope="module")
def study() -> tuple[Volume, np.ndarray]:
    return oblique_volume()


def clicks(*points: tuple[int, int, int, int]) -> Prompt:
    array = np.array(points, dtype=np.float64)
    return Prompt(points=array[:, :3], labels=array[:, 3].astype(np.int64))


BOX = np.array([[6, 13, 5], [24, 27, 13]])


def test_every_click_is_honoured_on_the_stored_grid(predictor: Predictor, study: tuple[Volume, np.ndarray]) -> None:
    volume, _ = study
    session = predictor.open(volume)
    prompt = clicks((15, 20, 9, 1), (20, 22, 10, 1), (3, 4, 9, 0), (15, 20, 4, 1), (16, 21, 12, 0))
    mask = predictor.segment_prompt(session, prompt).mask
    assert mask.shape == volume.array.shape
    assert mask.dtype == np.uint8
    for (i, j, k), label in zip(prompt.points.astype(int), prompt.labels, strict=True):
        assert mask[i, j, k] == label


def test_a_box_bounds_the_mask_in_z_and_the_assist_finds_the_bright_object(
    predictor: Predictor, study: tuple[Volume, np.ndarray]
) -> None:
    volume, truth = study
    leaning = replace(predictor.interactive.config, rough_weight=1.0)  # random weights: the assist alone decides
    assisted = Predictor(predictor.model, predictor.meta, leaning)
    session = assisted.open(volume)
    mask = assisted.segment_prompt(session, Prompt(box=BOX)).mask
    assert 2 * (truth & (mask > 0)).sum() / (truth.sum() + mask.sum()) > 0.6
    canonical = session.transform.forward_array(mask)
    low, high = session.transform.forward_box(BOX)[:, 0]
    shown = np.flatnonzero(canonical.any(axis=(1, 2)))
    assert shown.min() >= low
    assert shown.max() <= high


def test_increments_equal_a_replay_and_undo_equals_the_shorter_list(
    predictor: Predictor, study: tuple[Volume, np.ndarray]
) -> None:
    volume, _ = study
    first, second, third = (15, 20, 9, 1), (18, 22, 11, 1), (4, 30, 8, 0)
    grown = predictor.open(volume)
    for count in (1, 2, 3):
        stepwise = predictor.segment_prompt(grown, clicks(*(first, second, third)[:count])).mask
    at_once = predictor.segment_prompt(predictor.open(volume), clicks(first, second, third)).mask
    assert np.array_equal(stepwise, at_once)
    undone = predictor.segment_prompt(grown, clicks(first, second)).mask
    short = predictor.segment_prompt(predictor.open(volume), clicks(first, second)).mask
    assert np.array_equal(undone, short)


@pytest.mark.parametrize("box", [None, BOX])
def test_a_click_said_twice_counts_once_in_one_request_and_in_many(
    predictor: Predictor, study: tuple[Volume, np.ndarray], box: np.ndarray | None
) -> None:
    volume, _ = study
    said = [(15, 20, 9, 1), (20, 22, 10, 0), (20, 22, 10, 0), (16, 20, 9, 1), (15, 20, 9, 1), (20, 22, 10, 0)]
    session = predictor.open(volume)
    for count in range(1, len(said) + 1):
        bit_by_bit = predictor.segment_prompt(session, replace(clicks(*said[:count]), box=box)).mask
    anew = predictor.open(volume)
    assert np.array_equal(predictor.segment_prompt(anew, replace(clicks(*said), box=box)).mask, bit_by_bit)
    assert len(anew.objects["object"].clicks) == len(set(said))
    assert anew.objects["object"].clicks == session.objects["object"].clicks


def test_going_back_needs_no_network_and_going_forth_again_is_bit_equal(
    predictor: Predictor, study: tuple[Volume, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    placed = ((15, 20, 9, 1), (18, 22, 11, 1), (4, 30, 8, 0), (16, 19, 9, 0), (38, 2, 3, 1))  # the last widens
    session = predictor.open(study[0])
    masks = [predictor.segment_prompt(session, clicks(*placed[:n])).mask for n in range(1, 6)]
    for state in session.objects["object"].history():
        assert np.array_equal(state.mask(), replace(state, pasted={}).mask())  # what is not pasted anew is as good
    held = session.bytes
    with monkeypatch.context() as no_network:
        no_network.setattr(predictor.model.segmenter, "encode", None)
        no_network.setattr(predictor.model.segmenter, "decode", None)
        for n in range(4, 0, -1):
            assert np.array_equal(predictor.segment_prompt(session, clicks(*placed[:n])).mask, masks[n - 1])
    assert session.bytes == held  # what was taken back is kept to be redone
    for n in range(2, 6):
        assert np.array_equal(predictor.segment_prompt(session, clicks(*placed[:n])).mask, masks[n - 1])


def test_a_known_prompt_list_costs_no_new_encoding(
    predictor: Predictor, study: tuple[Volume, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = predictor.open(study[0])
    before = predictor.segment_prompt(session, Prompt(box=BOX)).mask
    calls: list[int] = []
    original = predictor.model.segmenter.encode
    monkeypatch.setattr(
        predictor.model.segmenter, "encode", lambda images: calls.append(len(images)) or original(images)
    )
    again = predictor.segment_prompt(session, Prompt(box=BOX)).mask
    assert not calls
    assert np.array_equal(before, again)


def test_objects_of_one_session_do_not_mix(predictor: Predictor, study: tuple[Volume, np.ndarray]) -> None:
    volume, _ = study
    alone = predictor.segment_prompt(predictor.open(volume), clicks((15, 20, 9, 1)), "a").mask
    session = predictor.open(volume)
    predictor.segment_prompt(session, clicks((30, 5, 3, 1)), "b")
    assert np.array_equal(predictor.segment_prompt(session, clicks((15, 20, 9, 1)), "a").mask, alone)


def test_an_earlier_mask_is_taken_over_and_only_corrected_where_clicked(
    predictor: Predictor, study: tuple[Volume, np.ndarray]
) -> None:
    volume, truth = study
    session = predictor.open(volume)
    assert np.array_equal(predictor.segment_prompt(session, Prompt(mask=truth)).mask > 0, truth)
    corrected = predictor.segment_prompt(session, replace(clicks((15, 20, 9, 0)), mask=truth)).mask > 0
    assert not corrected[15, 20, 9]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (clicks((40, 0, 0, 1)), "outside the volume"),
        (clicks((-2, 0, 0, 1)), "outside the volume"),
        (Prompt(points=np.array([[np.nan, 0, 0]]), labels=np.array([1])), "outside the volume"),
        (clicks((5, 5, 5, 0)), "nothing says where"),
        (Prompt(), "nothing says where"),
        (Prompt(points=np.zeros((2, 3)), labels=np.array([1])), "2 points but 1 labels"),
        (Prompt(points=np.zeros((1, 3)), labels=np.array([7])), "must be 1"),
        (Prompt(box=np.array([[90, 0, 0], [99, 5, 5]])), "outside the volume"),
        (Prompt(mask=np.ones((2, 2, 2))), "does not fit"),
    ],
)
def test_bad_prompts_say_why(
    predictor: Predictor, study: tuple[Volume, np.ndarray], prompt: Prompt, reason: str
) -> None:
    with pytest.raises(PromptError, match=reason):
        predictor.segment_prompt(predictor.open(study[0]), prompt)


def test_classes_come_in_the_order_asked_with_contiguous_values(
    predictor: Predictor, study: tuple[Volume, np.ndarray]
) -> None:
    seen: list[float] = []
    result = predictor.segment_classes(
        predictor.open(study[0]), ["liver", "lesion", "spleen"], lambda share, _: seen.append(share)
    )
    assert result.names == ("liver", "lesion", "spleen")
    assert result.mask.shape == study[0].array.shape
    assert set(np.unique(result.mask)) <= {0, 1, 2, 3}
    assert seen == sorted(seen)
    assert len(seen) > 2


@pytest.mark.parametrize(("classes", "reason"), [(["livr"], "not in the vocabulary"), (["liver", "liver"], "twice")])
def test_bad_classes_say_why(
    predictor: Predictor, study: tuple[Volume, np.ndarray], classes: list[str], reason: str
) -> None:
    with pytest.raises(PromptError, match=reason):
        predictor.segment_classes(predictor.open(study[0]), classes)


@pytest.mark.parametrize("text", ["", "  \n", "x" * 100_000])
def test_empty_and_huge_texts_are_refused(predictor: Predictor, study: tuple[Volume, np.ndarray], text: str) -> None:
    session = predictor.open(study[0])
    for ask in (predictor.segment_text, predictor.answer):
        with pytest.raises(PromptError):
            ask(session, text)


def test_text_answers_carry_the_notice_and_text_masks_a_name(
    predictor: Predictor, study: tuple[Volume, np.ndarray]
) -> None:
    session = predictor.open(study[0])
    assert predictor.report(session).notice == "random test weights"
    assert predictor.answer(session, "Is there a lesion in the liver?").question.startswith("Is there")
    assert predictor.segment_text(session, "Segment the right kidney.").names == ("kidney_right",)
    both = predictor.segment_text(session, "Segment the liver, the left kidney and spleen.")
    assert both.names == ("liver", "kidney_left", "spleen")
    assert set(np.unique(both.mask)) <= {0, 1, 2, 3}
    assert 0 <= predictor.uncertainty(session) <= 1


def test_yes_or_no_questions_are_asked_as_closed_ones() -> None:
    closed = "Is there a lesion in the liver? Choices: A. yes B. no"
    assert trained_question("Is there a lesion in the liver?") == closed
    for text in (closed, "Is the lesion in the left or the right lobe?", "Which phase is this?", "Isolate the liver."):
        assert trained_question(text) == text


@pytest.mark.parametrize(
    ("trained", "choices"),
    [
        ("Is there a lesion in the right lung?", ""),
        ("Is the CT with contrast?", ""),
        ("On which side is the lesion?", ""),
        ("How large is the lesion?", " Choices: A. less than 2 cm B. more than 3 cm"),
    ],
)
def test_a_question_is_read_alike_however_it_is_typed(trained: str, choices: str) -> None:
    wanted = trained_question(trained + choices)
    assert wanted.startswith(trained)
    small = trained[0].lower() + trained[1:]
    typed = [
        small,
        trained[:-1],
        small[:-1],
        trained.replace(" ", "  "),
        f" {trained}  ",
        f"{small[:-1]} ?",
        f"{small}?",
    ]
    if "CT" not in trained:
        typed += [trained.upper(), trained.title()]
    assert {trained_question(text + choices) for text in typed} == {wanted}
    assert trained_question(small + choices.replace("Choices", "choices")) == wanted


def test_requests_for_a_report_are_read_as_they_are_trained() -> None:
    assert [trained_question(text) for text in REPORT_PROMPTS] == list(REPORT_PROMPTS)
    assert [trained_question(text.lower()[:-1]) for text in REPORT_PROMPTS] == list(REPORT_PROMPTS)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("the right kidney", ("kidney_right",)),
        ("Segment kidney_right.", ("kidney_right",)),
        ("liver and spleen", ("liver", "spleen")),
        ("Show me the liver, the spleen, and the liver", ("liver", "spleen")),
        ("the lesion in the liver", ()),
        ("liver and something", ()),
    ],
)
def test_plain_class_names_are_recognised(text: str, names: tuple[str, ...]) -> None:
    assert vocabulary_matches(text) == names


@pytest.mark.parametrize(
    ("text", "organs"),
    [
        ("the cyst in the upper pole of the right kidney", ("kidney_right",)),
        ("Segment the nodules in the left lung.", ("lung_left",)),
        ("all lesions within the liver and the spleen", ("spleen", "liver")),
        ("the largest lesion", ()),
        ("the liver", ()),
        ("the nodule in the left lung next to the heart", ()),
        ("all cysts in the liver and kidneys", ()),
        ("the cyst in the left and right kidney", ()),
        ("the lesion in the lower lobe touching the heart", ()),
        ("where are the lesions in the head of the pancreas?", ("pancreas",)),
        ("the lesion in the kidneys", ()),
        ("the delivery in the deliverance", ()),
    ],
)
def test_organs_that_something_lies_in_are_read_from_the_words(text: str, organs: tuple[str, ...]) -> None:
    assert organs_within(text) == organs


def test_the_vocabulary_is_what_the_labels_say(predictor: Predictor) -> None:
    assert predictor.classes == CLASSES
