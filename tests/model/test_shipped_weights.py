"""The weights in the repository fit the code beside them and do what they are shipped for."""

from __future__ import annotations

import numpy as np
import pytest

from medvl_sam2.checkpoint import ALIGNMENT_FOLDER, load_checkpoint, shipped_checkpoint
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


def test_a_question_in_small_letters_gets_the_same_answer(predictor: Predictor, case: Case) -> None:
    session = predictor.open(case.volume())
    for organ in ("liver", "pancreas", "left kidney"):
        said = predictor.answer(session, f"Is there a lesion in the {organ}?").text
        assert said in ("yes", "no")
        assert predictor.answer(session, f"is there a lesion in the {organ}").text == said


def test_volumes_and_reports_meet_in_the_shipped_image_text_model(predictor: Predictor, case: Case) -> None:
    folder = shipped_checkpoint()
    shipped = folder.rglob("*.safetensors")
    assert sum(path.stat().st_size for path in shipped) <= 25_000_000
    assert load_checkpoint(folder / ALIGNMENT_FOLDER).meta.sha256 in (folder / "MODEL_CARD.md").read_text()
    assert predictor.embeds
    seen = predictor.embed_volume(predictor.open(case.volume()))
    own = predictor.embed_text(case.report)
    other = predictor.embed_text("CT of the chest in the arterial phase. The right lung and left lung are normal.")
    assert np.linalg.norm([seen, own, other], axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    assert seen @ own > seen @ other
