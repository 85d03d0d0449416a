"""The judge of measured lesions: what it learns, what it leaves alone, and how it comes into a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from medvl_sam2.checkpoint import CheckpointMeta, load_checkpoint, save_checkpoint
from medvl_sam2.config import ModelConfig, SceneConfig
from medvl_sam2.errors import CheckpointError, DataError
from medvl_sam2.modeling.lesion_judge import LesionJudge, LesionWords
from medvl_sam2.modeling.scene_facts import LESION_FEATURES, LESION_KINDS_AT
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.unified import UnifiedModel
from medvl_sam2.modeling.vision_language import VisionLanguage
from medvl_sam2.training import language_phase
from medvl_sam2.training.language_data import CaseStore, LanguageCase
from medvl_sam2.training.language_phase import LanguagePhaseConfig, LanguageTrainer
from medvl_sam2.training.language_weights import load_language
from small_model import SMALL

ORGANS, KINDS = 3, 2
JUDGED = replace(SMALL, scene=SceneConfig(lesions=2, width=8, detail=8, judge=True))


def measured(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Lesions whose map says the second kind whatever they are; attenuation tells kinds, certainty tells nothing."""
    draw = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, 1 + KINDS, (count,), generator=draw)
    lesions = torch.rand(count, LESION_FEATURES + ORGANS, generator=draw) * 0.1
    lesions[:, 0] = 1
    lesions[:, 1] = torch.where(kinds > 0, 0.9, 0.75) + 0.02 * torch.randn(count, generator=draw)
    lesions[:, LESION_KINDS_AT : LESION_KINDS_AT + KINDS] = torch.tensor([0.2, 0.7])
    lesions[:, 18] = 0.3 + 0.2 * (kinds == 2) + 0.02 * torch.randn(count, generator=draw)
    return lesions, kinds


def test_attenuation_and_certainty_correct_the_map() -> None:
    judge = LesionJudge(ORGANS, KINDS)
    judge.fit(*measured(200, 0))
    lesions, kinds = measured(100, 1)
    by_map = 1 + lesions[:, judge.kinds].argmax(dim=1)
    assert float((by_map == kinds).float().mean()) < 0.5
    assert float((judge.chances(lesions).argmax(dim=1) == kinds).float().mean()) > 0.95


def test_the_same_lesions_give_the_same_judge() -> None:
    first, second = LesionJudge(ORGANS, KINDS), LesionJudge(ORGANS, KINDS)
    for judge in (first, second):
        judge.fit(*measured(80, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_only_the_kinds_of_lesions_change() -> None:
    judge = LesionJudge(ORGANS, KINDS)
    lesions = measured(4, 4)[0].reshape(2, 2, -1)
    assert torch.equal(judge(lesions), lesions)  # not fitted yet
    judge.fit(*measured(80, 3))
    lesions[1, 1] = 0  # an empty slot
    judged = judge(lesions)
    assert judged[1, 1].abs().sum() == 0
    others = [n for n in range(lesions.shape[-1]) if not judge.kinds.start <= n < judge.kinds.stop]
    assert torch.equal(judged[..., others], lesions[..., others])
    assert not torch.equal(judged[0, 0, judge.kinds], lesions[0, 0, judge.kinds])
    assert torch.allclose(judged[0, 0, judge.kinds], judge.chances(lesions)[0, 0, 1:])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    Tokenizer.train(["a b c"], 300).save(path)
    return path


def saved(folder: Path, config: ModelConfig, tokenizer: Path) -> UnifiedModel:
    model = UnifiedModel(config, Tokenizer.load(tokenizer))
    save_checkpoint(folder, model.state_dict(), config, tokenizer, CheckpointMeta("small", "1", "test weights"))
    return model


def test_an_older_checkpoint_stays_and_starts_a_judged_model(tokenizer: Path, tmp_path: Path) -> None:
    older = replace(JUDGED, scene=replace(JUDGED.scene, judge=False))
    saved(tmp_path / "older", older, tokenizer)
    assert not [name for name in load_checkpoint(tmp_path / "older").state if ".judge." in name]
    model = VisionLanguage(JUDGED, Tokenizer.load(tokenizer))
    assert model.scene is not None
    assert model.scene.judge is not None
    before = model.scene.judge.linear.weight.clone()
    load_language(model, tmp_path / "older")
    assert torch.equal(model.scene.judge.linear.weight, before)
    newer = saved(tmp_path / "newer", JUDGED, tokenizer)
    load_language(model, tmp_path / "newer")
    wanted = newer.language.state_dict()["scene.judge.linear.weight"]
    torch.testing.assert_close(model.scene.judge.linear.weight, wanted, atol=2e-3, rtol=1e-3)  # stored as fp16
    with pytest.raises(CheckpointError, match="judge"):
        load_language(VisionLanguage(older, Tokenizer.load(tokenizer)), tmp_path / "newer")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[LanguageCase]:
    store = CaseStore(range(4), SMALL.vision, tmp_path_factory.mktemp("cases"))
    return store[:]


def trainer(cases: list[LanguageCase], tokenizer: Path) -> LanguageTrainer:
    torch.manual_seed(0)
    return LanguageTrainer(VisionLanguage(JUDGED, Tokenizer.load(tokenizer)), LanguagePhaseConfig(), cases)


def judge_of(trainer: LanguageTrainer) -> LesionJudge:
    assert trainer.model.scene is not None
    assert trainer.model.scene.judge is not None
    return trainer.model.scene.judge


def test_the_language_phase_fits_once_and_keeps_the_judge(
    cases: list[LanguageCase], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seeing() -> LanguageTrainer:
        made = trainer(cases, tokenizer)
        assert made.model.scene is not None
        with torch.no_grad():
            made.model.scene.lesion_head[-1].bias.fill_(9.0)  # one great lesion, taken for every finding
        return made

    with pytest.raises(DataError, match="no lesion was found"):  # an untrained map sees none
        trainer(cases, tokenizer).fit_judge(tmp_path)
    assert not list(tmp_path.glob("judge_*"))
    monkeypatch.setattr(language_phase, "slot_lies_on", lambda slot, finding: True)
    first, second = seeing(), seeing()
    first.fit_judge(tmp_path)
    assert not any(p.requires_grad for p in judge_of(first).parameters())
    second.cases = [replace(case, findings=()) for case in cases]  # of these it could not be fitted again
    second.fit_judge(tmp_path)
    assert torch.equal(judge_of(first).linear.weight, judge_of(second).linear.weight)
    assert torch.equal(judge_of(first).mean, judge_of(second).mean)
    with pytest.raises(DataError, match="no lesion was found"):  # another map is not judged by this one's judge
        trainer(cases, tokenizer).fit_judge(tmp_path)


def test_a_lesion_is_said_in_the_words_of_its_kind_and_organ() -> None:
    words = LesionWords(ORGANS, KINDS, 4)
    lesions = torch.zeros(1, 2, LESION_FEATURES + ORGANS)
    assert words(lesions).abs().sum() == 0
    spoken = {"cyst": 1.0, "nodule": 2.0, "liver": 3.0, "spleen": 4.0, "lung": 5.0}
    directions = torch.eye(5, 4) + 0.1

    def embedding(name: str) -> Tensor:
        return directions[list(spoken).index(name)] * spoken[name]

    words.learn(embedding, ("cyst", "nodule"), ("liver", "spleen", "lung"))
    lesions[0, 0, words.first_kind + 1] = 1.0  # surely a nodule
    lesions[0, 0, LESION_FEATURES + 2] = 0.7  # in the lung
    said = words(lesions)
    assert torch.allclose(said[0, 0], words.kinds[1] + words.organs[2], atol=1e-4)
    assert said[0, 1].abs().sum() == 0
    assert torch.allclose(words.kinds.square().mean(dim=1), torch.full((2,), 0.25**2))
    before = words.kinds.clone()
    words.learn(lambda name: torch.ones(4), ("cyst", "nodule"), ("liver", "spleen", "lung"))
    assert torch.equal(words.kinds, before)  # learned words are not begun again
