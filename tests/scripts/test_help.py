"""Every program says how it is used: a broken import or option shows here, without running anything."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from script_modules import load_script

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
PROGRAMS = sorted(path.stem for path in SCRIPTS.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


def test_there_are_programs() -> None:
    assert {"evaluate", "train_demo", "benchmark_peers", "serve"} <= set(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        load_script(name, monkeypatch).main()
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out
