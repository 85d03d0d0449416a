"""Scores, region growing, the interactive loop, its controls, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medvl_sam2.errors import DataError, PromptError
from medvl_sam2.evaluation import metrics
from medvl_sam2.evaluation.controls import GrowControl, ShapeControl, ShapeRule
from medvl_sam2.evaluation.pictures import draw
from medvl_sam2.evaluation.protocol import Setting, run_object
from medvl_sam2.evaluation.surface import surface_dice
from medvl_sam2.region_grow import GrowRule, ball, ellipsoid, grow
from medvl_sam2.types import Geometry, Modality, Prompt, Volume


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
    assert surface_dice(truth, truth, (1.0, 1.0, 1.0)) == pytest.approx(1.0)
    assert surface_dice(truth, moved, (1.0, 1.0, 1.0)) == pytest.approx(1.0)
    coarse = surface_dice(truth, moved, (5.0, 1.0, 1.0))
    assert coarse is not None
    assert coarse < 0.9
    assert surface_dice(truth, np.zeros_like(truth), (1.0, 1.0, 1.0)) == 0.0
    assert surface_dice(np.zeros_like(truth), np.zeros_like(truth), (1.0, 1.0, 1.0)) is None


def test_ratio_and_mean_of_kinds_by_hand() -> None:
    # Two hits of three findings at one patient, none of one at another.
    ratio = metrics.bootstrap_ratio([4.0, 0.0], [5.0, 1.0], ["a", "b"])
    assert ratio is not None
    assert ratio.mean == pytest.approx(4 / 6)
    assert (ratio.low, ratio.high) == pytest.approx((0.0, 0.8))
    assert metrics.bootstrap_ratio([0.0], [0.0], ["a"]) is None
    kinds = metrics.bootstrap_mean_of_kinds([1.0, 1.0, 1.0, 0.0], ["x", "x", "x", "y"], ["a", "a", "a", "b"])
    assert kinds is not None
    assert kinds.mean == pytest.approx(0.5)
    # Draws that hold one patient only know one kind.
    assert (kinds.low, kinds.high) == pytest.approx((0.0, 1.0))
    with pytest.raises(DataError, match="one of each"):
        metrics.bootstrap_ratio([1.0], [1.0, 2.0], ["a"])


def test_ratio_leaves_out_draws_that_say_nothing() -> None:
    # Three of four draws of two patients hold the one with findings; the fourth divides nought by nought.
    ratio = metrics.bootstrap_ratio([2.0, 0.0], [4.0, 0.0], ["a", "b"])
    assert ratio is not None
    assert (ratio.low, ratio.mean, ratio.high) == pytest.approx((0.5, 0.5, 0.5))


def test_intervals_of_one_mean_agree() -> None:
    rng = np.random.default_rng(5)
    values = rng.random(40).tolist()
    groups = [n // 4 for n in range(40)]
    plain = metrics.bootstrap(values, groups)
    one_kind = metrics.bootstrap_mean_of_kinds(values, ["k"] * 40, groups)
    assert plain is not None
    assert one_kind is not None
    assert plain.low < np.mean(values) < plain.high
    assert (one_kind.mean, one_kind.low, one_kind.high) == pytest.approx((plain.mean, plain.low, plain.high))


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

    def segment(self, opened: str, prompt: Prompt, name: str = "object") -> np.ndarray:
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
    control = ShapeControl(ShapeRule(first_mm=6.0))
    clicked = run_object(control, control.open(volume), volume, truth, "blob", Setting.CLICKS)
    # The first ball lies within the object; clicks can only gain.
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
