"""The hold-out is made of patients, is deterministic, and never leaks while the store grows."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from medvl_sam2.errors import ConfigError, DataError
from medvl_sam2.training.holdout import HoldoutSplit, assign_patients, patient_key


@pytest.mark.parametrize(
    ("image_id", "key"),
    [
        ("sts001_ct", "name:sts001"),
        ("sts001_mr_t1", "name:sts001"),
        ("case7_ct_arterial_3mm", "name:case7"),
        ("case7_1p5mm.nii.gz", "name:case7"),
        ("Case7", "name:case7"),
        ("hippocampus_001", "name:hippocampus_001"),
        ("hippocampus_003_0000", "name:hippocampus_003"),
        ("sub-04_ses-02_T1w", "name:sub-04"),
        ("sub-04", "name:sub-04"),
        ("scan2_series-3", "name:scan2"),
        ("ct", "name:ct"),
    ],
)
def test_patient_key_from_the_image_id(image_id: str, key: str) -> None:
    assert patient_key(image_id) == key


def test_patient_id_wins_over_the_image_id() -> None:
    assert patient_key("a_ct", {"PatientID": " P1 "}) == patient_key("b_mr", {"PatientID": "P1"}) == "id:P1"
    assert patient_key("a_ct", {"PatientID": ""}) == "name:a"


def test_empty_image_id_is_refused() -> None:
    with pytest.raises(DataError, match="names no patient"):
        patient_key("")


@pytest.mark.parametrize("seed", range(10))
def test_no_patient_crosses_over_while_the_store_grows(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path / "holdout.json"
    known: list[str] = []
    trained: set[str] = set()
    held: set[str] = set()
    for step in range(30):
        known += [f"seed{seed}-patient{step}-{n}" for n in range(rng.randint(1, 4))]
        rng.shuffle(known)
        split = assign_patients(path, known, fraction=rng.choice([0.05, 0.2, 0.5]))
        assert not set(split.train) & held
        assert not set(split.holdout) & trained
        assert sorted(split.train + split.holdout) == sorted(known)
        trained |= set(split.train)
        held |= set(split.holdout)
        assert trained, "somebody is always trained on"
        assert held or len(known) < 2, "two patients are enough for a hold-out"
    assert not trained & held


def test_one_patient_is_trained_on_and_the_second_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "holdout.json"
    assert assign_patients(path, ["a"]) == HoldoutSplit(train=("a",), holdout=())
    assert assign_patients(path, ["a", "b"]) == HoldoutSplit(train=("a",), holdout=("b",))


@pytest.mark.parametrize("fraction", [1e-6, 1 - 1e-6])
def test_both_sides_are_filled_at_any_fraction(tmp_path: Path, fraction: float) -> None:
    split = assign_patients(tmp_path / "holdout.json", ["a", "b", "c"], fraction)
    assert split.train
    assert split.holdout


def test_order_and_repetition_do_not_matter(tmp_path: Path) -> None:
    patients = [f"p{n}" for n in range(40)]
    first = assign_patients(tmp_path / "one.json", patients)
    second = assign_patients(tmp_path / "two.json", [*reversed(patients), *patients])
    assert first == second
    assert 2 <= len(first.holdout) <= 16


def test_a_subset_gets_its_recorded_sides_and_the_rest_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "holdout.json"
    full = assign_patients(path, [f"p{n}" for n in range(20)])
    before = path.read_bytes()
    part = assign_patients(path, [full.train[0], full.holdout[0]])
    assert part == HoldoutSplit(train=(full.train[0],), holdout=(full.holdout[0],))
    assert path.read_bytes() == before


def test_the_file_holds_no_patient_identifier(tmp_path: Path) -> None:
    path = tmp_path / "holdout.json"
    assign_patients(path, ["id:Mustermann", "id:Doe"])
    text = path.read_text()
    assert "Mustermann" not in text
    assert len(json.loads(text)["patients"]) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 1, "patients": {"a": "both"}}'])
def test_a_damaged_file_is_never_begun_anew(tmp_path: Path, content: str) -> None:
    path = tmp_path / "holdout.json"
    path.write_text(content)
    with pytest.raises(DataError, match="restore it"):
        assign_patients(path, ["a"])
    assert path.read_text() == content


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_impossible_fractions_are_refused(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(ConfigError, match="fraction"):
        assign_patients(tmp_path / "holdout.json", ["a"], fraction)
