"""The real learner on a very small unified model: only the intended weights move, and a state goes on exactly."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from finetune_fakes import make_case, make_samples
from medvl_sam2.checkpoint import ALIGNMENT_FOLDER, CheckpointMeta, load_checkpoint, save_checkpoint
from medvl_sam2.config import AlignmentConfig, LanguageConfig, ModelConfig, ProjectorConfig, SliceConfig, VisionConfig
from medvl_sam2.errors import CheckpointError
from medvl_sam2.modeling.prompts import SEGMENT_PROMPTS, segment_prompt, segment_reply
from medvl_sam2.modeling.siglip import ImageTextModel
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.unified import UnifiedModel
from medvl_sam2.predictor.predictor import Predictor
from medvl_sam2.training.finetune_learner import StepSize, UnifiedLearner, spoken_concept
from medvl_sam2.training.finetune_records import FinetuneConfig
from medvl_sam2.training.finetune_samples import load_samples
from medvl_sam2.training.samples import CONCEPTS, LabelledVolume
from medvl_sam2.training.volume_sources import from_case
from medvl_sam2.types import Prompt

SMALL = dataclasses.replace(
    ModelConfig.tiny(),
    vision=VisionConfig(input_size=(16, 32, 32), channels=(8, 8, 16, 16, 32), kernels=(5, 5, 3, 3)),
    projector=ProjectorConfig((8, 4), (4, 4)),
    language=LanguageConfig(vocab_size=512, hidden_size=32, intermediate_size=64, layers=1, heads=2, kv_heads=1),
    slices=SliceConfig(embed_dim=8, stages=(1, 1, 2, 1), global_att_blocks=(3,), d_model=64, memory_layers=1),
)
SIZE = StepSize(windows=2, clips=1, clip_length=2, whole_slices=1, concepts=2, warmup=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learner")
    names = [spoken_concept(concept) for concept in range(len(CONCEPTS))]
    corpus = [segment_prompt([n], t) + segment_reply([n], [True]) for n in names for t in SEGMENT_PROMPTS]
    tokenizer = Tokenizer.train(corpus, 512)
    tokenizer.save(folder / "tokenizer.json")
    torch.manual_seed(0)
    model = UnifiedModel(SMALL, tokenizer)
    meta = CheckpointMeta("small", "0", "Random weights for tests.")
    save_checkpoint(folder / "base", model.state_dict(), SMALL, folder / "tokenizer.json", meta)
    return folder / "base"


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> list[LabelledVolume]:
    loaded, _ = load_samples(make_samples(tmp_path_factory.mktemp("studies"), 1))
    return [loaded[0].volume(), from_case(make_case(7))]


def learner(base: Path) -> UnifiedLearner:
    return UnifiedLearner(base, FinetuneConfig(learning_rate=1e-2), SIZE)


def test_only_decoder_memory_adapters_and_seg_projector_move(
    base: Path, volumes: list[LabelledVolume], tmp_path: Path
) -> None:
    one = learner(base)
    one.begin(volumes, [0.5, 0.5], seed=1)
    losses = [one.step() for _ in range(4)]
    assert all(loss > 0 for loss in losses)
    one.export(tmp_path / "candidate", CheckpointMeta("small", "c", "Random weights for tests."))
    before, after = load_checkpoint(base).state, load_checkpoint(tmp_path / "candidate").state
    assert set(before) == set(after)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    for part in ("sam_mask_decoder.transformer", "memory_attention", "memory_encoder", "q_proj", "seg_projector"):
        assert any(part in name for name in moved), part
    frozen = ("image_encoder", "sam_prompt_encoder", "conv_s0", "conv_s1", "language.vision", "language.projector")
    assert not [name for name in moved for part in frozen if part in name]
    assert not [name for name in moved if "embed_tokens" in name or "lm_head" in name]
    assert not (tmp_path / "candidate" / ALIGNMENT_FOLDER).exists()
    predictor = Predictor.load(tmp_path / "candidate")
    case = make_case(7)
    session = predictor.open(case.volume())
    prompt = Prompt(box=torch.tensor([[2, 2, 2], [20, 20, 12]]).numpy())
    assert predictor.segment_prompt(session, prompt).mask.shape == case.image.shape


def test_a_finetuned_model_keeps_the_image_text_model_of_its_base(base: Path, tmp_path: Path) -> None:
    tokenizer = base / "tokenizer.json"
    config = dataclasses.replace(SMALL, alignment=AlignmentConfig(512, 16, 24, layers=1, heads=2, width=12))
    meta = CheckpointMeta("small", "0", "Random weights for tests.")
    torch.manual_seed(1)
    head = ImageTextModel(config, Tokenizer.load(tokenizer))
    save_checkpoint(tmp_path / "head", head.state_dict(), config, tokenizer, meta)
    state = load_checkpoint(base).state
    save_checkpoint(tmp_path / "base", state, SMALL, tokenizer, meta, alignment=tmp_path / "head")
    learner(tmp_path / "base").export(tmp_path / "candidate", meta)
    case = make_case(7)
    vectors = [Predictor.load(tmp_path / name).embed_volume(case.volume()) for name in ("base", "candidate")]
    assert torch.equal(*map(torch.from_numpy, vectors))


def test_a_restored_state_goes_on_as_if_nothing_had_happened(
    base: Path, volumes: list[LabelledVolume], tmp_path: Path
) -> None:
    straight = learner(base)
    straight.begin(volumes, [0.5, 0.5], seed=1)
    for _ in range(2):
        straight.step()
    straight.save_state(tmp_path)
    resumed = learner(base)
    resumed.load_state(tmp_path)
    losses = []
    for one in (straight, resumed):
        one.begin(volumes, [0.5, 0.5], seed=2)
        losses.append([one.step() for _ in range(2)])
    assert losses[0] == losses[1]
    for name, parameter in straight.trained.items():
        assert torch.equal(parameter, resumed.trained[name]), name


def test_a_state_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    one = learner(base)
    one.save_state(tmp_path)
    other = learner(base)
    other.trained.pop(next(iter(other.trained)))
    with pytest.raises(CheckpointError, match="does not fit"):
        other.load_state(tmp_path)


def test_step_before_begin_says_so(base: Path) -> None:
    with pytest.raises(CheckpointError, match="begin"):
        learner(base).step()


def test_concepts_are_spoken() -> None:
    assert spoken_concept(CONCEPTS.index("kidney_right")) == "right kidney"
    assert spoken_concept(CONCEPTS.index("lesion_in_liver")) == "lesion in the liver"
