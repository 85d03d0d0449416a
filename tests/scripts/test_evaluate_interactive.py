"""The commands of the CVPR 2025 protocol: files, resuming, failures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from challenge_reference import write_case
from medvl_sam2.errors import PromptError
from medvl_sam2.evaluation.challenge.case import case_from_npz, drawn_boxes
from medvl_sam2.evaluation.challenge.npz import read_npz
from medvl_sam2.evaluation.controls import GrowControl
from medvl_sam2.predictor import Predictor
from medvl_sam2.types import Modality
from script_modules import load_script
from small_model import small_predictor


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("evaluate_interactive", monkeypatch)


@pytest.fixture
def predict(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("challenge_predict", monkeypatch)


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    """Two small cases with two classes, the second without boxes."""
    folder = tmp_path / "cases"
    folder.mkdir()
    labels = np.zeros((10, 24, 30), dtype=np.uint8)
    labels[2:7, 4:14, 5:15] = 1
    labels[4:9, 16:22, 18:28] = 2
    image = np.clip(90.0 * labels + np.random.default_rng(0).normal(40, 5, labels.shape), 0, 255).astype(np.uint8)
    write_case(folder / "boxed.npz", image, labels, (3.0, 1.0, 1.5), drawn_boxes(labels, 2))
    write_case(folder / "clicked.npz", image, labels, (3.0, 1.0, 1.5))
    return folder


def test_controls_stand_beside_each_other_in_the_figures(
    evaluate: ModuleType, cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    assert evaluate.main(["--npz", str(cases), "--controls-only", "--json", str(figures)]) == 0
    written = json.loads(figures.read_text(encoding="utf-8"))
    assert [(r["setting"], r["engine"], r["cases"], r["structures"]) for r in written["summary"]] == [
        (setting, engine, 1, 2) for setting in ("box", "clicks") for engine in ("grow control", "shape control")
    ]
    for row in written["rows"]:
        assert row["dsc_auc"] == pytest.approx(sum(np.convolve(row["dsc"][-5:], [0.5, 0.5], "valid")))
        assert len(row["structures"]) == 2
    table = capsys.readouterr().out
    assert "DSC_AUC" in table
    assert "4 runs scored, 0 failed" in table


def test_a_stopped_run_goes_on_and_runs_nothing_twice(
    evaluate: ModuleType, cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--npz", str(cases), "--controls-only", "--json", str(tmp_path / "figures.json")]
    asked: list[str] = []
    whole = evaluate.run_case

    def stopped(engine, case, *rest):  # type: ignore[no-untyped-def]
        asked.append(f"{case.name}: {engine.name}")
        if len(asked) == 3:
            raise KeyboardInterrupt
        return whole(engine, case, *rest)

    monkeypatch.setattr(evaluate, "run_case", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(arguments)
    assert evaluate.main(arguments) == 0
    assert asked == [
        "boxed: shape control",
        "boxed: grow control",
        "clicked: shape control",
        "clicked: shape control",
        "clicked: grow control",
    ]
    assert evaluate.main(arguments) == 0
    assert len(asked) == 5


def test_other_settings_do_not_mix(
    evaluate: ModuleType, cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--npz", str(cases), "--cases", "boxed", "--controls-only", "--json", str(tmp_path / "f.json")]
    assert evaluate.main(arguments) == 0
    assert evaluate.main([*arguments, "--human", "3"]) == 2
    assert "was written with human None, not 3" in capsys.readouterr().err
    (tmp_path / "f.json").write_text("[]", encoding="utf-8")
    assert evaluate.main(arguments) == 2
    assert "holds no results" in capsys.readouterr().err


def test_figures_of_other_volumes_are_not_gone_on_from(
    evaluate: ModuleType, cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same names, other content: refused before anything is run, and the file stays as it was."""
    figures, other = tmp_path / "figures.json", tmp_path / "other"
    arguments = ["--controls-only", "--json", str(figures), "--npz"]
    assert evaluate.main([*arguments, str(cases), "--cases", "clicked"]) == 0
    written = figures.read_bytes()
    other.mkdir()
    for path in cases.iterdir():
        members = read_npz(path)
        members["imgs"] = members["imgs"] // 2
        np.savez_compressed(other / path.name, **members)
    assert evaluate.main([*arguments, str(other)]) == 2
    assert "was written with case 'clicked' of sha256" in capsys.readouterr().err
    assert figures.read_bytes() == written
    (other / "clicked.npz").unlink()
    assert evaluate.main([*arguments, str(other)]) == 2
    assert "holds case 'clicked', which this run has not" in capsys.readouterr().err
    moved = cases.rename(tmp_path / "moved")
    assert evaluate.main([*arguments, str(moved)]) == 0  # where the same cases lie does not matter
    assert "4 runs scored" in capsys.readouterr().out


def test_a_case_is_told_by_all_that_engines_and_scores_see(cases: Path) -> None:
    case = case_from_npz(cases / "boxed.npz")
    assert case.boxes is not None
    assert case.sha256() == replace(case, name="renamed", patient="other").sha256()
    geometry = case.volume.geometry
    labels, moved = case.labels.copy(), geometry.affine.copy()
    labels[0, 0, 0], moved[0, 3] = 1, 0.5
    others = [
        case.without_boxes(),
        replace(case, labels=labels),
        replace(case, names=("a", "b")),
        replace(case, boxes=case.boxes[::-1]),
        replace(case, volume=replace(case.volume, array=case.volume.array + 1)),
        replace(case, volume=replace(case.volume, modality=Modality.MR)),
        replace(case, volume=replace(case.volume, geometry=replace(geometry, affine=moved))),
    ]
    assert len({other.sha256() for other in [case, *others]}) == 1 + len(others)


def test_another_engine_configuration_is_named(
    evaluate: ModuleType,
    cases: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = small_predictor()
    monkeypatch.setattr(Predictor, "load", lambda *_: model)
    arguments = ["--npz", str(cases), "--cases", "boxed", "--json", str(tmp_path / "f.json")]
    assert evaluate.main(arguments) == 0
    assert evaluate.main(arguments) == 0
    config = replace(model.interactive.config, reach_mm=5.0)
    model = Predictor(model.model, model.meta, config)
    assert evaluate.main(arguments) == 2
    assert "was written with interactive.reach_mm 12.0, not 5.0" in capsys.readouterr().err
    model = Predictor(model.model, model.meta, precision="bfloat16")
    assert evaluate.main(arguments) == 2
    assert "was written with precision 'float32', not 'bfloat16'" in capsys.readouterr().err


@pytest.mark.parametrize("program", ["evaluate", "predict"])
def test_a_torn_file_is_named_and_the_others_are_answered(
    program: str,
    evaluate: ModuleType,
    predict: ModuleType,
    cases: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = bytearray((cases / "boxed.npz").read_bytes())
    data[60:90] = b"\xff" * 30  # in the compressed volume
    (cases / "a_torn.npz").write_bytes(data)
    (cases / "clicked.npz").unlink()
    if program == "evaluate":
        assert evaluate.main(["--npz", str(cases), "--controls-only"]) == 1
    else:
        outputs = tmp_path / "outputs"
        assert predict.main(["--inputs", str(cases), "--outputs", str(outputs), "--control", "shape"]) == 1
        assert [path.name for path in outputs.iterdir()] == ["boxed.npz"]
    said = capsys.readouterr()
    assert "a_torn.npz is not a readable npz file" in said.err
    assert program == "predict" or "2 runs scored, 1 failed" in said.out


def test_failures_are_named_counted_and_not_scored(
    evaluate: ModuleType,
    cases: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(self: GrowControl, scene: object) -> np.ndarray:
        raise PromptError("no room to grow")

    monkeypatch.setattr(GrowControl, "paint", refuse)
    np.savez(cases / "broken.npz", imgs=np.zeros((3, 4, 5)))
    figures = tmp_path / "figures.json"
    assert evaluate.main(["--npz", str(cases), "--controls-only", "--json", str(figures)]) == 1
    written = json.loads(figures.read_text(encoding="utf-8"))
    assert sorted(written["failed"]) == ["boxed: grow control", "broken: not read", "clicked: grow control"]
    assert {row["engine"] for row in written["rows"]} == {"shape control"}
    said = capsys.readouterr()
    assert "2 runs scored, 3 failed" in said.out
    assert "failed, not scored: boxed: grow control: no room to grow" in said.err
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate"),
        (["--image", "ct.nii.gz"], "an image needs its mask"),
        (["--gts", "truths", "--generated", "1"], "give --npz too"),
    ],
)
def test_bad_options_are_named(
    evaluate: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(arguments)
    assert message in capsys.readouterr().err


def test_unknown_cases_are_named(evaluate: ModuleType, cases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--npz", str(cases), "--cases", "nobody", "--controls-only"]) == 2
    assert "known: boxed, clicked" in capsys.readouterr().err


def test_the_container_answers_every_request_and_names_what_failed(
    predict: ModuleType, cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs, figures = tmp_path / "outputs", tmp_path / "seconds.json"
    # A request without boxes needs clicks: 'clicked' has none yet, and an old answer lies there.
    outputs.mkdir()
    np.savez(outputs / "clicked.npz", segs=np.zeros(3))
    arguments = ["--inputs", str(cases), "--outputs", str(outputs), "--control", "shape", "--json", str(figures)]
    assert predict.main(arguments) == 1
    assert sorted(path.name for path in outputs.iterdir()) == ["boxed.npz"]
    answer = read_npz(outputs / "boxed.npz")["segs"]
    assert answer.shape == (10, 24, 30)
    assert sorted(np.unique(answer).tolist()) == [0, 1, 2]
    written = json.loads(figures.read_text(encoding="utf-8"))
    assert list(written["failed"]) == ["clicked.npz"]
    assert "failed: clicked.npz" in capsys.readouterr().err
    assert predict.main(["--inputs", str(tmp_path / "empty"), "--outputs", str(outputs), "--control", "shape"]) == 2
    assert "holds no npz file" in capsys.readouterr().err


@pytest.mark.weights
@pytest.mark.slow
def test_the_shipped_weights_answer_a_request(predict: ModuleType, cases: Path, tmp_path: Path) -> None:
    (cases / "clicked.npz").unlink()
    assert predict.main(["--inputs", str(cases), "--outputs", str(tmp_path), "--threads", "1"]) == 0
    answer = read_npz(tmp_path / "boxed.npz")["segs"]
    truth = read_npz(cases / "boxed.npz")["gts"]
    for value in (1, 2):
        found, wanted = answer == value, truth == value
        assert 2 * (found & wanted).sum() / (found.sum() + wanted.sum()) > 0.5
