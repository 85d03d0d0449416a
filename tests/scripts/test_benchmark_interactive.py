"""The click benchmark: its table, its resuming, and the peers as they are installed."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from medvl_sam2.types import Prompt
from script_modules import load_script
from small_model import oblique_volume, small_predictor

LITTLE = ["--shapes", "48x40x6", "--image-size", "128", "--clicks", "2", "--threads", "1"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("benchmark_interactive", monkeypatch)


def test_ratios_are_theirs_over_ours_and_finished_rows_are_not_redone(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from interactive_contenders import Cost, Measured

    ours = Measured(Cost(4.0, 2.0, 5), (Cost(1.0, 0.5, 1), Cost(3.0, 1.5, 4)), Cost(0.2, 0.1, 0), 1.0, 3, "bfloat16")
    peer = Measured(Cost(8.0, 6.0, 7), (Cost(40.0, 30.0, 8),), Cost(4.0, 3.0, 9), 2.5, 6)
    ran: list[str] = []

    def alone(name: str, *_: object) -> object:
        ran.append(name)
        return ours if name == "ours" else peer

    monkeypatch.setattr(script, "run_alone", alone)
    figures, picture = tmp_path / "figures.json", tmp_path / "scaling.png"
    arguments = [*LITTLE, "--only", "ours", "sam_3d", "--json", str(figures), "--plot", str(picture)]
    assert script.main(arguments) == 0
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if "sam_3d / ours" in line)
    assert " ".join(line.split()) == (
        "sam_3d / ours first click 3.0 x ( 2.0 x) next click 30.0 x ( 20.0 x) undo 30.0 x ( 20.0 x) peak 2.50 x"
    )
    costs = next(line for line in text.splitlines() if line.split()[0] == "ours")
    assert [part.split()[-2] for part in costs.split(" decoded)")[:3]] == ["s,", "s,", "s,"]
    assert [part.split()[-1] for part in costs.split(" decoded)")[:3]] == ["5", "2.5", "0"]
    assert costs.endswith("3 slices in the mask  bfloat16")
    assert [row["precision"] for row in json.loads(figures.read_text(encoding="utf-8"))["rows"]] == ["bfloat16", None]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert script.main(arguments) == 0
    assert ran == ["ours", "sam_3d"]
    assert capsys.readouterr().out == text
    assert script.main([*arguments, "--seed", "1"]) == 2
    assert "other conditions" in capsys.readouterr().err
    older = json.loads(figures.read_text(encoding="utf-8"))
    del older["rows"][0]["first"]["decoded"]
    figures.write_text(json.dumps(older), encoding="utf-8")
    assert script.main(arguments) == 2
    assert "lacks the number of decoded slices" in capsys.readouterr().err


def test_decoded_slices_are_those_that_pass_the_decoder(script: ModuleType) -> None:
    """A click on a session that is open decodes the clicked slice and what the change is carried to, and says so."""
    from interactive_contenders import decoded_slices

    predictor = small_predictor()
    volume, _ = oblique_volume()
    session = predictor.open(volume)
    seen: list[int] = []
    whole = predictor.model.segmenter.decode

    def watched(features, *rest):  # type: ignore[no-untyped-def]
        seen.append(len(features))
        return whole(features, *rest)

    predictor.model.segmenter.decode = watched  # type: ignore[method-assign]
    points = np.array([[15.0, 20.0, 9.0], [20.0, 22.0, 10.0]])
    for count in (1, 2):
        seen.clear()
        with decoded_slices() as rows:
            predictor.segment_prompt(session, Prompt(points[:count], np.ones(count, dtype=np.int64)))
        assert rows == seen
        assert sum(rows) > 0
    with decoded_slices() as rows:
        predictor.segment_prompt(session, Prompt(points[:1], np.ones(1, dtype=np.int64)))
    assert rows == []  # undo needs no network


def test_clicks_lie_inside_and_begin_with_the_object_in_the_middle(script: ModuleType) -> None:
    volume = script.generated_volume((48, 40, 6), 0)
    clicks = script.placed_clicks(volume, 7)
    assert clicks.points[0].tolist() == [24, 20, 3]
    assert ((clicks.points >= 0) & (clicks.points < [48, 40, 6])).all()
    assert clicks.labels.tolist() == [1, 0, 1, 0, 1, 0, 1]
    assert len(np.unique(clicks.points, axis=0)) == 7


def test_bad_options_are_named(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--shapes", "48x40"]) == 2
    assert "'48x40' is not three sizes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main(["--clicks", "1"])
    assert "no next click to time" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("name", ["ours, long", "sam_3d", "sam2 video"])
def test_every_contender_runs_as_installed(script: ModuleType, tmp_path: Path, name: str) -> None:
    figures = tmp_path / "figures.json"
    assert script.main([*LITTLE, "--only", name, "--json", str(figures)]) == 0
    (row,) = json.loads(figures.read_text(encoding="utf-8"))["rows"]
    assert row["contender"] == name
    assert row["shape"] == [48, 40, 6]
    assert min(row["first"]["cpu"], row["following"][0]["cpu"], row["undo"]["cpu"]) > 0
    assert min(row["first"]["decoded"], row["following"][0]["decoded"]) > 0
