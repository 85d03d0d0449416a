"""Which image comes next, and what the scores it follows are."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from app.conftest import AFFINE, SHAPE, Running, write_phantom
from lib.label_names import stored_names
from lib.scoring.score_file import ScoreFile
from lib.strategies.sampling import RandomStrategy, UncertaintyStrategy
from medvl_sam2.types import Geometry
from medvl_sam2.vocabulary import CLASSES
from medvl_sam2.volume_io import write_mask


def ask(running: Running, strategy: str, client_id: str = "a") -> str | None:
    response = running.client.post(f"/activelearning/{strategy}", json={"client_id": client_id})
    assert response.status_code == 200, response.text
    return response.json().get("id")


def submit(running: Running, image: str, tmp_path: Path) -> None:
    write_mask(tmp_path / "done.nrrd", np.ones(SHAPE, np.uint8), Geometry(SHAPE, AFFINE))
    assert running.submit(image, tmp_path / "done.nrrd").status_code == 200


@pytest.mark.parametrize("strategy", ["random", "first", "uncertainty"])
def test_labelled_images_are_done(running: Running, tmp_path: Path, strategy: str) -> None:
    submit(running, "case_a", tmp_path)
    assert ask(running, strategy) == "case_b"
    submit(running, "case_b", tmp_path)
    assert ask(running, strategy) is None


@pytest.mark.parametrize("strategy", ["random", "first", "uncertainty"])
def test_one_image_left_and_a_double_click(running: Running, tmp_path: Path, strategy: str) -> None:
    """MONAI Label's own random strategy fails here: all weights are zero within one second."""
    submit(running, "case_a", tmp_path)
    assert [ask(running, strategy) for _ in range(5)] == ["case_b"] * 5


def test_reply_has_what_slicer_opens(running: Running) -> None:
    reply = running.client.post("/activelearning/first", json={}).json()
    assert reply["id"] == "case_a"
    assert Path(reply["path"]).is_file()
    assert reply["name"] == "case_a.nii.gz"


@pytest.mark.parametrize("strategy", ["random", "uncertainty"])
def test_two_annotators_get_two_images(running: Running, strategy: str) -> None:
    assert {ask(running, strategy, "a"), ask(running, strategy, "b")} == {"case_a", "case_b"}


def test_uncertainty_scores_lead_the_way(running: Running) -> None:
    """The fake is as unsure as its image is bright: case_b is brighter."""
    response = running.client.post("/scoring/uncertainty", params={"run_sync": True})
    assert response.status_code == 200
    scores = response.json()
    assert scores["case_b"] > scores["case_a"] > 0
    assert running.app.datastore().get_image_info("case_b")["uncertainty"] == scores["case_b"]
    assert ask(running, "uncertainty") == "case_b"
    assert ask(running, "uncertainty") == "case_a"  # case_b has just been served
    assert running.app.runtime.session_count() == 0  # nothing stays in memory


def test_scores_are_made_once_per_weights_and_file(running: Running) -> None:
    first = running.app.scoring({"method": "uncertainty"})
    assert running.app.scoring({"method": "uncertainty"}) == first
    assert len(running.predictors[0].opened) == 2
    write_phantom(running.studies / "case_a.nii.gz", 800)
    again = running.app.scoring({"method": "uncertainty"})
    assert again["case_a"] > first["case_a"]
    assert len(running.predictors[0].opened) == 3


def test_an_unreadable_image_does_not_stop_scoring(running: Running) -> None:
    (running.studies / "case_0.nii.gz").write_bytes(b"junk")
    running.app.datastore().refresh()
    assert sorted(running.app.scoring({"method": "uncertainty"})) == ["case_a", "case_b"]


def test_limit_of_a_scoring_run(running: Running) -> None:
    assert sorted(running.app.scoring({"method": "uncertainty", "max_images": 1})) == ["case_a"]


def test_random_draws_uncertain_images_more_often(running: Running, tmp_path: Path) -> None:
    scores = ScoreFile(tmp_path, "here", "uncertainty")
    scores.add("case_b", 1.0, "1", 0)
    strategy = RandomStrategy(scores, random.Random(0))
    drawn = Counter(strategy({"strategy": "random"}, running.app.datastore())["id"] for _ in range(300))
    assert drawn["case_b"] > 2 * drawn["case_a"] > 0


def test_scores_of_replaced_weights_come_second(running: Running, tmp_path: Path) -> None:
    scores = ScoreFile(tmp_path, "here", "uncertainty")
    scores.add("case_a", 0.2, "2", 0)
    scores.add("case_b", 0.9, "1", 0)
    served = ["2"]
    strategy = UncertaintyStrategy(scores, lambda: served[0], RandomStrategy(scores))
    assert strategy({}, running.app.datastore()) == {"id": "case_a", "uncertainty": 0.2, "scored_by": "2"}
    served[0] = "3"
    assert strategy({}, running.app.datastore()) == {"id": "case_b", "uncertainty": 0.9, "scored_by": "1"}


def test_score_file_survives_damage_and_keeps_studies_apart(tmp_path: Path) -> None:
    scores = ScoreFile(tmp_path, "here", "uncertainty")
    assert scores.read() == {}
    scores.add("a", 0.5, "1", 7)
    scores.add("b", 0.25, "1", 8)
    assert {name: score.value for name, score in scores.read().items()} == {"a": 0.5, "b": 0.25}
    assert ScoreFile(tmp_path, "elsewhere", "uncertainty").read() == {}
    for damage in ("{", "[]", '{"a": 1}', '{"a": {"value": 1}}'):
        scores.path.write_text(damage)
        assert scores.read() == {}


def test_dice_matches_structures_by_name(start: Callable[..., Running], tmp_path: Path) -> None:
    """The proposal has app-wide values, the submitted label counts its own segments."""
    running = start()
    assert running.infer("medvl_semantic", classes="liver,spleen", save_label=True).status_code == 200
    final = np.zeros(SHAPE, np.uint8)
    final[..., CLASSES.index("liver")] = 1
    final[: SHAPE[0] // 2, :, CLASSES.index("spleen")] = 2
    nib.save(nib.Nifti1Image(final, AFFINE), tmp_path / "final.nii.gz")
    names = [{"name": "liver", "idx": 1}, {"name": "spleen", "idx": 5}]
    assert running.submit("case_a", tmp_path / "final.nii.gz", label_info=names).status_code == 200

    response = running.client.post("/scoring/dice", params={"run_sync": True})
    expected = {"liver": 1.0, "spleen": pytest.approx(2 / 3)}
    assert response.json() == {"case_a": pytest.approx((1 + 2 / 3) / 2)}
    info = running.app.datastore().get_image_info("case_a")
    assert info["dice_by_label"] == expected


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"params": {"label_names": {"liver": 5, "spleen": 1}}}, {1: "spleen", 5: "liver"}),
        ({"label_info": [{"name": n, "idx": i} for i, n in enumerate("abcde", start=3)]}, {1: "a", 5: "e"}),
        ({"params": {"label_names": ["liver"]}, "label_info": []}, {1: "spleen", 5: "liver"}),
        ({}, {1: "spleen", 5: "liver"}),
    ],
)
def test_names_of_a_stored_label(info: dict[str, object], expected: dict[int, str]) -> None:
    assert stored_names(info, [0, 1, 5]) == expected
