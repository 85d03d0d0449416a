"""What a text speaks of, and where the image map shows it: on the stored grid, with the exact side."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from medvl_sam2.errors import PromptError
from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.modeling.scene_pointer import SceneElements
from medvl_sam2.predictor import Predictor
from medvl_sam2.predictor.evidence import EvidenceMap, ground_answer, ground_report
from medvl_sam2.predictor.mentions import Mention, answer_mentions, mentions, sentences
from medvl_sam2.synthesis import generate_case
from medvl_sam2.types import Answer, Geometry
from medvl_sam2.vocabulary import CLASSES

ORGANS = ("liver", "kidney_right", "kidney_left")
SHAPE = (12, 20, 16)
"""Canonical; no two sizes are equal."""


def spoken_of(text: str) -> list[tuple[tuple[str, ...], str]]:
    return [(mention.organs, mention.lesion) for mention in mentions(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The left kidney is normal.", [(("kidney_left",), "")]),
        ("The right and left lungs are clear.", [(("lung_right",), ""), (("lung_left",), "")]),
        ("Kidney on the right side: normal.", [(("kidney_right",), "")]),
        ("No lesion in the liver and both kidneys.", [((n,), "") for n in ("liver", "kidney_right", "kidney_left")]),
        (
            "There is a 2.5 cm cyst in the upper pole of the right kidney.",
            [(("kidney_right",), "cyst in the upper pole of the right kidney"), (("kidney_right",), "")],
        ),
        (
            "A cyst in the liver, 15 mm from the gallbladder.",
            [(("liver",), "cyst in the liver"), (("liver",), ""), (("gallbladder",), "")],
        ),
        ("A metastasis to the liver.", [(("liver",), "metastasis in the liver"), (("liver",), "")]),
        (
            "The left lobe of the liver contains a nodule of 1.0 cm.",
            [(("liver",), "nodule in the left lobe of the liver"), (("liver",), "")],
        ),
        (
            "Cyst in the liver and nodule in the left lung.",
            [(("liver",), "cyst in the liver"), (("lung_left",), "nodule in the left lung"), (("liver",), ""),
             (("lung_left",), "")],
        ),
        ("A renal cyst.", [(("kidney_right", "kidney_left"), "cyst in the right kidney and left kidney"),
                           (("kidney_right",), ""), (("kidney_left",), "")]),
        ("The liver is normal but there is a cyst.", [((), "cyst"), (("liver",), "")]),
        ("The splenic vein is wide; the gallbladder is thin.", [(("gallbladder",), "")]),
        ("Portal venous CT of the abdomen.", []),
    ],
)  # fmt: skip
def test_sentences_of_a_report(text: str, expected: list[tuple[tuple[str, ...], str]]) -> None:
    assert spoken_of(text) == expected


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("There is a 2.5 cm cyst in the liver.", [25.0]),
        ("A 12-mm hypodense lesion of the spleen.", [12.0]),
        ("A cyst in the right kidney, 12 x 17 x 9 mm.", [17.0]),
        ("The liver contains a nodule of 1.0 cm.", [10.0]),
        ("The liver measures 18 cm and contains a nodule.", [None]),
        ("The 18 cm liver contains a nodule.", [None]),
        ("A 9 mm cyst in the liver and a 2 cm nodule in the spleen.", [9.0, 20.0]),
        ("A cyst of 9 mm in the liver and a nodule in the spleen.", [9.0, None]),
        ("A cyst in the liver and a nodule of 2 cm in the spleen.", [None, 20.0]),
        ("A cyst in the liver.", [None]),
        ("A cyst of 12 mm x 17 mm in the liver.", [17.0]),
        ("A 1.2 x 1.7 cm cyst in the liver.", [17.0]),
        ("A 1.2 cm x 9 mm cyst in the liver.", [12.0]),
        ("A 12 mm by 1.7 cm by 9 mm cyst in the liver.", [17.0]),
        ("An 8-10 mm nodule in the left lung.", [10.0]),
        ("A nodule in the left lung grew from 8 mm to 1.1 cm.", [11.0]),
        ("A 15mm cyst in the liver.", [15.0]),
        ("A 2,5 cm cyst in the liver.", [25.0]),
        ("A 1,200 mm mass in the liver.", [1200.0]),
        ("A mass in the liver, 1,050.5 x 900 mm.", [1050.5]),
        ("A mass in the liver, 12 x 1,234 mm.", [1234.0]),
        ("A 0,125 cm cyst in the liver.", [1.25]),
        ("A 1,2500 cm cyst in the liver.", [12.5]),
        ("A 12 mm well-defined cyst in the liver.", [12.0]),
        ("A 12 mm thick-walled cyst in the liver.", [12.0]),
        ("A cyst in the liver, 15 mm from the gallbladder.", [None]),
        ("A cyst in the liver, 15 mm above the gallbladder, measuring 8 mm.", [8.0]),
        ("A 9 mm cyst in the liver 1.5 cm lateral to the gallbladder.", [9.0]),
        ("Two cysts in the liver, 4 cm apart.", [None]),
        ("A cyst in the liver at a distance of 2 cm.", [None]),
        ("On 5 mm slices a cyst in the liver.", [None]),
        ("A cyst in the liver on 5 mm sections.", [None]),
        ("A cyst in the liver on 5 mm thick slices.", [None]),
        ("A cyst in the liver, slice thickness 5 mm.", [None]),
        ("An 18 cm liver with a cyst.", [None]),
        ("18 cm liver with cyst.", [None]),
    ],
)
def test_the_size_of_a_lesion(text: str, sizes: list[float | None]) -> None:
    assert [mention.size_mm for mention in mentions(text) if mention.lesion] == sizes


def test_many_factors_are_read_in_one_go() -> None:
    """Where a blank could be read in two ways, every factor doubled the work: twenty took seconds."""
    text = "There is a " + "1 x " * 200 + "7 mm cyst in the liver and a " + "9" * 2000 + " b cyst in the spleen."
    assert [mention.size_mm for mention in mentions(text) if mention.lesion] == [7.0, None]


def test_the_size_in_a_question() -> None:
    asked = "On which side is the 12 mm lesion?"
    assert [(m.organs, m.size_mm) for m in answer_mentions(asked, "left")] == [(("kidney_left", "lung_left"), 12.0)]
    assert [(m.organs, m.size_mm) for m in answer_mentions("What kind is the 2 cm lesion?", "cyst")] == [((), 20.0)]


def test_denial_ends_with_its_clause() -> None:
    found = mentions("Impression: cyst in the right kidney and absent spleen.")
    assert [(m.organs, bool(m.lesion), m.absent) for m in found] == [
        (("kidney_right",), True, False),
        (("kidney_right",), False, False),
        (("spleen",), False, True),
    ]


def test_a_point_in_a_number_ends_no_sentence() -> None:
    text = "CT of the chest. There is a 2.5 cm cyst.\nImpression: cyst."
    assert sentences(text) == ["CT of the chest.", "There is a 2.5 cm cyst.", "Impression: cyst."]


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("Is there a lesion in the liver? Choices: A. yes B. no", "yes",
         [(("liver",), "lesion in the liver", False), (("liver",), "", False)]),
        ("Is there a lesion in the liver? Choices: A. yes B. no", "B. no", [(("liver",), "", False)]),
        ("Which organ contains the largest lesion? Choices: A. liver B. spleen", "liver",
         [(("liver",), "largest lesion", False), (("liver",), "", False)]),
        ("How many lesions are there?", "two", [((), "lesions", True)]),
        ("How many lesions are there?", "none", []),
        ("On which side is the lesion?", "left", [(("kidney_left", "lung_left"), "lesion", False)]),
        ("What kind is the largest lesion?", "cyst", [((), "largest lesion", False)]),
        ("Which contrast phase is this?", "arterial", []),
    ],
)  # fmt: skip
def test_answers(question: str, answer: str, expected: list[tuple[tuple[str, ...], str, bool]]) -> None:
    assert [(m.organs, m.lesion, m.several) for m in answer_mentions(question, answer)] == expected


def test_an_absent_organ_is_looked_for_all_the_same() -> None:
    assert answer_mentions("Which organ is absent?", "spleen") == [Mention(("spleen",), absent=True)]


def scene(affine: np.ndarray | None = None) -> EvidenceMap:
    """A liver with two lesions, a right kidney with one, and three cells of what is no left kidney."""
    maps = torch.full((len(ORGANS) + 4, 6, 10, 8), -4.0)
    maps[0, 1:5, 1:6, 0:4] = 4.0
    maps[1, 1:4, 7:9, 1:3] = 4.0
    maps[2, 0, 0, 5:8] = 4.0
    maps[3, 1:3, 1:3, 0:2] = 4.0  # lesion_1, in the liver
    maps[4, 3:5, 4:6, 2:4] = 4.0  # lesion_2, in the liver
    maps[5, 2:4, 7:9, 1:3] = 4.0  # lesion_3, in the right kidney
    shape = SHAPE if affine is None else tuple(np.array(SHAPE)[[2, 0, 1]].tolist())
    geometry = Geometry(shape, canonical_affine() if affine is None else affine)
    return EvidenceMap(
        SceneElements(torch.zeros(len(maps), 3), maps, len(ORGANS)), ORGANS, CanonicalTransform(geometry), SHAPE
    )


def canonical_affine() -> np.ndarray:
    return np.array([[0, 0, -1.5, 0], [0, -2.0, 0, 0], [3.0, 0, 0, 0], [0, 0, 0, 1]])


def points_at(*wanted: str) -> tuple[list[str], object]:
    """A pointer that takes the given lesions in turn, and what it was asked for."""
    asked: list[str] = []

    def point(words: str) -> torch.Tensor:
        asked.append(words)
        scores = torch.zeros(len(ORGANS) + 4)
        scores[len(ORGANS) + int(wanted[len(asked) - 1][-1]) - 1] = 1
        return scores

    return asked, point


def names(found: tuple[object, ...]) -> list[list[str]]:
    return [[item.name for item in sentence.evidence] for sentence in found]  # type: ignore[attr-defined]


def test_the_map_on_the_volumes_grid() -> None:
    shown = scene()
    mask = shown.mask("liver")
    assert mask is not None
    assert mask.shape == SHAPE
    spans = [(int(w.min()), int(w.max())) for w in np.nonzero(mask)]
    assert spans == [(2, 9), (2, 11), (0, 7)]  # a cell is two voxels; the border lies half way between cells' centres
    evidence = shown.evidence("liver", "named")
    assert evidence.voxels == np.count_nonzero(mask)
    np.testing.assert_allclose(evidence.centroid, np.argwhere(mask).mean(axis=0))
    assert shown.mask("kidney_left") is None  # three cells are a speck
    assert shown.mask("spleen") is None
    assert shown.mask("lesion_4") is None
    lesions, single = shown.mask("lesion"), shown.mask("lesion_3")
    assert lesions is not None
    assert single is not None
    assert (lesions & single).sum() == single.sum() > 0


def test_evidence_speaks_of_stored_voxels_of_a_turned_volume() -> None:
    turned = np.array([[1.5, 0.1, 0, 5], [0, 0.2, 2.0, 9], [0, -3.0, 0.3, 4], [0, 0, 0, 1]])
    straight, shown = scene(), scene(turned)
    for name in ("liver", "kidney_right", "lesion_2"):
        expected, mask, evidence = straight.mask(name), shown.mask(name), shown.evidence(name, "")
        assert expected is not None
        assert mask is not None
        assert mask.shape == (16, 12, 20)
        assert np.array_equal(shown.transform.forward_array(mask), expected)
        assert evidence.centroid is not None
        assert mask[tuple(np.round(evidence.centroid).astype(int))]


def test_sentences_get_their_own_lesion_and_side() -> None:
    asked, point = points_at("lesion_2")
    text = (
        "There is a cyst in the left lobe of the liver. There is a nodule in the right lobe of the liver. "
        "There is a cyst in the right kidney. There is a cyst in the left kidney. The left kidney is normal. "
        "Impression: cyst in the liver and cyst in the right kidney."
    )
    found = ground_report(text, scene(), point)  # type: ignore[arg-type]
    assert names(found) == [
        ["lesion_2", "liver"], ["lesion_1", "liver"], ["lesion_3", "kidney_right"], ["lesion", "kidney_left"],
        ["kidney_left"], ["lesion_1", "lesion_2", "lesion_3", "liver", "kidney_right"],
    ]  # fmt: skip
    assert asked == ["cyst in the left lobe of the liver"]  # of the one that is left nothing is asked
    assert "points at" in found[0].evidence[0].why
    assert "the only lesion left" in found[1].evidence[0].why
    for sentence in found[3:5]:
        assert all(item.voxels == 0 and item.centroid is None for item in sentence.evidence)
        assert all("not found in the image map" in item.why for item in sentence.evidence)


@pytest.mark.parametrize(
    ("size", "wanted", "asked_for"),
    [
        ("10 mm", "lesion_1", 0),  # 10.5 mm on this grid, the other 14.9
        ("1.5 cm", "lesion_2", 0),
        ("12.5 mm", "lesion_2", 1),  # both are about that large
        ("40 mm", "lesion_2", 1),  # neither is
    ],
)
def test_a_stated_size_chooses_before_the_pointer(size: str, wanted: str, asked_for: int) -> None:
    shown = scene()
    shown.elements.maps[4, 2:5, 4:7, 2:6] = 4.0
    asked, point = points_at("lesion_2")
    (sentence,) = ground_report(f"There is a {size} cyst in the liver.", shown, point)  # type: ignore[arg-type]
    assert [item.name for item in sentence.evidence] == [wanted, "liver"]
    assert len(asked) == asked_for
    assert ("mm" in sentence.evidence[0].why) == (size != "40 mm")


def test_no_lesion_of_another_organ_takes_a_mentions_place() -> None:
    _, point = points_at()
    answer = Answer("Is there a lesion in the left kidney?", "yes", "")
    (sentence,) = ground_answer(answer, scene(), point)  # type: ignore[arg-type]
    assert [(item.name, item.voxels) for item in sentence.evidence] == [("lesion", 0), ("kidney_left", 0)]
    every = ground_answer(replace(answer, question="How many lesions are there?", text="three"), scene(), point)  # type: ignore[arg-type]
    assert names(every) == [["lesion_1", "lesion_2", "lesion_3"]]


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor.load()


@pytest.mark.weights
@pytest.mark.parametrize("seed", [2_000_003, 2_000_007])
def test_masks_of_a_true_report_lie_on_the_truth(predictor: Predictor, seed: int) -> None:
    """What ``scripts/evaluate_evidence.py`` measures, on two cases of seeds that no training uses."""
    case = generate_case(seed)
    session = predictor.open(case.volume())
    right = []
    for sentence in predictor.ground_report(session, case.report):
        for item in (item for item in sentence.evidence if item.voxels and item.name in CLASSES):
            mask, truth = predictor.evidence_mask(session, item.name), case.organs == CLASSES.index(item.name) + 1
            assert item.voxels == np.count_nonzero(mask)
            right.append(2 * np.count_nonzero(mask & truth) / (item.voxels + np.count_nonzero(truth)) >= 0.5)
    assert len(right) >= 4
    assert np.mean(right) >= 0.8
    report = predictor.report(session)
    assert " ".join(sentence.text for sentence in report.sentences) == report.text
    with pytest.raises(PromptError, match="not found in the image map"):
        predictor.evidence_mask(session, "lesion_9")
