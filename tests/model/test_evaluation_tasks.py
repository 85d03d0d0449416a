"""Evaluation cases, real case lists, the tasks without clicks, and the runner's tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from medvl_sam2.errors import DataError
from medvl_sam2.evaluation import language_report, language_tasks, metrics, tasks
from medvl_sam2.evaluation.boxes import box_of, parse_box
from medvl_sam2.evaluation.cases import EvaluationCase, from_generated, from_real, generated_cases
from medvl_sam2.evaluation.controls import GrowControl, ShapeControl
from medvl_sam2.evaluation.overview import overview
from medvl_sam2.evaluation.runner import NO_HEAD, Plan, Runner
from medvl_sam2.evaluation.text_scores import TextScorer
from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.synthesis import Case, generate_case
from medvl_sam2.training.real_cases import (
    TRAINABLE_REAL,
    UNSEEN_REAL,
    load_case,
    load_cases,
    structure_name,
    vocabulary_class,
)
from medvl_sam2.types import Answer, Prompt, Segmentation, Volume
from medvl_sam2.vocabulary import spoken


def test_no_patient_is_on_both_sides() -> None:
    trained = {source.patient for source in TRAINABLE_REAL}
    unseen = {source.patient for source in UNSEEN_REAL}
    assert not trained & unseen
    folders = {source.folder for source in TRAINABLE_REAL} | {"ts_ct_abdomen_slab_3mm"}
    assert not folders & {source.folder for source in UNSEEN_REAL}
    thorax = [
        s.patient for s in TRAINABLE_REAL if s.folder in ("ts_ct_aortic_dissection_1p5mm", "ts_ct_pulmonary_1p5mm")
    ]
    assert len(thorax) == 2
    assert len(set(thorax)) == 1


@pytest.mark.parametrize(
    ("label", "name", "merged"),
    [
        ("GTV_Mass (soft tissue sarcoma)", "GTV_Mass", "lesion"),
        ("lung nodule >= 3 mm", "lung_nodule", "lesion"),
        ("2 spine", "spine", "vertebrae"),
        ("vertebrae_L5", "vertebrae_L5", "vertebrae"),
        ("lung_upper_lobe_left", "lung_upper_lobe_left", "lung_left"),
        ("rib_left_7", "rib_left_7", None),
        ("anterior hippocampus", "anterior_hippocampus", None),
    ],
)
def test_names(label: str, name: str, merged: str | None) -> None:
    assert structure_name(label) == name
    assert vocabulary_class(name) == merged


def test_masks_are_placed_by_affine(shared_data: Path) -> None:
    source = next(source for source in UNSEEN_REAL if source.name == "ts_ct_dicom20")
    case = load_case(shared_data, source)
    transform = CanonicalTransform(case.volume.geometry)
    liver = np.argwhere(transform.forward_array(case.masks["liver"])).mean(0)
    spleen = np.argwhere(transform.forward_array(case.masks["spleen"])).mean(0)
    assert liver[2] < spleen[2]  # x grows to the patient's left
    values = case.volume.array[case.masks["liver"]]
    assert 60 < np.median(values) < 200  # contrast-enhanced liver; placed by index it would meet lung and fat
    assert np.percentile(values, 5) > 0
    assert "kidney_left" in case.known_classes()
    assert "lesion" not in case.known_classes()


def test_partial_structures_are_not_their_class(shared_data: Path) -> None:
    source = next(source for source in TRAINABLE_REAL if source.name == "ts_ct_aortic_dissection_1p5mm")
    case = load_case(shared_data, source)
    assert "vertebrae_T12" in case.masks
    assert set(case.classes()) == {"aorta"}


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the real cases"):
        next(load_cases(tmp_path, UNSEEN_REAL))
    (tmp_path / UNSEEN_REAL[0].folder).mkdir()
    with pytest.raises(DataError, match="lacks"):
        next(load_cases(tmp_path, UNSEEN_REAL))


def test_training_seeds_are_refused() -> None:
    with pytest.raises(DataError, match="may have been trained on"):
        next(generated_cases(1, first_seed=17))


@pytest.fixture(scope="module")
def studies() -> list[Case]:
    """Two generated studies; the first one with findings has something to report."""
    return [generate_case(2_000_000), generate_case(2_000_001)]


def test_generated_case_becomes_an_evaluation_case(studies: list[Case]) -> None:
    case = from_generated(studies[0], min_voxels=500)
    assert case.split == "generated"
    assert all(mask.sum() >= 500 for _, mask in case.objects)
    assert set(case.known) > set(case.classes)
    study = studies[0]
    transform = CanonicalTransform(case.volume.geometry)
    for name, mask in case.classes.items():
        values = transform.forward_array(mask)
        expected = study.lesions > 0 if name == "lesion" else None
        assert values.any()
        if expected is not None:
            assert np.array_equal(values, expected)
    assert set(from_generated(study, min_voxels=10**9).left_out) >= {name for name, _ in case.objects}


# --- text tasks with a predictor that knows the truth ---------------------------------------------------------------


@dataclass
class Oracle:
    """A predictor that answers from the truth of one case; ``wrong`` makes it fail in known ways."""

    case: EvaluationCase
    wrong: bool = False

    def open(self, volume: Volume) -> Any:
        return None

    def segment_prompt(self, session: Any, prompt: Prompt, name: str = "object") -> Segmentation:
        mask = np.zeros(self.case.volume.geometry.shape, dtype=np.uint8)
        centre = prompt.points[-1] if len(prompt.points) else np.asarray(prompt.box).mean(axis=0)
        hit = [m for _, m in self.case.objects if m[tuple(np.rint(centre).astype(int))]]
        if hit:
            mask[hit[0]] = 1
        return Segmentation(mask, self.case.volume.geometry, (name,))

    def segment_classes(
        self, session: Any, classes: Sequence[str], progress: Callable[[float, str], None] | None = None
    ) -> Segmentation:
        mask = np.zeros(self.case.volume.geometry.shape, dtype=np.uint8)
        for value, name in enumerate(classes, 1):
            if name in self.case.classes:
                mask[self.case.classes[name]] = value
            elif self.wrong:
                mask[0, 0, 0] = value
        return Segmentation(mask, self.case.volume.geometry, tuple(classes))

    def segment_text(self, session: Any, text: str) -> Segmentation:
        mask = np.zeros(self.case.volume.geometry.shape, dtype=np.uint8)
        study = self.case.generated
        assert study is not None
        target = next(study.target(item) for item in study.referring if item.text == text)
        mask[CanonicalTransform(self.case.volume.geometry).inverse_array(target)] = 1
        return Segmentation(mask, self.case.volume.geometry, ("object",))

    def answer(self, session: Any, question: str) -> Answer:
        study = self.case.generated
        assert study is not None
        right = next((qa.answer for qa in study.qa if qa.prompt == question), "spleen")
        return Answer(question, "nonsense" if self.wrong else right, "notice")

    def report(self, session: Any) -> Answer:
        study = self.case.generated
        assert study is not None
        return Answer("", "" if self.wrong else study.report, "notice")


def test_perfect_predictor_scores_one_everywhere(studies: list[Case]) -> None:
    case = from_generated(studies[0])
    oracle = Oracle(case)
    scores, picture = tasks.semantic(oracle, None, case)
    assert {score.structure for score in scores} == set(case.classes)
    assert all(score.dice == 1.0 for score in scores)
    assert picture.max() > 0
    sentences = tasks.referring(oracle, None, case, limit=12)
    assert len(sentences) == 12
    assert all(score.dice == 1.0 for score in sentences)
    assert all(item.box is not None and item.box.iou == 1.0 for item in sentences)
    answers = language_tasks.closed_questions(oracle, None, case)
    assert answers
    assert all(answer.right and answer.letter_right for answer in answers)
    score = language_tasks.report(oracle, None, case)
    assert score is not None
    assert (score.counts.extra, score.counts.missed) == (0, 0)


def test_absent_but_predicted_scores_zero(studies: list[Case]) -> None:
    case = from_generated(studies[0])
    absent = set(case.known) - set(case.classes)
    assert absent, "the case needs an absent class for this test"
    scores, _ = tasks.semantic(Oracle(case, wrong=True), None, case)
    invented = {score.structure: score.dice for score in scores if not score.present}
    assert invented.keys() <= absent
    assert invented
    assert set(invented.values()) == {0.0}


def answer_score(kind: str, expected: str, given: str, case: str = "c") -> language_tasks.AnswerScore:
    return language_tasks.AnswerScore(case, case, kind, "q", expected, given, 3)


def test_controls_of_answers_and_reports(studies: list[Case]) -> None:
    answers = [answer_score("phase", text, "x") for text in ("A. venous", "B. venous", "A. arterial")]
    # Letters move from question to question; what is constant is the text.
    assert language_tasks.majority_accuracy(answers) == {"phase": pytest.approx(2 / 3)}
    cases = [from_generated(study) for study in studies]
    scores = [
        score for case in cases if (score := language_tasks.report(Oracle(case, wrong=True), None, case)) is not None
    ]
    figures = language_report.report_figures(scores, TextScorer())
    # The best of the two reports as they were written, given for both studies.
    totals = [
        sum((metrics.match_counts(given.findings, score.findings) for score in scores), metrics.Counts())
        for given in scores
    ]
    assert figures["constant_report_f1"] == max(total.f1 or 0.0 for total in totals) > 0
    assert sum(score.counts.hit for score in scores) == 0
    assert figures["finding_f1_interval"]["mean"] == 0.0
    assert figures["constant_text_scores"]["bleu_1"]["mean"] > figures["text_scores"]["bleu_1"]["mean"] == 0.0


def test_both_rules_of_closed_questions() -> None:
    scores = [
        answer_score("phase", "B. venous", "B. venous"),  # right by both
        answer_score("phase", "B. venous", "venous"),  # right text, no letter: ours only
        answer_score("side", "A. left", "A. right"),  # right letter, wrong text: theirs only
        answer_score("side", "A. left", "B. right"),  # wrong by both
        answer_score("side", "A. left", "not B. but A."),  # theirs only
    ]
    assert [s.right for s in scores] == [True, True, False, False, False]
    assert [s.letter_right for s in scores] == [True, False, True, False, True]
    figures = language_report.answer_figures(scores)
    assert figures["accuracy"]["mean"] == pytest.approx(2 / 5)
    assert figures["mean_of_kinds"]["mean"] == pytest.approx((1 + 0) / 2)
    assert figures["letter"]["accuracy"]["mean"] == pytest.approx(3 / 5)
    assert figures["letter"]["mean_of_kinds"]["mean"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    with pytest.raises(DataError, match="no lettered answer"):
        metrics.letter_occurs("venous", "venous")


def test_constant_answers_of_a_kind_and_of_all() -> None:
    answers = [
        language_tasks.WrittenAnswer("c", "p", kind, "q", expected, "")
        for kind, expected in (("phase", "venous"), ("phase", "venous"), ("side", "left"))
    ]
    assert language_tasks.constant_answers(answers, by_kind=True) == {"phase": "venous", "side": "left"}
    assert language_tasks.constant_answers(answers, by_kind=False) == {"phase": "venous", "side": "venous"}


def test_regions_are_asked_with_boxes(studies: list[Case]) -> None:
    case = from_generated(studies[0])
    answers = language_tasks.regions(Oracle(case), None, case, limit=3)
    assert len(answers) == 3
    for answer in answers:
        box = parse_box(answer.question)
        truth = CanonicalTransform(case.volume.geometry).forward_array(case.classes[answer.kind])
        assert box == box_of(truth)
        assert answer.expected == spoken(answer.kind)


def test_surface_scores_only_when_asked(studies: list[Case]) -> None:
    case = from_generated(studies[0])
    plain = tasks.referring(Oracle(case), None, case, limit=1)
    with_nsd = tasks.referring(Oracle(case), None, case, limit=1, with_nsd=True)
    assert plain[0].surfaces is None
    assert with_nsd[0].surfaces == tasks.Surfaces(1.0, 1.0)


class Encoder(Oracle):
    """An oracle with an image-text head: one axis a report."""

    texts: ClassVar[list[str]] = []
    embeds = True

    def embed_volume(self, volume: Volume) -> np.ndarray:
        assert self.case.generated is not None
        return self.embed_text(self.case.generated.report)

    def embed_text(self, text: str) -> np.ndarray:
        if text not in self.texts:
            self.texts.append(text)
        return np.eye(8)[self.texts.index(text)]


def test_retrieval_runs_with_an_image_text_head_and_says_why_not(studies: list[Case]) -> None:
    cases = [from_generated(study) for study in studies]
    runner = Runner(Plan(tasks=("retrieval",)), Encoder(cases[0]), [])
    for case in cases:
        runner.predictor = Encoder(case)
        runner.run_text(case)
    figures = runner.figures()
    assert {(r["pairs"], r["depth"], r["recall"]["mean"]) for r in figures["retrieval"]} == {(2, 1, 1.0)}
    assert figures["skipped"] == {}
    assert "Image-text retrieval" in overview(figures)
    table = figures["retrieval"][0]
    assert (table["chance"], table["chance_equal_texts"]) == (0.5, 0.5)
    other = Runner(Plan(tasks=("vqa",)), Encoder(cases[0]), [])
    other.run_retrieval(cases[0])
    assert (other.retrieves, other.pairs) == (False, [])
    without = Runner(Plan(tasks=("retrieval",)), Oracle(cases[0]), [])
    without.run_text(cases[0])
    assert without.figures()["skipped"] == {"retrieval": NO_HEAD}
    assert NO_HEAD in overview(without.figures())


def test_text_cases_run_the_text_tasks_only(studies: list[Case]) -> None:
    case = from_generated(studies[0])
    runner = Runner(Plan(), Oracle(case), [ShapeControl()])
    runner.run_text(case)
    figures = runner.figures()
    assert {"vqa", "open_vqa", "report"} <= set(figures)
    assert not {"interactive", "semantic", "referring"} & set(figures)
    assert figures["open_vqa"]["scores"]["rouge_1"]["mean"] == 1.0
    assert figures["report"]["text_scores"]["bleu_4"]["mean"] == pytest.approx(1.0)


def test_runner_makes_tables_figures_and_pictures(studies: list[Case], tmp_path: Path) -> None:
    case = from_generated(studies[0])
    plan = Plan(clicks=1, objects_per_case=2, sentences_per_case=3, with_nsd=True, pictures=tmp_path)
    runner = Runner(plan, Oracle(case), [ShapeControl(), GrowControl()])
    runner.run(case)
    figures = json.loads(json.dumps(runner.figures()))
    assert {record["setting"] for record in figures["interactive"]} == {"box", "clicks"}
    for record in figures["interactive"]:
        assert set(record["engines"]) == {"model", "shape control", "grow control"}
        assert record["objects"] == 2
        best = record["engines"][record["best_control"]]["steps"]["1"]["dice"]["mean"]
        model = record["engines"]["model"]["steps"]["1"]["dice"]["mean"]
        assert record["margin"]["mean"] == pytest.approx(model - best)
    assert figures["semantic"][0]["mean"]["mean"] == 1.0
    assert figures["vqa"]["accuracy"]["mean"] == 1.0
    assert figures["semantic"][0]["nsd_2mm"]["mean"] == 1.0
    assert figures["semantic"][0]["relatives"]["medsam2_dice"]["mean"] == 1.0
    assert 0.99 < figures["semantic"][0]["relatives"]["m3d_dice"]["mean"] < 1.0
    assert figures["referring"][0]["boxes"] == {
        "iou": {"mean": 1.0, "low": 1.0, "high": 1.0, "count": 3},
        "m3d_iou": figures["referring"][0]["boxes"]["m3d_iou"],
        "without_box": 0,
    }
    text = overview(figures)
    for structure in figures["semantic"][0]["structures"]:
        assert structure in text
    assert "grow control" in text
    assert "Closed questions" in text
    assert sorted(picture.path for picture in runner.pictures) == sorted(tmp_path.glob("*.png"))
    assert len(runner.pictures) == 5
    with pytest.raises(DataError, match="must be some of"):
        Plan(tasks=("dance",))


def test_real_case_keeps_small_structures_out(shared_data: Path) -> None:
    source = next(source for source in TRAINABLE_REAL if source.name == "ts_mr_abdomen_slab_3mm")
    case = from_real(load_case(shared_data, source))
    assert case.split == "real"
    assert "lung_right" in case.left_out
    assert "liver" in {name for name, _ in case.objects}
