"""Scores, the interactive loop, controls, real case lists, tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medvl_sam2.errors import DataError, PromptError
from medvl_sam2.evaluation import metrics, tasks
from medvl_sam2.evaluation.cases import EvaluationCase, from_generated, from_real, generated_cases
from medvl_sam2.evaluation.controls import GrowControl, ShapeControl
from medvl_sam2.evaluation.pictures import draw
from medvl_sam2.evaluation.protocol import Setting, run_object
from medvl_sam2.evaluation.runner import Plan, Runner
from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.region_grow import GrowRule, ball, ellipsoid, grow
from medvl_sam2.synthesis import Case, generate_case
from medvl_sam2.training.real_cases import (
    TRAINABLE_REAL,
    UNSEEN_REAL,
    load_case,
    load_cases,
    structure_name,
    vocabulary_class,
)
from medvl_sam2.types import Answer, Geometry, Modality, Prompt, Segmentation, Volume


def turned_volume() -> tuple[Volume, np.ndarray]:
    """A bright ellipsoid in a volume stored as (anterior, superior, right) with unequal voxels, and its mask."""
    shape = (30, 16, 36)
    affine = np.zeros((4, 4))
    affine[1, 0], affine[2, 1], affine[0, 2], affine[3, 3] = 1.5, 4.0, 1.0, 1.0
    grids = np.ogrid[: shape[0], : shape[1], : shape[2]]
    mask = ((grids[0] - 18) / 7) ** 2 + ((grids[1] - 6) / 4) ** 2 + ((grids[2] - 12) / 9) ** 2 <= 1
    noise = np.random.default_rng(0).normal(0, 5, shape)
    return Volume((np.where(mask, 100, 0) + noise).astype(np.float32), Geometry(shape, affine), Modality.CT), mask


# --- scores -------------------------------------------------------------------------------------------------------


def test_dice_by_hand_and_when_empty() -> None:
    a, b = np.zeros((2, 4), dtype=bool), np.zeros((2, 4), dtype=bool)
    assert metrics.dice(a, b) is None
    a[0, :3] = True
    assert metrics.dice(a, b) == 0.0
    b[0, 2:4] = True
    assert metrics.dice(a, b) == pytest.approx(2 * 1 / 5)
    with pytest.raises(DataError, match="does not fit"):
        metrics.dice(a, b[:, :3])


def test_surface_dice_counts_millimetres_not_voxels() -> None:
    truth = np.zeros((20, 30, 30), dtype=bool)
    truth[5:15, 8:20, 8:20] = True
    moved = np.roll(truth, 1, axis=0)
    assert metrics.surface_dice(truth, truth, (1.0, 1.0, 1.0)) == pytest.approx(1.0)
    assert metrics.surface_dice(truth, moved, (1.0, 1.0, 1.0)) == pytest.approx(1.0)
    coarse = metrics.surface_dice(truth, moved, (5.0, 1.0, 1.0))
    assert coarse is not None
    assert coarse < 0.9
    assert metrics.surface_dice(truth, np.zeros_like(truth), (1.0, 1.0, 1.0)) == 0.0
    assert metrics.surface_dice(np.zeros_like(truth), np.zeros_like(truth), (1.0, 1.0, 1.0)) is None


def test_area_under_clicks_is_the_challenge_formula() -> None:
    assert metrics.area_under_clicks([1.0] * 5) == pytest.approx(4.0)
    assert metrics.area_under_clicks([0.0, 0.2, 0.4, 0.6, 0.8]) == pytest.approx(1.6)
    with pytest.raises(DataError, match="needs 5"):
        metrics.area_under_clicks([0.5] * 4)


def test_bootstrap_draws_patients_not_structures() -> None:
    # Twenty structures a patient: as single values the interval would be far narrower.
    values = [0.9] * 20 + [0.5] * 20 + [0.7] * 20
    clustered = metrics.bootstrap(values, ["a"] * 20 + ["b"] * 20 + ["c"] * 20)
    single = metrics.bootstrap(values, list(range(60)))
    assert clustered is not None
    assert single is not None
    assert clustered.mean == pytest.approx(0.7)
    assert clustered.high - clustered.low > 2 * (single.high - single.low)
    assert metrics.bootstrap([], []) is None


@pytest.mark.parametrize(
    ("given", "right"),
    [("B. Two cysts", True), ("b", True), ("two  cysts.", True), ("A. two cysts", False), ("C", False), ("", False)],
)
def test_lettered_answers(given: str, right: bool) -> None:
    assert metrics.same_answer(given, "B. two cysts") is right


def test_finding_counts_and_f1() -> None:
    counts = metrics.match_counts([("liver", "cyst"), ("spleen", "cyst")], [("liver", "cyst"), ("pancreas", "cyst")])
    assert (counts.hit, counts.extra, counts.missed) == (1, 1, 1)
    assert counts.f1 == pytest.approx(0.5)
    assert metrics.Counts().f1 is None
    assert (counts + counts).hit == 2


# --- region growing -----------------------------------------------------------------------------------------------


def test_ball_is_measured_in_millimetres() -> None:
    mask = ball((20, 40, 40), np.array([10.0, 20.0, 20.0]), 6.0, (3.0, 1.5, 1.0))
    spans = np.ptp(np.argwhere(mask), axis=0)
    assert spans.tolist() == [4, 8, 12]
    assert ball((5, 5, 5), np.array([2.0, 2.0, 2.0]), 0.1, (1.0, 1.0, 1.0)).sum() == 1


def test_ellipsoid_fills_its_box_and_stays_in_the_volume() -> None:
    mask = ellipsoid((20, 20, 20), np.array([[2, 4, 6], [10, 12, 18]]))
    where = np.argwhere(mask)
    assert where.min(0).tolist() == [2, 4, 6]
    assert where.max(0).tolist() == [10, 12, 18]
    assert mask.sum() == pytest.approx(np.pi / 6 * 9 * 9 * 13, rel=0.05)
    assert ellipsoid((8, 8, 8), np.array([[-4, 0, 0], [3, 7, 7]]), scale=1.5).shape == (8, 8, 8)


def test_grow_finds_the_object_not_its_twin_and_fills_holes() -> None:
    image = np.random.default_rng(0).normal(0, 4, (24, 40, 40)).astype(np.float32)
    target, twin = ball((24, 40, 40), np.array([12.0, 14.0, 14.0]), 8, (1, 1, 1)), np.zeros((24, 40, 40), dtype=bool)
    twin[8:16, 10:18, 30:38] = True
    image[target | twin] += 100
    image[12, 14, 17] = 0  # a dark voxel inside
    allowed = np.ones_like(twin)
    core = ball(image.shape, np.array([12.0, 14.0, 14.0]), 3, (1, 1, 1))
    found = grow(image, (1.0, 1.0, 1.0), allowed, core, GrowRule(k=3.0, floor=0.1))
    assert not (found & twin).any()
    assert found[12, 14, 17]
    score = metrics.dice(target, found)
    assert score is not None
    assert score > 0.9
    assert not grow(image, (1.0, 1.0, 1.0), np.zeros_like(twin), core).any()


# --- the loop -----------------------------------------------------------------------------------------------------


class Painter:
    """Engine that records its prompts and paints a growing part of the truth."""

    name = "painter"

    def __init__(self, truth: np.ndarray, shares: Sequence[float]) -> None:
        self.truth = truth
        self.shares = list(shares)
        self.prompts: list[Prompt] = []

    def open(self, volume: Volume) -> str:
        return "opened"

    def segment(self, opened: str, prompt: Prompt) -> np.ndarray:
        assert opened == "opened"
        share = self.shares[len(self.prompts)]
        self.prompts.append(prompt)
        where = np.argwhere(self.truth)
        part = np.zeros_like(self.truth)
        part[tuple(where[: round(share * len(where))].T)] = True
        return part


def test_loop_speaks_stored_voxels_and_clicks_cumulatively() -> None:
    volume, truth = turned_volume()
    engine = Painter(truth, [0.2, 0.4, 0.6, 0.8])
    curve = run_object(engine, engine.open(volume), volume, truth, "blob", Setting.BOX, clicks=3)
    assert [step.clicks for step in curve.steps] == [0, 1, 2, 3]
    assert [len(prompt.points) for prompt in engine.prompts] == [0, 1, 2, 3]
    expected = [2 * share / (1 + share) for share in (0.2, 0.4, 0.6, 0.8)]
    assert [step.dice for step in curve.steps] == pytest.approx(expected, abs=2e-3)
    assert curve.after(0) == curve.steps[0].dice
    box = engine.prompts[0].box
    assert box is not None
    where = np.argwhere(truth)
    # Axis 1 of the stored array is the canonical z: its range is exact; in plane the middle slice is the widest.
    assert box[:, 1].tolist() == [where[:, 1].min(), where[:, 1].max()]
    assert np.array_equal(box, np.stack([where.min(0), where.max(0)]))
    last = engine.prompts[-1]
    for point, label in zip(last.points, last.labels, strict=True):
        assert truth[tuple(point.astype(int))]
        assert label == 1
    assert last.validated(volume.geometry.shape) is not None


def test_loop_without_box_starts_at_the_deepest_point_and_stops_clicking_when_right() -> None:
    volume, truth = turned_volume()
    engine = Painter(truth, [0.5, 1.0])
    curve = run_object(engine, engine.open(volume), volume, truth, "blob", Setting.CLICKS, clicks=5, with_nsd=True)
    assert engine.prompts[0].box is None
    assert np.abs(engine.prompts[0].points[0] - [18, 6, 12]).max() <= 1
    assert len(engine.prompts) == 2
    assert [step.dice for step in curve.steps[1:]] == [1.0] * 4
    assert [step.seconds is None for step in curve.steps] == [False, False, True, True, True]
    assert curve.steps[-1].nsd == pytest.approx(1.0)
    first = curve.steps[0].dice
    assert curve.auc == pytest.approx((first + 1) / 2 + 3)
    with pytest.raises(DataError, match="no step with 0 clicks"):
        curve.after(0)


def test_loop_refuses_an_empty_structure() -> None:
    volume, truth = turned_volume()
    with pytest.raises(DataError, match="'ghost' is empty"):
        run_object(ShapeControl(), None, volume, np.zeros_like(truth), "ghost", Setting.BOX)


def test_shape_control_starts_from_the_box_and_gains_by_clicks() -> None:
    volume, truth = turned_volume()
    control = ShapeControl()
    curve = run_object(control, control.open(volume), volume, truth, "blob", Setting.BOX)
    assert curve.steps[0].dice > 0.75
    assert curve.steps[-1].dice > curve.steps[0].dice - 0.02
    clicked = run_object(control, control.open(volume), volume, truth, "blob", Setting.CLICKS)
    # The first ball knows no size and drowns this small object; clicks can only gain.
    assert 0 < clicked.steps[0].dice < clicked.steps[-1].dice < curve.steps[-1].dice


@pytest.mark.parametrize("setting", list(Setting))
def test_grow_control_follows_intensities(setting: Setting) -> None:
    volume, truth = turned_volume()
    control = GrowControl()
    curve = run_object(control, control.open(volume), volume, truth, "blob", setting)
    assert curve.steps[-1].dice > 0.8
    blind = Volume(np.zeros_like(volume.array), volume.geometry, volume.modality)
    unseen = run_object(control, control.open(blind), blind, truth, "blob", setting)
    assert curve.steps[0].dice > unseen.steps[0].dice


def test_a_control_obeys_its_clicks() -> None:
    volume, truth = turned_volume()
    for control in (ShapeControl(), GrowControl()):
        opened = control.open(volume)
        far = np.array([[18.0, 6.0, 12.0], [4.0, 13.0, 30.0], [18.0, 6.0, 14.0]])
        mask = control.segment(opened, Prompt(far, np.array([1, 1, 0])))
        assert mask.shape == truth.shape
        assert mask[4, 13, 30]
        assert not mask[18, 6, 14]
        with pytest.raises(PromptError, match="neither"):
            control.segment(opened, Prompt(far[:1], np.array([0])))


# --- cases --------------------------------------------------------------------------------------------------------


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


def test_picture_shows_mask_truth_and_prompt(tmp_path: Path) -> None:
    volume, truth = turned_volume()
    prompt = Prompt(np.array([[18.0, 6.0, 12.0]]), np.array([1]), np.array([[11, 2, 3], [25, 10, 21]]))
    for name, kwargs in {"plain": {}, "full": {"truth": truth, "prompt": prompt, "text": "a report"}}.items():
        mask = truth if name == "full" else np.zeros_like(truth)
        draw(tmp_path / f"{name}.png", volume, mask, name, **kwargs)
    plain, full = (np.asarray(Image.open(tmp_path / f"{n}.png").convert("RGB")).astype(int) for n in ("plain", "full"))
    green = lambda image: ((image[..., 1] > 150) & (image[..., 0] < 120) & (image[..., 2] < 140)).sum()  # noqa: E731
    assert green(full) > 200
    assert green(plain) == 0


def test_real_case_keeps_small_structures_out(shared_data: Path) -> None:
    source = next(source for source in TRAINABLE_REAL if source.name == "ts_mr_abdomen_slab_3mm")
    case = from_real(load_case(shared_data, source))
    assert case.split == "real"
    assert "lung_right" in case.left_out
    assert "liver" in {name for name, _ in case.objects}
