"""The real stage on a very small unified model: only the intended weights move, and a stopped run goes on exactly.

As a program it finetunes in a folder, for torchrun::

    test_finetune_stage.py BASE OUT ddp|fsdp ...
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune_fakes import make_case, make_samples
from medvl_sam2.checkpoint import ALIGNMENT_FOLDER, CheckpointMeta, load_checkpoint, save_checkpoint
from medvl_sam2.config import AlignmentConfig, LanguageConfig, ModelConfig, ProjectorConfig, SliceConfig, VisionConfig
from medvl_sam2.errors import Cancelled
from medvl_sam2.modeling.prompts import SEGMENT_PROMPTS, segment_prompt, segment_reply
from medvl_sam2.modeling.siglip import ImageTextModel
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.unified import UnifiedModel
from medvl_sam2.predictor.predictor import Predictor
from medvl_sam2.training.finetune import FinetuneData
from medvl_sam2.training.finetune_records import FinetuneConfig
from medvl_sam2.training.finetune_samples import load_samples
from medvl_sam2.training.finetune_stage import StepSize, UnifiedStage, spoken_concept
from medvl_sam2.training.samples import CONCEPTS
from medvl_sam2.training.trainer import ReportProgress, Trainer, TrainerConfig
from medvl_sam2.training.volume_sources import from_case
from medvl_sam2.types import Prompt

SMALL = dataclasses.replace(
    ModelConfig.tiny(),
    vision=VisionConfig(input_size=(16, 32, 32), channels=(8, 8, 16, 16, 32), kernels=(5, 5, 3, 3)),
    projector=ProjectorConfig((8, 4), (4, 4)),
    language=LanguageConfig(vocab_size=512, hidden_size=32, intermediate_size=64, layers=1, heads=2, kv_heads=1),
    slices=SliceConfig(embed_dim=8, stages=(1, 1, 2, 1), global_att_blocks=(3,), d_model=64, memory_layers=1),
)
SIZE = StepSize(windows=2, clips=1, clip_length=2, whole_slices=1, concepts=2, held_out=2)
LOOP = TrainerConfig(steps=4, warmup=1, schedule="constant", log_steps=2, validate_steps=2, precision="float32")
META = CheckpointMeta("small", "c", "Random weights for tests.")


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


def small_data(folder: Path) -> FinetuneData:
    loaded, _ = load_samples(make_samples(folder, 2))
    volumes = [loaded[0].volume(), from_case(make_case(7))]
    return FinetuneData(volumes, [0.5, 0.5], [loaded[1].volume()])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> FinetuneData:
    return small_data(tmp_path_factory.mktemp("studies"))


def stage_of(base: Path, data: FinetuneData, epoch: int = 3) -> UnifiedStage:
    return UnifiedStage(base, FinetuneConfig(learning_rate=1e-2, steps_per_epoch=epoch), data, SIZE)


def trained(
    base: Path, data: FinetuneData, out: Path | None = None, loop: TrainerConfig = LOOP,
    listener: ReportProgress | None = None,
) -> Trainer:  # fmt: skip
    trainer = Trainer(stage_of(base, data), loop, out, listener)
    trainer.run()
    return trainer


def test_only_decoder_memory_adapters_and_seg_projector_move(base: Path, data: FinetuneData, tmp_path: Path) -> None:
    stage = stage_of(base, data)
    trainer = Trainer(stage, LOOP)
    trainer.run()
    assert all(line["loss"] > 0 and line["held_out_loss"] > 0 for line in trainer.history)
    assert {"window", "clicked", "tracked"} <= trainer.history[0].keys()
    stage.export(tmp_path / "candidate", META, trainer.weights())
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


def test_a_finetuned_model_keeps_the_image_text_model_of_its_base(
    base: Path, data: FinetuneData, tmp_path: Path
) -> None:
    tokenizer = base / "tokenizer.json"
    config = dataclasses.replace(SMALL, alignment=AlignmentConfig(512, 16, 24, layers=1, heads=2, width=12))
    meta = CheckpointMeta("small", "0", "Random weights for tests.")
    torch.manual_seed(1)
    head = ImageTextModel(config, Tokenizer.load(tokenizer))
    save_checkpoint(tmp_path / "head", head.state_dict(), config, tokenizer, meta)
    state = load_checkpoint(base).state
    save_checkpoint(tmp_path / "base", state, SMALL, tokenizer, meta, alignment=tmp_path / "head")
    stage = stage_of(tmp_path / "base", data)
    stage.export(tmp_path / "candidate", meta, Trainer(stage, LOOP).weights())
    case = make_case(7)
    vectors = [Predictor.load(tmp_path / name).embed_volume(case.volume()) for name in ("base", "candidate")]
    assert torch.equal(*map(torch.from_numpy, vectors))


def test_a_run_stopped_inside_an_epoch_goes_on_as_if_nothing_had_happened(
    base: Path, data: FinetuneData, tmp_path: Path
) -> None:
    def stop(share: float, line: str) -> None:
        if re.search(r"step 2 ", line):
            raise Cancelled("stopped")

    whole = trained(base, data, tmp_path / "whole")
    with pytest.raises(Cancelled):
        trained(base, data, tmp_path / "stopped", listener=stop)
    resumed = trained(base, data, tmp_path / "stopped")
    assert whole.history == resumed.history
    state = resumed.weights()
    for name, tensor in whole.weights().items():
        assert torch.equal(tensor, state[name]), name


def test_in_bfloat16_too_adapters_learn_in_the_step_that_fills_the_table(base: Path, data: FinetuneData) -> None:
    stage = stage_of(base, data, epoch=1)
    Trainer(stage, dataclasses.replace(LOOP, steps=2, precision="bfloat16")).run()
    moved = {name: float(p.detach().abs().max()) for name, p in stage.module.named_parameters() if ".lora_b" in name}
    assert all(moved.values()), moved


@pytest.mark.slow
def test_two_processes_finetune_like_one_by_either_way_of_sharing(base: Path, tmp_path: Path, repository: Path) -> None:
    path = os.pathsep.join([str(repository / "model"), str(repository / "tests")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, __file__, str(base), str(tmp_path), "ddp", "fsdp"]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True, timeout=600)
    main(base, tmp_path / "alone", dataclasses.replace(LOOP, accumulate=2))
    alone, before = load_checkpoint(tmp_path / "alone" / "candidate").state, load_checkpoint(base).state
    moved = sum(float((alone[name].float() - before[name].float()).square().sum()) for name in alone)
    for parallel in ("ddp", "fsdp"):
        both = load_checkpoint(tmp_path / parallel / "candidate").state
        apart = sum(float((alone[name].float() - both[name].float()).square().sum()) for name in alone)
        assert apart < 0.02 * moved, parallel  # AdamW divides small numbers, whose sums depend on the order


def test_concepts_are_spoken() -> None:
    assert spoken_concept(CONCEPTS.index("kidney_right")) == "right kidney"
    assert spoken_concept(CONCEPTS.index("lesion_in_liver")) == "lesion in the liver"


def main(base: Path, out: Path, loop: TrainerConfig) -> None:
    out.mkdir(exist_ok=True)
    folder = out / f"studies{os.environ.get('RANK', '')}"
    folder.mkdir()
    trainer = trained(base, small_data(folder), out, loop)
    weights = trainer.weights()
    if trainer.ranks.first:
        stage = trainer.stage
        assert isinstance(stage, UnifiedStage)
        stage.export(out / "candidate", META, weights)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for parallel in sys.argv[3:]:
        main(Path(sys.argv[1]), Path(sys.argv[2]) / parallel, dataclasses.replace(LOOP, parallel=parallel))
