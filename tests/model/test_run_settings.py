"""A run goes on only with what it was begun with: settings of stage and loop, and the weights that are not trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from medvl_sam2.errors import CheckpointError
from medvl_sam2.training.run_settings import frozen_digest
from medvl_sam2.training.trainer import Trainer
from trainer_toy import TOY, Toy


class ToyOn(Toy):
    """The toy stage, trained on named cases."""

    def __init__(self, cases: str) -> None:
        super().__init__()
        self._cases = cases

    def settings(self) -> Mapping[str, Any]:
        return {"data": {"cases": self._cases, "count": 3}}


def test_a_run_goes_on_with_more_steps_on_the_same_settings(tmp_path: Path) -> None:
    Trainer(ToyOn("first"), replace(TOY, steps=4), tmp_path).run()
    assert Trainer(ToyOn("first"), replace(TOY, steps=9), tmp_path).progress.step == 4


def test_other_data_is_refused_and_the_state_file_kept(tmp_path: Path) -> None:
    Trainer(ToyOn("first"), replace(TOY, steps=4), tmp_path).run()
    before = (tmp_path / "toy_resume.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"begun with data\.cases 'first', this run has 'second'; restore"):
        Trainer(ToyOn("second"), replace(TOY, steps=9), tmp_path)
    assert (tmp_path / "toy_resume.safetensors").read_bytes() == before


def test_another_seed_of_the_loop_is_refused(tmp_path: Path) -> None:
    Trainer(ToyOn("first"), replace(TOY, steps=4), tmp_path).run()
    with pytest.raises(CheckpointError, match=r"trainer\.seed"):
        Trainer(ToyOn("first"), replace(TOY, steps=9, seed=TOY.seed + 1), tmp_path)


def test_frozen_weights_are_told_apart_and_trained_ones_are_not_looked_at() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    assert frozen_digest(module) == ""
    module[0].requires_grad_(False)
    begun = frozen_digest(module)
    with torch.no_grad():
        module[1].weight.add_(1)
    assert frozen_digest(module) == begun != ""
    with torch.no_grad():
        module[0].weight[0, 0] += 1e-3
    assert frozen_digest(module) != begun
