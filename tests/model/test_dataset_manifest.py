"""The manifest: what is written comes back equal, and what is not exactly a record is refused with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medvl_sam2.datasets.json_records import from_plain, to_plain
from medvl_sam2.datasets.manifest import (
    CaseRecord,
    Grid,
    ImageFile,
    LabelFile,
    Question,
    Reference,
    Split,
    read_manifest,
    write_manifest,
)
from medvl_sam2.errors import DataError
from medvl_sam2.types import Modality

FULL = CaseRecord(
    id="set/1",
    source="set",
    patient="set/p1",
    split=Split.VALIDATION,
    modality=Modality.CT,
    licence="CC-BY-4.0",
    image=ImageFile("a/b.npz", "train_images", 3, Grid("LPS", (0.5, 0.5, 2.0), assumed=True), (2.0, -1024.0)),
    labels=(LabelFile("a/m.nii.gz", {1: "liver", 7: "kidney_left"}), LabelFile("a/n.nii.gz", {1: "spleen"})),
    report="Grüße, a “report”.",
    questions=(Question("Which?", "B", "organ", ("A", "B")), Question("What?", "It.", "plane")),
    references=(Reference("The left one", ("kidney_left",), "It is [SEG].", "description"),),
)
SMALL = CaseRecord("set/2", "set", "set/p2", Split.TRAIN, Modality.MR, "x", ImageFile("c.nii"))


def test_round_trip(tmp_path: Path) -> None:
    assert write_manifest(tmp_path / "m.jsonl", [FULL, SMALL]) == 2
    manifest = read_manifest(tmp_path / "m.jsonl")
    assert manifest.records == (FULL, SMALL)
    assert manifest.root == tmp_path
    assert read_manifest(tmp_path / "m.jsonl", Path("elsewhere")).root == Path("elsewhere")
    assert manifest.of(Split.TRAIN).records == (SMALL,)
    assert FULL.label_names == ("liver", "kidney_left", "spleen")


def test_defaults_are_left_out(tmp_path: Path) -> None:
    plain = to_plain(SMALL)
    assert sorted(plain) == ["id", "image", "licence", "modality", "patient", "source", "split"]
    assert plain["image"] == {"path": "c.nii"}
    assert from_plain(CaseRecord, json.loads(json.dumps(plain))) == SMALL


def test_a_failed_write_leaves_the_old_manifest(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_manifest(path, [FULL])
    with pytest.raises(DataError, match="set/2' comes twice"):
        write_manifest(path, [SMALL, SMALL])
    assert read_manifest(path).records == (FULL,)
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def _broken(**change: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(to_plain(FULL))), **change}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "needs a JSON object"),
        (json.dumps(_broken(colour="red")), "no field 'colour'"),
        (json.dumps({k: v for k, v in _broken().items() if k != "patient"}), "lacks the field 'patient'"),
        (json.dumps(_broken(split="dev")), "split cannot be 'dev'"),
        (json.dumps(_broken(split=["train"])), "split cannot be"),
        (json.dumps(_broken(modality="ct")), "modality cannot be 'ct'"),
        (json.dumps(_broken(id=3)), "id cannot be 3"),
        (json.dumps(_broken(patient="")), "needs an id, a source, a patient"),
        (json.dumps(_broken(image={"path": "/etc/passwd"})), "must be relative"),
        (json.dumps(_broken(image={"path": "a/../../b.nii"})), "must be relative"),
        (json.dumps(_broken(image={"path": "a.npz", "index": True})), "index cannot be True"),
        (json.dumps(_broken(image={"path": "a.nii", "grid": {"axes": "RAL"}})), "must name three directions"),
        (json.dumps(_broken(image={"path": "a.nii", "grid": {"axes": "RAS", "spacing": [1, 2]}})), "spacing cannot be"),
        (
            json.dumps(_broken(image={"path": "a.nii", "grid": {"axes": "RAS", "spacing": [1, 2, 0]}})),
            "positive lengths",
        ),
        (json.dumps(_broken(image={"path": "a.nii", "rescale": [0, 1]})), "finite slope"),
        (json.dumps(_broken(labels=[{"path": "m.nii", "names": {"0": "liver"}}])), "from 1 on"),
        (json.dumps(_broken(labels=[{"path": "m.nii", "names": {"one": "liver"}}])), "names cannot be"),
        (json.dumps(_broken(labels=[{"path": "m.nii", "names": {"1": "liver"}}])), "refers to 'kidney_left'"),
        (
            json.dumps(_broken(questions=[{"text": "Q", "answer": "C", "kind": "k", "choices": ["A"]}])),
            "none of the choices",
        ),
        (json.dumps(_broken(questions=[{"text": "Q", "answer": " ", "kind": "k"}])), "neither may be empty"),
        (json.dumps(to_plain(SMALL)), "also stands in line 1"),
    ],
)
def test_a_broken_line_is_refused_with_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(f"{json.dumps(to_plain(SMALL))}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=f"m.jsonl:3: .*{message}"):
        read_manifest(path)


def test_a_patient_on_two_sides_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_manifest(path, [SMALL, from_plain(CaseRecord, {**to_plain(SMALL), "id": "set/3", "split": "test"})])
    with pytest.raises(DataError, match="patient 'set/p2' stands on several sides"):
        read_manifest(path)


def test_a_missing_or_empty_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="check the path"):
        read_manifest(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no case"):
        read_manifest(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot be read"):
        read_manifest(tmp_path / "binary.jsonl")
