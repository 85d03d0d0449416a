"""The command: what it writes, what it says, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from medvl_sam2.converters import open_source
from published_layouts import dcformer_shapes, empty, randomise
from script_modules import load_script

NANO = ((1, 1, 1, 1, 1), (32, 32, 64, 128, 256))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("convert_weights", monkeypatch)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    state = randomise(empty(dcformer_shapes(*NANO, older=True), "visual_transformer.encoder."))
    state["visual_transformer.vq._codebook.embed"] = torch.zeros(1, 2, 256)
    path = tmp_path / "checkpoint-9.pth"
    torch.save({"model": state, "epoch": 9}, path)
    return path


def test_parts_and_report_are_written(
    command: ModuleType, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    options = [str(published), "--kind", "dcformer_nano", "--out", str(out), "--json", str(report)]
    assert command.main(options) == 0
    assert len(open_source(out / "vision").tensors) == 192
    text = capsys.readouterr().out
    assert f"vision: 192 tensors, 0.79 M numbers to {out / 'vision'}" in text
    assert "left out 1 tensors such as 'visual_transformer.vq._codebook.embed': codebook" in text
    assert "left out 120 tensors such as 'visual_transformer.encoder.s0.0.0.norm.0.weight': the same batch" in text
    assert "no weights, left out: epoch" in text
    assert json.loads(report.read_text()) == json.loads((out / "conversion.json").read_text())


def test_misfits_end_with_a_message_and_nothing_written(
    command: ModuleType, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(published), "--kind", "dcformer_tiny", "--out", str(tmp_path / "out")]) == 1
    assert "error: " in capsys.readouterr().err
    assert command.main([str(tmp_path / "absent.pt"), "--kind", "medsam2", "--out", str(tmp_path / "out")]) == 1
    assert "absent.pt does not exist; name a weight file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
