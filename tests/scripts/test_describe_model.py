"""The tables of describe_model, and the figures behind them."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from medvl_sam2.modeling.footprint import STAGES, footprint
from medvl_sam2.modeling.meta_device import LiveBytes
from medvl_sam2.presets import preset
from script_modules import load_script


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("describe_model", monkeypatch)


def test_paper_figures_follow_from_its_sizes(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["paper", "--json", str(tmp_path / "paper.json")]) == 0
    assert "7919.49 M parameters" in capsys.readouterr().out
    figures = json.loads((tmp_path / "paper.json").read_text(encoding="utf-8"))
    parts = {part["name"]: part for part in figures["parts"]}
    blocks, head = parts["language blocks"], parts["language head"]
    assert head["flops"] == 2 * 3584 * 152_064 * 512
    attention = 28 * 2 * 2 * 512 * 512 * 3584
    matrices = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18_944)
    assert blocks["flops"] == 2 * 512 * matrices + attention
    assert parts["LoRA adapters"]["parameters"] == 28 * 16 * (4 * 3584 + 2 * (3584 + 512) + 3 * (3584 + 18_944))
    assert figures["inference"]["weights"] == 2 * figures["parameters"]
    assert figures["inference"]["keys_values"] == 2 * 2 * 28 * 512 * 512
    assert figures["inference"]["features"] == 2 * 128 * 256 * (64**2 + 128**2 // 4 + 256**2 // 8)
    training = {stage["name"]: stage for stage in figures["training"]}
    assert set(training) == set(STAGES)
    scorer = parts["slice scorer"]["parameters"]  # loaded with its side, learned from texts only
    assert training["1c"]["weights"] == 16 * training["1c"]["trained"] + 2 * scorer
    assert training["3"]["trained"] < training["2"]["trained"]


def test_every_parameter_is_in_one_part() -> None:
    found = footprint(preset("tiny"))
    assert found.parameters == 10_747_857
    assert {stage for part in found.parts for stage in part.stages} == set(STAGES)


def test_an_unknown_preset_says_what_there_is(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["huge"]) == 2
    assert "known: tiny, small, paper" in capsys.readouterr().err


def test_live_bytes_follow_what_the_backward_pass_keeps() -> None:
    with torch.device("meta"):
        weight = torch.empty(8, 8, requires_grad=True)
        with LiveBytes([weight]) as forgotten, torch.no_grad():
            result = torch.empty(4, 8) @ weight
            result = (result * 2).sum()
        with LiveBytes([weight]) as kept:
            squared = (torch.empty(4, 8) @ weight) ** 2
    assert (forgotten.now, kept.now) == (4, 3 * 4 * 8 * 4)
    assert forgotten.peak == 2 * 4 * 8 * 4 + 4  # the product, its double, and the sum
    assert squared.shape == (4, 8)
    assert result.ndim == 0
