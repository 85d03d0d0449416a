"""The weights in the repository fit the code beside them and do what they are shipped for."""

from __future__ import annotations

import numpy as np
import pytest

from medvl_sam2.checkpoint import load_checkpoint, shipped_checkpoint
from medvl_sam2.evaluation.cases import FIRST_SEED
from medvl_sam2.evaluation.metrics import dice
from medvl_sam2.predictor import Predictor
from medvl_sam2.synthesis import Case, generate_case
from medvl_sam2.types import Prompt
from medvl_sam2.vocabulary import CLASSES


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor.load()


@pytest.fixture(scope="module")
def case() -> Case:
    return generate_case(FIRST_SEED)


def test_weights_fit_the_code_and_say_what_they_are() -> None:
    checkpoint = load_checkpoint(shipped_checkpoint())
    assert "not for clinical use" in checkpoint.meta.notice.lower()
    parameters = sum(t.numel() for t in checkpoint.state.values())
    assert parameters <= 20_000_000
    assert (shipped_checkpoint() / "model.safetensors").stat().st_size <= 25_000_000
    assert (shipped_checkpoint() / "MODEL_CARD.md").read_text().count(checkpoint.meta.sha256) == 1


def test_organs_are_found_by_name_and_by_click(predictor: Predictor, case: Case) -> None:
    session = predictor.open(case.volume())
    liver = case.organs == CLASSES.index("liver") + 1
    named = predictor.segment_classes(session, ["liver"]).mask > 0
    assert dice(named, liver) > 0.6
    point = np.argwhere(liver)[len(np.argwhere(liver)) // 2]
    clicked = predictor.segment_prompt(session, Prompt(point[None].astype(float), np.array([1]))).mask > 0
    assert clicked[tuple(point)]
    assert predictor.answer(session, "Which contrast phase is this?").notice
