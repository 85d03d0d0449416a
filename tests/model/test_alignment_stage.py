"""Alignment: the loss against its formula, what takes part in it, and a stage that learns, stops and goes on."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from medvl_sam2.config import AlignmentConfig
from medvl_sam2.errors import CheckpointError, ConfigError, DataError
from medvl_sam2.modeling.siglip import SiglipHead
from medvl_sam2.modeling.text_tower import text_batch
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.partial_weights import load_image_text
from medvl_sam2.synthesis import generate_case
from medvl_sam2.training import alignment_stage
from medvl_sam2.training.alignment_learner import AlignmentLearner, AlignmentStage, AlignmentStageConfig
from medvl_sam2.training.alignment_losses import Pairs, Reconstruction, RegionHead, siglip_loss
from medvl_sam2.training.alignment_metrics import retrieval_scores
from medvl_sam2.training.alignment_records import GeneratedRecords, record_of
from medvl_sam2.training.case_feed import CaseFeed
from medvl_sam2.training.language_data import ORGANS, LanguageCase, prepare_case
from medvl_sam2.training.run_settings import require_same
from medvl_sam2.training.stage import Draw
from medvl_sam2.training.stage_config import read_stage_config
from medvl_sam2.training.trainer import Trainer, TrainerConfig
from small_model import SMALL

HEAD = AlignmentConfig(vocab_size=400, hidden_size=16, intermediate_size=24, layers=1, heads=2, max_length=96, width=12)
CONFIG = AlignmentStageConfig(
    head=HEAD, batch=4, regions=2, learning_rate=3e-3, trainer=TrainerConfig(steps=6, warmup=2, log_steps=2)
)


@pytest.fixture(scope="module")
def cases() -> list[LanguageCase]:
    return [prepare_case(generate_case(seed), SMALL.vision, wordings=2) for seed in (3, 4, 5, 6)]


@pytest.fixture(scope="module")
def tokenizer(cases: list[LanguageCase]) -> Tokenizer:
    return Tokenizer.train([report for case in cases for report in case.reports], HEAD.vocab_size)


def learner(tokenizer: Tokenizer) -> AlignmentLearner:
    torch.manual_seed(0)
    return AlignmentLearner(replace(SMALL, alignment=HEAD), tokenizer, batch=4, organs=8)


def stage_on(
    config: AlignmentStageConfig, tokenizer: Tokenizer, records: GeneratedRecords, out: Path | None = None
) -> AlignmentStage:
    feed = CaseFeed(records.names, records.__getitem__, 0)
    return AlignmentStage(config, learner(tokenizer), feed, out)


def unit(rows: int, seed: int, width: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=-1)


def by_formula(images: Tensor, texts: Tensor, keys: Sequence[int], valid: Sequence[bool], t: float, b: float) -> float:
    total = 0.0
    for i in range(len(images)):
        for j in range(len(texts)):
            if valid[i] and valid[j]:
                z = 1 if keys[i] == keys[j] else -1
                total += math.log(1 + math.exp(-z * (math.exp(t) * float(images[i] @ texts[j]) + b)))
    return total / sum(valid)


def alone(images: Tensor, texts: Tensor, keys: Tensor, valid: Tensor, t: Tensor, b: Tensor) -> Tensor:
    pairs = Pairs(texts, keys, valid)
    return siglip_loss(images, pairs, pairs, t, b)


def test_the_loss_is_the_papers_formula() -> None:
    images, texts, t, b = unit(4, 0), unit(4, 1), torch.tensor([2.0]).double(), torch.tensor([-1.5]).double()
    everything = torch.ones(4, dtype=torch.bool)
    loss = alone(images, texts, torch.arange(4), everything, t, b)
    assert loss.ndim == 0
    assert float(loss) == pytest.approx(by_formula(images, texts, range(4), [True] * 4, 2.0, -1.5), rel=1e-12)
    # Rows 0 and 2 have the same text, row 3 has none.
    keys, valid = [7, 8, 7, 9], [True, True, True, False]
    loss = alone(images, texts, torch.tensor(keys), torch.tensor(valid), t, b)
    assert float(loss) == pytest.approx(by_formula(images, texts, keys, valid, 2.0, -1.5), rel=1e-12)
    nothing = alone(images, texts, torch.arange(4), ~everything, t, b)
    assert float(nothing) == 0.0


@pytest.mark.slow
def test_two_processes_see_one_anothers_texts(tmp_path: Path, repository: Path) -> None:
    """Mean loss and gradient over the processes are those of the whole batch, also with unequal valid rows."""
    path = os.pathsep.join([str(repository / "model"), str(repository / "tests" / "model"), str(repository / "tests")])
    script = "import test_alignment_stage as t, sys; from pathlib import Path; t.half_a_batch(Path(sys.argv[1]))"
    runner = tmp_path / "half.py"
    runner.write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*launch, str(runner), str(tmp_path)], env={**os.environ, "PYTHONPATH": path}, check=True, timeout=240
    )
    parts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    weight, inputs, texts, keys, valid = whole_batch()
    loss = alone(*embedded(weight, inputs, texts), keys, valid, torch.tensor([1.0]), torch.tensor([-1.0]))
    loss.backward()
    assert weight.grad is not None
    assert np.mean([part["loss"] for part in parts]) == pytest.approx(loss.item(), rel=1e-12)
    mean = np.mean([part["gradient"] for part in parts], axis=0)
    assert mean == pytest.approx(weight.grad.numpy(), rel=1e-9, abs=1e-12)


def whole_batch() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weight = unit(5, 3).clone().requires_grad_(True)
    valid = torch.tensor([True, True, True, False, True, False])
    return weight, unit(6, 4), unit(6, 5), torch.tensor([1, 2, 3, 4, 2, 6]), valid


def embedded(weight: Tensor, inputs: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    return functional.normalize(inputs @ weight, dim=-1), functional.normalize(texts @ weight.T, dim=-1)


def half_a_batch(folder: Path) -> None:
    """What one of two processes does in the test above."""
    from medvl_sam2.training.ranks import Ranks

    ranks = Ranks.join()
    mine = slice(3 * ranks.rank, 3 * ranks.rank + 3)
    weight, inputs, texts, keys, valid = whole_batch()
    images, words = embedded(weight, inputs[mine], texts[mine])
    pairs = Pairs(words, keys[mine], valid[mine])
    loss = siglip_loss(images, pairs, pairs.gathered(), torch.tensor([1.0]), torch.tensor([-1.0]))
    loss.backward()
    assert weight.grad is not None
    record = {"loss": loss.item(), "gradient": weight.grad.tolist()}
    (folder / f"{ranks.rank}.json").write_text(json.dumps(record))


def test_records_say_of_every_organ_what_the_report_knows(cases: list[LanguageCase]) -> None:
    for case in cases:
        record = record_of(case)
        assert record.reports == case.reports
        said = " ".join(region.sentence for region in record.regions)
        assert all(f"{finding.kind} in the {finding.location}" in said for finding in case.findings)
        assert len(record.regions) == sum(case.present(organ) for organ in ORGANS)
    some = GeneratedRecords(cases, told=3)
    assert [bool(record.reports) for record in some[:]] == [True, True, True, False]
    assert some[-1].regions == ()


def test_a_region_is_its_own_tokens() -> None:
    head = RegionHead(SMALL.vision, 6, stage=1)
    maps = [torch.rand(2, SMALL.vision.tokens(stage), SMALL.vision.channels[stage]) for stage in range(5)]
    d, h, w = head.grid
    cells = torch.zeros(2, d, h, w)
    cells[0, 0, :, 0] = 1
    cells[1, d - 1, 1, w - 1] = 0.2
    found = head(maps, torch.tensor([1, 0]), cells)
    near = maps[1][1].reshape(d, h, w, -1)[0, :, 0].mean(dim=0)
    far = maps[1][0].reshape(d, h, w, -1)[d - 1, 1, w - 1]
    wanted = functional.normalize(head.project(torch.stack([near, far])), dim=-1)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_hidden_blocks_are_hidden_and_only_they_are_asked_for() -> None:
    head, rng = Reconstruction(SMALL.vision, stage=1, side=2), np.random.default_rng(0)
    views = torch.rand(2, 1, *SMALL.vision.input_size)
    shown, hidden = head.hide(views, 0.5, rng)
    d, h, w = head.grid
    assert 0.2 < float(hidden.float().mean()) < 0.8
    voxels = hidden.reshape(2, 1, d, h, w)
    for axis, size in enumerate(views.shape[2:], start=2):
        voxels = voxels.repeat_interleave(size // voxels.shape[axis], dim=axis)
    assert torch.equal(shown[~voxels], views[~voxels])
    for row in range(2):
        assert torch.allclose(shown[row][voxels[row]], views[row].mean())
    # A read-out that says the truth everywhere costs nothing; an error at a token that was shown costs nothing either.
    truth = functional.adaptive_avg_pool3d(views, (2 * d, 2 * h, 2 * w))
    parts = truth.reshape(2, d, 2, h, 2, w, 2).permute(0, 1, 3, 5, 2, 4, 6).reshape(2, -1, 8)
    head.read = torch.nn.Identity()  # type: ignore[assignment]
    maps = [torch.empty(0), parts]
    assert float(head(maps, views, hidden)) == 0
    maps[1] = torch.where(hidden[..., None], parts, parts + 1)
    assert float(head(maps, views, hidden)) == 0
    maps[1] = torch.where(hidden[..., None], parts + 1, parts)
    assert float(head(maps, views, hidden)) == pytest.approx(1.0)


def test_long_texts_keep_their_first_sentence_and_their_order(tokenizer: Tokenizer) -> None:
    text = "The first one says where. " + " ".join(f"Sentence {n} says more." for n in range(2, 9))
    length = len(tokenizer.encode(text)) // 2
    for rng in (None, np.random.default_rng(1)):
        ids = text_batch(tokenizer, [text, "Short."], length, rng)
        assert ids.shape[0] == 2
        assert ids.shape[1] <= length
        assert ids[0, 0] == tokenizer.eos_id
        kept = tokenizer.decode(ids[0, 1:].tolist())
        assert kept.startswith("The first one says where.")
        numbers = [int(word) for word in kept.split() if word.isdigit()]
        assert numbers == sorted(numbers)
        assert len(numbers) >= 2
        assert tokenizer.decode(ids[1].tolist()) == "Short."


def test_padding_does_not_change_a_text(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    head = SiglipHead(SMALL.vision, HEAD, tokenizer.pad_id).eval()
    texts = ["The liver is normal.", "There is a cyst in the right kidney, and nothing else is to be seen."]
    together = head.embed_texts(text_batch(tokenizer, texts, 96))
    assert torch.allclose(together[:1], head.embed_texts(text_batch(tokenizer, texts[:1], 96)), atol=1e-6)
    assert torch.allclose(together.norm(dim=-1), torch.ones(2))


def figures_of(config: AlignmentStageConfig, tokenizer: Tokenizer, records: GeneratedRecords) -> set[str]:
    stage = stage_on(config, tokenizer, records)
    loss, figures = stage.loss(Draw(0, 0))
    assert bool(torch.isfinite(loss))
    return set(figures)


def test_every_loss_can_be_switched_and_needs_its_records(cases: list[LanguageCase], tokenizer: Tokenizer) -> None:
    told, untold = GeneratedRecords(cases), GeneratedRecords(cases, told=0)
    mixed = GeneratedRecords(cases, told=2)
    assert figures_of(CONFIG, tokenizer, told) == {"report", "organs"}
    assert figures_of(CONFIG, tokenizer, mixed) == {"report", "organs", "rebuilt"}
    assert figures_of(replace(CONFIG, organ_weight=0.0), tokenizer, mixed) == {"report", "rebuilt"}
    assert figures_of(replace(CONFIG, reconstruction_weight=0.0), tokenizer, mixed) == {"report", "organs"}
    stage = stage_on(CONFIG, tokenizer, untold)
    loss, figures = stage.loss(Draw(0, 0))
    assert figures["report"] == figures["organs"] == 0
    loss.backward()
    head = stage.module.alignment
    assert head.mm_vision_proj.weight.grad is None or not head.mm_vision_proj.weight.grad.any()
    with pytest.raises(DataError, match="no case to learn from"):
        stage_on(CONFIG, tokenizer, GeneratedRecords([]))


def test_stage_learns_pairs_by_heart_stops_and_goes_on(
    cases: list[LanguageCase], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    records = GeneratedRecords(cases)
    loop = TrainerConfig(steps=60, warmup=2, log_steps=5, schedule="constant")
    config = replace(CONFIG, organ_weight=0.2, trainer=loop)
    run = Trainer(stage_on(config, tokenizer, records), loop)
    run.run()
    chance = 4 * (math.log(4) - 0.75 * math.log(3))  # what the best constant answer costs: 4 of 16 pairs match
    assert run.history[0]["report"] > chance
    assert run.history[-1]["report"] < 0.9 * chance

    loop, straight = replace(loop, steps=4), stage_on(config, tokenizer, records)
    Trainer(straight, loop).run()
    for steps in (2, 4):
        stopped = stage_on(config, tokenizer, records, tmp_path)
        Trainer(stopped, replace(loop, steps=steps), tmp_path).run()
    whole, resumed = straight.module.state_dict(), stopped.module.state_dict()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    written = load_file(tmp_path / "alignment.safetensors")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in written.items())
    assert {name.split(".")[0] for name in written} == {"vision", "alignment"}


def test_a_run_knows_which_of_its_records_had_a_report(cases: list[LanguageCase], tokenizer: Tokenizer) -> None:
    def settings(told: int) -> dict[str, Any]:
        return stage_on(CONFIG, tokenizer, GeneratedRecords(cases, told)).settings()

    require_same(Path("state"), settings(3), settings(3))
    with pytest.raises(CheckpointError, match="begun with cases"):
        require_same(Path("state"), settings(3), settings(2))


def test_recall_is_the_share_of_own_texts_found(cases: list[LanguageCase], tokenizer: Tokenizer) -> None:
    model = learner(tokenizer)
    records = GeneratedRecords(cases)[:]
    scores = retrieval_scores(model, records)
    assert scores["chance_r1"] == 0.25
    assert scores["image_to_text_r5"] == scores["text_to_image_r10"] == 1.0  # four records
    vectors = torch.eye(4)[[1, 0, 2, 3]]  # the first two volumes are taken for one another
    found = iter(vectors)
    model.alignment.embed_volumes = lambda maps: next(found)[None]  # type: ignore[method-assign]
    model.alignment.embed_texts = lambda ids: torch.eye(4)  # type: ignore[method-assign]
    scores = retrieval_scores(model, records)
    assert scores["image_to_text_r1"] == scores["text_to_image_r1"] == 0.5
    found = iter(vectors)
    twins = [replace(record, reports=("Twins.",)) if n < 2 else record for n, record in enumerate(records)]
    scores = retrieval_scores(model, twins)
    assert scores["image_to_text_r1"] == scores["text_to_image_r1"] == 1.0
    assert scores["chance_r1"] == pytest.approx((0.5 + 0.5 + 0.25 + 0.25) / 4)
    with pytest.raises(DataError, match="no held-out record"):
        retrieval_scores(model, GeneratedRecords(cases, told=0)[:])


def test_shipped_settings_are_read_and_wrong_ones_named(tmp_path: Path) -> None:
    shipped = read_stage_config(
        Path(alignment_stage.__file__).parent / "stages" / "alignment.yaml", AlignmentStageConfig
    )
    assert shipped == AlignmentStageConfig()
    path = tmp_path / "stage.yaml"
    for text, said in (
        ("batches: 4", "no field 'batches'"),
        ("trainer: {stepz: 4}", "TrainerConfig has no field 'stepz'"),
        ("learning_rate: 1e-4", r"learning_rate must be float, got '1e-4'; write 1.0e-4"),
        ("trainer: {steps: 4, betas: [0.9]}", r"TrainerConfig.betas must hold 2 values, got 1: [0.9]"),
        ("trainer: {steps: 4, betas: [0.9, x]}", "TrainerConfig.betas must be float, got 'x'"),
        ("trainer: {steps: 4, schedule: linear}", "TrainerConfig.schedule must be"),
        ("batch: 1", "batch 1 must be at least 2"),
        ("data: 5", "AlignmentStageConfig.data must be AlignmentData, got 5"),
        ("a: [", "cannot be read as YAML"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=re.escape(said)):
            read_stage_config(path, AlignmentStageConfig)
    path.write_text("start: [weights]\ntrainer: {minutes: 1, betas: [0.9, 0.95]}")
    config = read_stage_config(path, AlignmentStageConfig)
    assert (config.start, config.trainer.minutes, config.trainer.betas) == ((Path("weights"),), 1.0, (0.9, 0.95))


@pytest.mark.slow
def test_the_command_trains_measures_and_goes_on(tmp_path: Path) -> None:
    settings = tmp_path / "stage.yaml"
    text = (
        "data: {{generated: 4, without_report: 1, held_out: 3}}\nbatch: 2\ntrainer: {{steps: {steps}, log_steps: 1}}\n"
    )
    for steps in (1, 2):
        settings.write_text(text.format(steps=steps))
        alignment_stage.main(["--config", str(settings), "--out", str(tmp_path / "run")])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert [entry["step"] for entry in metrics["history"]] == [1, 2]
    assert set(metrics["held_out"]) == {"before", "after"}
    assert {"loss", "report", "organs", "image_to_text_r1"} <= set(metrics["held_out"]["after"])
    assert (tmp_path / "run" / "alignment.safetensors").exists()
    model = load_image_text(tmp_path / "run" / "alignment")
    assert model.tokenizer is not None
    assert model.alignment.config.vocab_size == len(model.tokenizer)
    trained = load_file(tmp_path / "run" / "alignment.safetensors")
    assert torch.allclose(model.vision.s0[0][0].c1[0].weight, trained["vision.s0.0.0.c1.0.weight"], atol=1e-3)
