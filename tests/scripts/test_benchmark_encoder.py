"""The encoder benchmark at a small size: figures of every form, and reasons for those that cannot run."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from script_modules import load_script

SMALL = ["--preset", "sam2.1_tiny", "--image-size", "128", "--repeats", "1", "--threads", "1"]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("benchmark_encoder", monkeypatch)


def test_every_form_is_compared_with_the_plain_encoder(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    out = tmp_path / "figures.json"

    forms = ["--forms", "channels_last", "bfloat16", "onnx"]
    status = benchmark.main([*SMALL, "--batches", "1", "2", *forms, "--json", str(out)])

    assert status == 0
    figures = json.loads(out.read_text())
    rows = {(row["form"], row["batch"]): row for row in figures["rows"]}
    assert set(rows) == {(form, batch) for form in ("plain", "channels_last", "bfloat16") for batch in (1, 2)}
    assert rows["plain", 1]["ratio"] == 1
    assert rows["plain", 1]["difference"] == 0
    assert rows["channels_last", 1]["difference"] < 1e-4  # none where the processor keeps the order of sums
    assert 1e-4 < rows["bfloat16", 1]["difference"] < 0.2
    assert all(row["cpu_s"] > 0 for row in rows.values())
    assert figures["not_measured"] == {"onnx": "not installed: onnx, onnxscript, onnxruntime"}
    assert (figures["computing"]["device"], figures["computing"]["threads"]) == ("cpu", 1)
    shown = capsys.readouterr().out
    assert "onnx           not measured: not installed" in shown
    assert "computed on cpu (" in shown


def test_shipped_weights_keep_their_size(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--image-size", "128"]) == 2
    assert "--image-size goes with" in capsys.readouterr().err
