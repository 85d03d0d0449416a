"""The finetuning command: where its settings come from."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType

import pytest

from medvl_sam2.training import finetune_records
from medvl_sam2.training.finetune_records import FinetuneConfig
from medvl_sam2.training.stage_config import read_stage_config
from script_modules import load_script

SHIPPED = Path(finetune_records.__file__).parent / "stages" / "finetune.yaml"
NEEDED = ["folder", "--store", "store"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("finetune", monkeypatch)


def test_the_shipped_file_states_every_default(script: ModuleType) -> None:
    written = {line.split(":")[0] for line in SHIPPED.read_text().splitlines() if not line.startswith("#")}
    assert written == {field.name for field in fields(FinetuneConfig)}
    assert read_stage_config(SHIPPED, FinetuneConfig) == FinetuneConfig()
    assert script.settings(script.parse(NEEDED)) == FinetuneConfig()


def test_the_command_line_wins_over_the_file(script: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 3\nmargin: 0.02\nreplay_cases: 5\ntrust_labels: true\n")
    options = script.parse([*NEEDED, "--config", str(file), "--epochs", "4", "--minutes", "0", "--device", "cuda"])
    wanted = FinetuneConfig(epochs=4, minutes=0.0, device="cuda", margin=0.02, replay_cases=5, trust_labels=True)
    assert script.settings(options) == wanted
    assert script.settings(script.parse([*NEEDED, "--trust-labels"])) == replace(FinetuneConfig(), trust_labels=True)


def test_a_wrong_file_is_named(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("replay_share: 0.1\n")
    assert script.main([*NEEDED, "--config", str(file)]) == 1
    assert "replay_share 0.1 must be at least 0.5" in capsys.readouterr().err
