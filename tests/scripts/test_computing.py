"""Every program that loads a model takes a device and a precision, and its figures say what they were made with."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from challenge_reference import write_case
from medvl_sam2.evaluation.challenge.case import drawn_boxes
from medvl_sam2.predictor import Predictor
from script_modules import load_script
from small_model import oblique_volume, small_predictor

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
BOX = "--box=6,13,5,24,27,13"
PROGRAMS = {
    "evaluate": ["--generated", "1", "--tasks", "interactive", "--objects-per-case", "1", "--settings", "box",
                 "--steps", "1", "--json", "{out}/figures.json", "--html", "{out}/page.html"],
    "evaluate_interactive": ["--npz", "{folder}", "--json", "{out}/figures.json"],
    "evaluate_evidence": ["--cases", "1", "--json", "{out}/figures.json"],
    "challenge_predict": ["--inputs", "{folder}", "--outputs", "{out}", "--json", "{out}/figures.json"],
    "benchmark_latency": ["{folder}/ct.nii.gz", "--objects", "1", "--clicks", "2", "--json", "{out}/figures.json"],
    "showcase": ["{folder}/ct.nii.gz", "--out", "{out}", BOX],
}  # fmt: skip
"""Programs with the arguments of a short run."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image, and a case of the challenge."""
    volume, truth = oblique_volume()
    nib.save(nib.Nifti1Image(volume.array, volume.geometry.affine), tmp_path / "ct.nii.gz")
    image = np.clip(volume.array, 0, 255).astype(np.uint8)
    labels = truth.astype(np.uint8)
    write_case(tmp_path / "case.npz", image, labels, (3.0, 1.0, 1.5), drawn_boxes(labels, 1))
    return tmp_path


def test_no_program_loads_a_model_in_its_own_way() -> None:
    loading = {path.stem for path in SCRIPTS.glob("*.py") if "load_predictor(" in path.read_text(encoding="utf-8")}
    assert loading == {*PROGRAMS, "computing"}
    own = {path.stem for path in SCRIPTS.glob("*.py") if "Predictor.load(" in path.read_text(encoding="utf-8")}
    assert own == {"computing", "benchmark_encoder"}  # the latter times the processor, and asks for it


@pytest.mark.parametrize("name", PROGRAMS)
def test_device_and_precision_are_taken_and_told(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, asked = small_predictor(), []

    def load(path: Path | None, device: str, precision: Any) -> Predictor:
        asked.append((path, device, precision))
        return Predictor(model.model, model.meta, precision=precision)

    monkeypatch.setattr(Predictor, "load", load)
    out = folder / "out"
    out.mkdir()
    arguments = [part.format(folder=folder, out=out) for part in PROGRAMS[name]]
    wanted = ["--checkpoint", "weights", "--device", "cpu", "--precision", "bfloat16", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [name, *arguments, *wanted])
    assert not load_script(name, monkeypatch).main()
    assert asked == [(Path("weights"), "cpu", "bfloat16")]
    (written,) = out.glob("*.json")
    figures = json.loads(written.read_text(encoding="utf-8"))
    told = figures.get("computing") or figures["settings"]
    assert (told["device"], told["precision"]) == ("cpu", "bfloat16")
    shown = capsys.readouterr().out
    if name == "evaluate":
        assert "bfloat16" in (out / "page.html").read_text(encoding="utf-8")
    if name == "showcase":
        assert json.loads(shown) == figures
    elif name != "challenge_predict":  # a container, which prints what failed alone
        assert "computed on cpu (" in shown
        assert "), bfloat16, torch threads 1" in shown


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_device_that_is_not_there_is_named(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = [part.format(folder=folder, out=folder) for part in PROGRAMS[name]]
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--device", "cuda:7"])
    assert load_script(name, monkeypatch).main() == 2
    assert f"{name}: device 'cuda:7' is not there" in capsys.readouterr().err


def test_without_a_model_there_is_no_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_script("computing", monkeypatch)
    facts = module.computing(None)
    assert (facts["device"], facts["precision"]) == ("cpu", None)
    assert module.said(facts).startswith(f"computed on cpu ({facts['processor']}), torch threads ")
