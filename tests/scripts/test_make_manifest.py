"""The command from a folder to a manifest and a report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType

import pytest

import dataset_folders as folders
from medvl_sam2.datasets.manifest import Split, read_manifest, write_manifest
from medvl_sam2.datasets.volumes import read_case
from script_modules import load_script


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("make_manifest", monkeypatch)


def test_checked_manifest_holds_only_cases_that_open(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out, report = tmp_path / "data", tmp_path / "out" / "m.jsonl", tmp_path / "report.json"
    folders.totalsegmentator(data)
    assert script.main(["totalsegmentator", str(data), "--out", str(out), "--check", "--json", str(report)]) == 0
    manifest = read_manifest(out, data)
    assert [r.id for r in manifest.records] == [f"totalsegmentator/{c}" for c in ("s0000", "s0003", "s0011")]
    assert read_case(manifest.records[0], manifest.root).labels is not None
    figures = json.loads(report.read_text())
    assert figures["cases_by_split"] == {"train": 1, "validation": 1, "test": 1}
    assert (figures["skipped"], figures["with_labels"], figures["checked"]) == (2, 3, True)
    assert {p["case"]: p["skipped"] for p in figures["problems"]} == {
        "s0020": True,
        "s0011": False,
        "s0021": False,
        "totalsegmentator/s0021": True,
    }
    printed = capsys.readouterr().out
    assert "skipped s0020: s0020/ct.nii.gz is missing" in printed
    assert "note s0011: 1 class files are missing: liver" in printed
    assert "is not a readable NIfTI file" in printed


def test_unchecked_manifest_opens_nothing(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders.totalsegmentator(tmp_path)
    monkeypatch.setattr(script, "read_case", None)
    assert script.main(["totalsegmentator", str(tmp_path), "--out", str(tmp_path / "m.jsonl")]) == 0
    assert len(read_manifest(tmp_path / "m.jsonl").records) == 4


def test_patients_of_another_manifest_keep_their_side(script: ModuleType, tmp_path: Path) -> None:
    folders.totalsegmentator(tmp_path / "data")
    first, second = tmp_path / "data" / "first.jsonl", tmp_path / "second.jsonl"
    command = ["totalsegmentator", str(tmp_path / "data"), "--out"]
    assert script.main([*command, str(first)]) == 0
    records = read_manifest(first).records
    turned = {r.patient: Split.TEST if r.split is Split.TRAIN else Split.TRAIN for r in records}
    write_manifest(first, [dataclasses.replace(r, split=turned[r.patient]) for r in records[:2]])
    report = tmp_path / "report.json"
    assert script.main([*command, str(second), "--against", str(first), "--json", str(report)]) == 0
    sides = {r.patient: r.split for r in read_manifest(second, tmp_path / "data").records}
    expected = {r.patient: r.split for r in records} | {r.patient: turned[r.patient] for r in records[:2]}
    assert sides == expected
    moved = [p for p in json.loads(report.read_text())["problems"] if "moved there" in p["reason"]]
    assert [p["skipped"] for p in moved] == [False, False]
    other = tmp_path / "data" / "other.jsonl"
    write_manifest(other, [records[0]])
    assert script.main([*command, str(second), "--against", str(first), str(other)]) == 2


def test_long_lists_of_problems_are_shortened(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, object]] = [{"image_id": f"s{n:04}", "split": "train"} for n in range(30)]
    folders.save_table(tmp_path / "meta.csv", rows, ";")
    assert script.main(["totalsegmentator", str(tmp_path), "--out", str(tmp_path / "m.jsonl")]) == 2
    captured = capsys.readouterr()
    assert "... and 10 more" in captured.out
    assert "holds no readable case" in captured.err
    assert not (tmp_path / "m.jsonl").exists()


def test_a_wrong_folder_ends_with_a_message(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["amos", str(tmp_path), "--out", str(tmp_path / "m.jsonl")]) == 2
    assert "make_manifest:" in capsys.readouterr().err
