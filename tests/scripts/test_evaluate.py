"""The evaluation command: files it writes and messages it gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from script_modules import load_script

LITTLE = ["--generated", "1", "--objects-per-case", "1", "--settings", "box", "--steps", "1"]


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("evaluate", monkeypatch)


def test_controls_alone_write_figures_and_a_page(
    evaluate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, page = tmp_path / "figures.json", tmp_path / "pages" / "page.html"
    arguments = [*LITTLE, "--controls-only", "--json", str(figures), "--html", str(page)]
    assert evaluate.main(arguments) == 0
    written = json.loads(figures.read_text(encoding="utf-8"))
    assert set(written["interactive"][0]["engines"]) == {"shape control", "grow control"}
    assert written["skipped"]["retrieval"] == "no model was loaded"
    assert written["options"]["text_cases"] == "0"
    assert "grow control" in page.read_text(encoding="utf-8")
    assert "Dice after" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "dance"], "must be some of"),
        (["--settings", "scribble"], "unknown setting 'scribble'"),
        (["--bertscore", "nowhere"], "holds no config.json"),
    ],
)
def test_bad_options_are_named(
    evaluate: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([*LITTLE, "--controls-only", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_pool_of_retrieval_is_filled_up(evaluate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cases:
        retrieves = True

        def __init__(self) -> None:
            self.seeds: dict[str, list[int]] = {"run": [], "run_text": [], "run_retrieval": []}

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda case, *_: self.seeds[name].append(case)

    monkeypatch.setattr(evaluate, "generated_cases", lambda count, first, _: range(first, first + count))
    runner = Cases()
    options = ["--generated", "1", "--text-cases", "2", "--retrieval-pool", "5", "--first-seed", "2000000"]
    evaluate.run(runner, evaluate.parse(options))
    seeds = [n - 2_000_000 for asked in runner.seeds.values() for n in asked]
    assert seeds == [0, 1, 2, 3, 4]
    assert [len(asked) for asked in runner.seeds.values()] == [1, 2, 2]
    runner.retrieves = False  # nothing is generated for a model that cannot use it
    evaluate.run(runner, evaluate.parse(["--retrieval-pool", "5"]))
    assert len(runner.seeds["run_retrieval"]) == 2


def test_nothing_to_evaluate_is_refused(evaluate: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main([])
    assert "--text-cases" in capsys.readouterr().err
