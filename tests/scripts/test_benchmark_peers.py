"""The peers' program: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from medvl_sam2.errors import CheckpointError
from script_modules import load_script

LITTLE = ["--minutes", "0.01", "--training-cases", "1", "--cases", "1", "--objects-per-case", "1", "--steps", "1"]


def test_a_peer_and_the_controls_fill_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script("benchmark_peers", monkeypatch)
    numbers, page = tmp_path / "figures.json", tmp_path / "page.html"
    arguments = [
        "--out", str(tmp_path / "out"), *LITTLE, "--only", "deepedit,sam2,controls", "--grid", "16,16,16",
        "--filters", "4,8,8", "--json", str(numbers), "--html", str(page),
    ]  # fmt: skip
    assert script.main(arguments) == 0
    first = capsys.readouterr().out
    assert "MONAI DeepEdit" in first
    assert "SAM2-tiny finetuned alone: skipped" in first
    written = json.loads(numbers.read_text(encoding="utf-8"))
    assert set(written["interactive"][0]["engines"]) == {"MONAI DeepEdit", "shape control", "grow control"}
    deepedit = written["contenders"][0]
    assert deepedit["steps"] >= 1
    assert deepedit["seconds"] >= 0.6
    assert "trained on cpu (" in written["machine"]
    assert written["machine"].endswith(") in float32")
    assert "MONAI DeepEdit" in page.read_text(encoding="utf-8")
    assert script.main(arguments) == 0
    assert capsys.readouterr().out == first
    assert script.main([*arguments, "--minutes", "0.02"]) == 2
    assert "begun with minutes 0.01, this run has 0.02" in capsys.readouterr().err
    assert script.main([*arguments, "--threads", "2"]) == 2
    assert "begun with threads 1, this run has 2" in capsys.readouterr().err


def test_where_cases_are_cached_changes_nothing_and_another_processor_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load_script("benchmark_peers", monkeypatch)
    here = script.conditions_of(script.parse(["--out", str(tmp_path)]))
    assert here.processor
    script.claim(tmp_path, here)
    elsewhere = replace(here, source=replace(here.source, cache=Path("elsewhere")), sam2=Path("slices"))
    script.claim(tmp_path, elsewhere)
    with pytest.raises(CheckpointError, match="processor"):
        script.claim(tmp_path, replace(here, processor="another"))


def test_a_gpu_that_is_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script("benchmark_peers", monkeypatch)
    monkeypatch.setattr(script.torch.cuda, "is_available", lambda: False)
    assert script.main(["--out", str(tmp_path), *LITTLE, "--gpu"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_bad_options_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script("benchmark_peers", monkeypatch)
    assert script.main(["--out", str(tmp_path), *LITTLE, "--only", "nobody"]) == 2
    assert "unknown contender 'nobody'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main(["--out", str(tmp_path), "--evaluate-real"])
    assert "needs --real" in capsys.readouterr().err
