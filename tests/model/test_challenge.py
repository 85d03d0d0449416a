"""The CVPR 2025 protocol: boxes, the loop, scores and the container's files, on hand-made masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from challenge_reference import box_record, write_case
from medvl_sam2.errors import DataError, PromptError
from medvl_sam2.evaluation.challenge.case import (
    ChallengeCase,
    case_from_files,
    case_from_npz,
    drawn_boxes,
    painted,
    volume_from,
)
from medvl_sam2.evaluation.challenge.container import predict_file, read_request
from medvl_sam2.evaluation.challenge.loop import run_case, score
from medvl_sam2.evaluation.challenge.npz import read_npz
from medvl_sam2.evaluation.challenge.results import clicks_to_reach, row
from medvl_sam2.evaluation.controls import ShapeControl
from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.types import Prompt, Volume
from medvl_sam2.volume_io import write_mask
from small_model import oblique_volume

SHAPE = (12, 40, 52)
SPACING = (4.0, 0.8, 1.25)


def block(*spans: tuple[int, int]) -> np.ndarray:
    """Bool mask of :data:`SHAPE`; spans are inclusive."""
    mask = np.zeros(SHAPE, dtype=bool)
    mask[tuple(slice(low, high + 1) for low, high in spans)] = True
    return mask


LARGE, SMALL = block((2, 8), (5, 24), (6, 25)), block((4, 9), (30, 36), (30, 45))
LABELS = painted([LARGE, SMALL], SHAPE)


def volume() -> Volume:
    rng = np.random.default_rng(2)
    image = np.clip(40 + 80 * LABELS + rng.normal(0, 6, SHAPE), 0, 255).astype(np.uint8)
    return volume_from({"imgs": image, "spacing": np.array(SPACING)}, Path("case.npz"))


def case(boxes: bool = True) -> ChallengeCase:
    made = ChallengeCase("case", "case", volume(), LABELS, ("large", "small"), drawn_boxes(LABELS, 2))
    return made if boxes else made.without_boxes()


class Recorded:
    """Engine that answers each object with the next of its masks and keeps the prompts."""

    name = "recorded"

    def __init__(self, answers: dict[str, Sequence[np.ndarray]]) -> None:
        self.answers = {name: list(masks) for name, masks in answers.items()}
        self.prompts: dict[str, list[Prompt]] = {name: [] for name in answers}

    def open(self, volume: Volume) -> None:
        """Nothing to open."""

    def segment(self, opened: None, prompt: Prompt, name: str = "object") -> np.ndarray:
        self.prompts[name].append(prompt)
        return self.answers[name].pop(0)


# --- cases --------------------------------------------------------------------------------------------------------


def test_arrays_of_the_challenge_are_canonical_with_spacing_in_their_order() -> None:
    transform = CanonicalTransform(volume().geometry)
    assert transform.spacing == SPACING
    assert transform.shape == SHAPE
    assert transform.inverse_points(np.array([[1.0, 2.0, 3.0]])).tolist() == [[1.0, 2.0, 3.0]]


def test_boxes_take_one_draw_a_class_scaled_by_the_slice() -> None:
    labels = np.zeros((9, 256, 512), dtype=np.uint8)
    labels[1:4, 100:120, 200:230] = 1
    labels[3:8, 2:12, 500:511] = 2
    labels[5, 4:9, 501:509] = 0
    labels[5, 5:8, 502:508] = 2  # the middle slice is smaller than its neighbours
    first, second = np.random.RandomState(2025).randint(0, 6, 2).tolist()
    assert first != second
    boxes = drawn_boxes(labels, 2)
    assert boxes[0].tolist() == [[1, 100 - first, 200 - 2 * first], [3, 119 + first, 229 + 2 * first]]
    top, left = max(0, 2 - second), 500 - 2 * second
    assert boxes[1].tolist() == [[3, top, left], [7, 11 + second, min(511, 510 + 2 * second)]]


def test_the_box_is_that_of_the_middle_slice() -> None:
    labels = np.zeros((9, 20, 30), dtype=np.uint8)  # slices too small for a draw to move the box
    labels[2, 1:19, 1:29] = labels[5, 4:9, 10:15] = labels[6, 0:3, 0:3] = 1
    assert drawn_boxes(labels, 1)[0].tolist() == [[2, 4, 10], [6, 8, 14]]


def test_the_smaller_of_two_masks_lies_on_top() -> None:
    inner = block((4, 6), (10, 14), (10, 14))
    labels = painted([inner, None, LARGE], SHAPE)
    assert (labels[inner] == 1).all()
    assert (labels[LARGE & ~inner] == 3).all()
    assert not (labels == 2).any()


def test_npz_cases_are_numbered_in_order_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "odd.npz"
    image = volume().array.astype(np.uint8)
    values = np.array([0, 3, 7], dtype=np.uint8)[LABELS]
    write_case(path, image, values, SPACING, drawn_boxes(LABELS, 2))
    read = case_from_npz(path)
    assert read.names == ("class_3", "class_7")
    assert np.array_equal(read.labels, LABELS)
    assert read.boxes is not None
    assert [box.tolist() for box in read.boxes] == [box.tolist() for box in drawn_boxes(LABELS, 2)]
    write_case(path, image, values, SPACING)
    assert case_from_npz(path).boxes is None
    write_case(path, image, values, SPACING, drawn_boxes(LABELS, 1))
    with pytest.raises(DataError, match="1 boxes for 2 classes"):
        case_from_npz(path)
    write_case(path, image, values + np.uint8(1), SPACING)
    with pytest.raises(DataError, match="must be 0 for background"):
        case_from_npz(path)
    write_case(path, image, values[:5], SPACING)
    with pytest.raises(DataError, match="no label map 'gts'"):
        case_from_npz(path)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([[2, 5, 6], [8, 24, 52]], "outside the volume"),
        ([[8, 5, 6], [2, 24, 25]], "inverted"),
    ],
)
def test_bad_boxes_are_refused(tmp_path: Path, box: list[list[int]], message: str) -> None:
    path = tmp_path / "bad.npz"
    write_case(path, volume().array.astype(np.uint8), LABELS, SPACING, [np.array(box)] * 2)
    with pytest.raises(DataError, match=message):
        case_from_npz(path)
    np.savez(path, imgs=np.zeros(SHAPE), spacing=(1.0, 0.0, 1.0))
    with pytest.raises(DataError, match="three positive lengths"):
        read_request(path)


def test_an_image_and_its_mask_make_a_case_on_an_oblique_grid(tmp_path: Path) -> None:
    image, inside = oblique_volume()
    nib.save(nib.Nifti1Image(image.array, image.geometry.affine), tmp_path / "ct.nii.gz")
    write_mask(tmp_path / "mask.nrrd", inside.astype(np.uint8) * 4, image.geometry)
    read = case_from_files(tmp_path / "ct.nii.gz", tmp_path / "mask.nrrd")
    assert (read.name, read.names) == ("ct", ("class_4",))
    transform = CanonicalTransform(read.volume.geometry)
    assert np.array_equal(transform.inverse_array(read.labels) == 1, inside)
    engine = ShapeControl()
    curve = run_case(engine, read)
    assert curve.final.mean_dsc > 0.6
    for click in curve.clicks[0]:
        stored = transform.inverse_points(np.array([click.position]))[0].astype(int)
        assert inside[tuple(stored)] == (click.label == 1)


# --- the loop -----------------------------------------------------------------------------------------------------


def test_loop_asks_classes_in_parallel_and_scores_their_mean() -> None:
    nothing = np.zeros(SHAPE, dtype=bool)
    half = LARGE & block((0, 5), (0, 39), (0, 51))
    engine = Recorded({"1 large": [half, LARGE], "2 small": [nothing, nothing, SMALL]})
    curve = run_case(engine, case())
    prompts = engine.prompts["1 large"]
    assert [len(prompt.points) for prompt in prompts] == [0, 1]
    assert [len(prompt.points) for prompt in engine.prompts["2 small"]] == [0, 1, 2]
    assert prompts[0].box is not None
    assert prompts[1].points[0].tolist() == list(curve.clicks[0][0].position)
    share = half.sum() / LARGE.sum()
    first = 2 * share / (1 + share)
    assert curve.steps[0].scores.dsc == pytest.approx((first, 0.0))
    assert [step.scores.mean_dsc for step in curve.steps[1:]] == pytest.approx([0.5, 1, 1, 1, 1])
    assert curve.dsc_auc == pytest.approx(0.75 + 3)
    assert curve.steps[1].scores.nsd == pytest.approx((1.0, 0.0))
    assert curve.nsd_auc == pytest.approx(0.75 + 3)
    assert curve.final.mean_dsc == curve.final.mean_nsd == 1.0
    assert curve.steps[-1].seconds == 0.0  # nothing was asked any more


def test_without_boxes_there_is_no_step_before_the_first_click() -> None:
    engine = Recorded({"1 large": [LARGE], "2 small": [SMALL]})
    curve = run_case(engine, case(boxes=False))
    assert [step.number for step in curve.steps] == [1, 2, 3, 4, 5]
    assert engine.prompts["1 large"][0].box is None
    assert [clicks[0].label for clicks in curve.clicks] == [1, 1]
    assert curve.dsc_auc == pytest.approx(4.0)
    with pytest.raises(DataError, match="need 5"):
        run_case(engine, case(), clicks=4)


def test_background_clicks_go_into_what_is_too_much() -> None:
    wide = LARGE | block((2, 8), (5, 24), (26, 51))
    engine = Recorded({"1 large": [wide, LARGE], "2 small": [SMALL, SMALL]})
    curve = run_case(engine, case())
    (click,) = curve.clicks[0]
    assert click.label == 0
    assert wide[click.position]
    assert not LARGE[click.position]


def test_nsd_is_nought_where_dice_is_low() -> None:
    thin = block((5, 5), (5, 24), (6, 25))
    low = score(LARGE.astype(np.uint8), thin.astype(np.uint8), 1, SPACING)
    assert low.mean_dsc == pytest.approx(2 / 8)
    assert low.nsd is not None
    thinner = block((5, 5), (5, 24), (6, 15))
    lower = score(LARGE.astype(np.uint8), thinner.astype(np.uint8), 1, SPACING)
    assert lower.mean_dsc == pytest.approx(2 / 15)
    assert lower.nsd is None
    assert lower.mean_nsd == 0.0


def test_human_clicks_are_seeded_and_stay_inside_the_error() -> None:
    def clicks(seed: int) -> list[Any]:
        seen: list[Any] = []
        answers: list[np.ndarray] = []
        curve = run_case(ShapeControl(), case(), human=seed, watch=lambda number, answer: answers.append(answer))
        for index, placed in enumerate(curve.clicks):
            for step, click in enumerate(placed):
                error = (answers[step] != LABELS) & ((answers[step] == index + 1) | (index + 1 == LABELS))
                components, _ = ndimage.label(error, np.ones((3, 3, 3)))
                sizes = np.bincount(components.ravel())
                assert components[click.position] > 0
                assert sizes[components[click.position]] == sizes[1:].max()
                seen.append(click)
        return seen

    assert clicks(1) == clicks(1)
    assert clicks(1) != clicks(2)
    exact = run_case(ShapeControl(), case()).clicks
    assert clicks(1) != [click for placed in exact for click in placed]


def test_number_of_clicks() -> None:
    assert clicks_to_reach([0, 1, 2], [0.5, 0.8, 0.95], 0.8) == 1
    assert clicks_to_reach([0, 1, 2], [0.85, 0.7, 0.95], 0.8) == 0
    assert clicks_to_reach([1, 2], [0.5, 0.6], 0.8) is None


def test_a_row_holds_every_structure() -> None:
    nothing = np.zeros(SHAPE, dtype=bool)
    engine = Recorded({"1 large": [LARGE], "2 small": [nothing, nothing, SMALL]})
    figures = row(case(), engine.name, run_case(engine, case()))
    assert (figures["setting"], figures["steps"]) == ("box", [0, 1, 2, 3, 4, 5])
    large, small = figures["structures"]
    assert (large["noc80"], small["noc80"], small["noc90"]) == (0, 2, 2)
    assert (large["voxels"], small["voxels"]) == (int(LARGE.sum()), int(SMALL.sum()))
    assert small["dsc"] == [0, 0, 1, 1, 1, 1]
    assert [click[3] for click in small["clicks_zyx_label"]] == [1, 1]


# --- the container ------------------------------------------------------------------------------------------------


def test_requests_give_the_answers_of_the_loop(tmp_path: Path) -> None:
    """The prompts of each step, written as the challenge writes them, lead to the very label map of that step."""
    maps: list[np.ndarray] = []
    made = case()
    curve = run_case(ShapeControl(), made, watch=lambda number, answer: maps.append(answer))
    source, target = tmp_path / "case.npz", tmp_path / "outputs" / "case.npz"
    assert made.boxes is not None
    for step in range(6):
        members: dict[str, Any] = {"boxes": [box_record(box) for box in made.boxes]}
        if step:
            placed = [clicks[:step] for clicks in curve.clicks]
            members["clicks"] = [
                {kind: [list(c.position) for c in clicks if c.label == label] for kind, label in (("fg", 1), ("bg", 0))}
                for clicks in placed
            ]
            members["clicks_order"] = [["fg" if click.label else "bg" for click in clicks] for clicks in placed]
            members["prev_pred"] = maps[step - 1]
        np.savez_compressed(source, imgs=made.volume.array.astype(np.uint8), spacing=SPACING, **members)
        predict_file(ShapeControl(), source, target)
        answer = read_npz(target)["segs"]
        assert answer.dtype == np.uint8
        assert np.array_equal(answer, maps[step])


def test_a_request_that_fails_leaves_no_answer_of_an_earlier_step(tmp_path: Path) -> None:
    source, target = tmp_path / "in.npz", tmp_path / "out.npz"
    write_case(source, volume().array.astype(np.uint8), LABELS, SPACING, drawn_boxes(LABELS, 2))
    predict_file(ShapeControl(), source, target)
    assert target.exists()
    np.savez(source, imgs=volume().array, spacing=SPACING)
    with pytest.raises(DataError, match="0 boxes and clicks for 0 classes"):
        predict_file(ShapeControl(), source, target)
    assert not target.exists()


def test_clicks_without_an_order_put_foreground_first_and_a_class_may_be_silent(tmp_path: Path) -> None:
    source = tmp_path / "in.npz"
    clicks: list[Any] = [{"fg": [[5, 10, 10]], "bg": [[1, 1, 1]]}, {"fg": [], "bg": []}]
    np.savez(source, imgs=volume().array, spacing=SPACING, clicks=clicks)
    first, second = read_request(source).prompts
    assert first is not None
    assert first.points.tolist() == [[5, 10, 10], [1, 1, 1]]
    assert first.labels.tolist() == [1, 0]
    assert second is None
    clicks[0]["fg"] = [[5, 10, 99]]
    np.savez(source, imgs=volume().array, spacing=SPACING, clicks=clicks)
    with pytest.raises(PromptError, match="outside the volume"):
        read_request(source)
    np.savez(source, imgs=volume().array, spacing=SPACING, clicks=clicks, clicks_order=[["fg", "ok"], ["fg", "fg"]])
    with pytest.raises(DataError, match="'clicks' must hold"):
        read_request(source)
