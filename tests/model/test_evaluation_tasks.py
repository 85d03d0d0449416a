"""Evaluation cases, real case lists, the tasks without clicks, and the runner's tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medvl_sam2.errors import DataError
from medvl_sam2.evaluation import metrics, tasks
from medvl_sam2.evaluation.cases import EvaluationCase, from_generated, from_real, generated_cases
from medvl_sam2.evaluation.controls import GrowControl, ShapeControl
from medvl_sam2.evaluation.runner import Plan, Runner
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
        right = next(qa.answer for qa in study.qa if qa.prompt == question)
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
    answers = tasks.closed_questions(oracle, None, case)
    assert answers
    assert all(answer.right for answer in answers)
    score = tasks.report(oracle, None, case)
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


def test_controls_of_answers_and_reports(studies: list[Case]) -> None:
    answers = [tasks.AnswerScore("c", "phase", "q", text, "x", 3) for text in ("A. venous", "B. venous", "A. arterial")]
    # Letters move from question to question; what is constant is the text.
    assert tasks.majority_accuracy(answers) == {"phase": pytest.approx(2 / 3)}
    cases = [from_generated(study) for study in studies]
    scores = [score for case in cases if (score := tasks.report(Oracle(case, wrong=True), None, case)) is not None]
    own = sum((metrics.match_counts(s.findings, s.findings) for s in scores), metrics.Counts())
    control = tasks.constant_report_control(scores)
    assert control.hit + control.missed == own.hit
    assert sum(score.counts.hit for score in scores) == 0


def test_runner_makes_tables_figures_and_pictures(studies: list[Case], tmp_path: Path) -> None:
    case = from_generated(studies[0])
    plan = Plan(clicks=1, objects_per_case=2, sentences_per_case=3, pictures=tmp_path)
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
    text = runner.text()
    for structure in figures["semantic"][0]["structures"]:
        assert structure in text
    assert "grow control" in text
    assert "Closed questions" in text
    assert len(list(tmp_path.glob("*.png"))) == 5
    with pytest.raises(DataError, match="must be some of"):
        Plan(tasks=("dance",))


def test_real_case_keeps_small_structures_out(shared_data: Path) -> None:
    source = next(source for source in TRAINABLE_REAL if source.name == "ts_mr_abdomen_slab_3mm")
    case = from_real(load_case(shared_data, source))
    assert case.split == "real"
    assert "lung_right" in case.left_out
    assert "liver" in {name for name, _ in case.objects}
