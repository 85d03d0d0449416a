"""Alignment stage: SigLIP pretraining of the volume encoder with a text tower, from volumes and reports.

Run ``python -m medvl_sam2.training.alignment_stage --config FILE --out RUN`` (under ``torchrun`` for several
processes) to write ``alignment.safetensors`` (where later stages take the encoder from), ``metrics.json`` and the
folder ``alignment``: a copy of it in a checkpoint folder gives that retrieval and :meth:`Predictor.embed_volume`.
An interrupted run goes on when it is started again. ``training/stages/alignment.yaml`` explains the settings.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medvl_sam2.checkpoint import ALIGNMENT_FOLDER, CheckpointMeta, save_checkpoint
from medvl_sam2.config import AlignmentConfig, ModelConfig
from medvl_sam2.errors import ConfigError, DataError
from medvl_sam2.files import write_json_atomically
from medvl_sam2.modeling.dcformer import DCFormer
from medvl_sam2.modeling.siglip import ImageTextModel, SiglipHead
from medvl_sam2.modeling.text_tower import text_batch
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.partial_weights import load_encoder, load_image_text, load_part, read_weights
from medvl_sam2.training.alignment_losses import Pairs, Reconstruction, RegionHead, siglip_loss, text_keys
from medvl_sam2.training.alignment_metrics import alignment_scores
from medvl_sam2.training.alignment_records import AlignmentRecord, GeneratedRecords
from medvl_sam2.training.corpus import build_tokenizer
from medvl_sam2.training.language_batches import stack_views
from medvl_sam2.training.language_data import CaseStore
from medvl_sam2.training.ranks import Ranks
from medvl_sam2.training.run_settings import digest, plain_settings
from medvl_sam2.training.stage import Draw, ParameterGroup, Run, Stage
from medvl_sam2.training.stage_config import read_stage_config
from medvl_sam2.training.throughput import Work
from medvl_sam2.training.trainer import Trainer, TrainerConfig
from medvl_sam2.training.trainer_state import write_tensors
from medvl_sam2.training.volume_sources import HELD_OUT_SEED

_FINE_STAGE = 1
"""Stage of the encoder whose tokens organs are pooled from and hidden blocks are predicted from."""
_WORDINGS = 6
_SURVEYED = 200
"""So many cases, from the first seed on, are read through for the tokenizer."""


@dataclass(frozen=True)
class AlignmentData:
    """Generated cases; training counts from seed 0 on."""

    generated: int = 600
    without_report: int = 0
    held_out: int = 50
    cache: Path | None = None
    """Folder of prepared cases, shared with the language phase; default: ``cache`` in the run's folder."""


@dataclass(frozen=True)
class AlignmentStageConfig:
    """Settings of the stage, one field for one of the YAML file."""

    data: AlignmentData = field(default_factory=AlignmentData)
    head: AlignmentConfig = field(default_factory=AlignmentConfig)
    start: Path | None = None
    """Where the stage takes its volume encoder from, and its tokenizer if there is one: a checkpoint folder or a
    converted part; None: from scratch."""
    batch: int = 8
    learning_rate: float = 5e-4
    weight_decay: float = 0.1
    organ_weight: float = 0.5
    regions: int = 4
    reconstruction_weight: float = 1.0
    hidden_share: float = 0.5
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(steps=1200, warmup=36, tensorboard=True))

    def __post_init__(self) -> None:
        if self.batch < 2:
            raise ConfigError(f"batch {self.batch} must be at least 2: a pair needs another one to differ from")
        if self.organ_weight < 0 or self.reconstruction_weight < 0 or self.regions < 1:
            raise ConfigError(
                f"organ_weight {self.organ_weight} and reconstruction_weight {self.reconstruction_weight} must not be "
                f"negative, regions {self.regions} at least 1"
            )
        if not 0 < self.hidden_share < 1:
            raise ConfigError(f"hidden_share {self.hidden_share} must lie between 0 and 1")


class AlignmentLearner(nn.Module):
    """Encoder and SigLIP head, with the heads that only training needs."""

    def __init__(self, model: ModelConfig, head: AlignmentConfig, batch: int, organs: int, pad_id: int = 0) -> None:
        """``batch`` reports and ``organs`` sentences meet in one step, over all processes.

        The biases start at the log-odds that two of them match: that is what the published -10 is for 32768 pairs.
        """
        super().__init__()
        self.vision = DCFormer(model.vision)
        self.alignment = SiglipHead(model.vision, head, pad_id)
        self.organs = RegionHead(model.vision, head.width, _FINE_STAGE)
        self.rebuild = Reconstruction(model.vision, _FINE_STAGE)
        with torch.no_grad():
            self.alignment.bias.fill_(-math.log(max(1, batch - 1)))
            self.organs.bias.fill_(-math.log(max(1, organs - 1)))


class AlignmentStage(Stage):
    """Report pairs, organ pairs and reconstruction, each of them only where a record has what it needs."""

    name, key = "alignment stage", "alignment"

    def __init__(
        self,
        config: AlignmentStageConfig,
        learner: AlignmentLearner,
        tokenizer: Tokenizer,
        records: Sequence[AlignmentRecord],
        out: Path | None = None,
    ) -> None:
        """Raises :class:`DataError` without records."""
        if not records:
            raise DataError("the alignment stage got no record; generate or load at least one")
        self.config, self.tokenizer, self.records, self.out = config, tokenizer, records, out
        self._learner = learner.to(config.trainer.device).train()

    @property
    def module(self) -> AlignmentLearner:
        """Encoder and all heads."""
        return self._learner

    def groups(self) -> list[ParameterGroup]:
        """Everything at one rate; temperatures, biases and norms are not pulled to zero."""
        decayed = [p for p in self._learner.parameters() if p.ndim > 1]
        free = [p for p in self._learner.parameters() if p.ndim <= 1]
        rate = self.config.learning_rate
        return [ParameterGroup(decayed, rate, self.config.weight_decay), ParameterGroup(free, rate)]

    def settings(self) -> dict[str, Any]:
        """The stage's numbers, how many records there are with and without a report, and the tokenizer."""
        numbers = plain_settings(self.config, ("trainer", "data", "start"))
        data = {"generated": self.config.data.generated, "without_report": self.config.data.without_report}
        words = digest(self.tokenizer.to_json())
        return {**numbers, "data": data, "records": len(self.records), "tokenizer": words}

    def shards(self) -> list[nn.Module]:
        """Stages of the encoder and the text tower."""
        vision = self._learner.vision
        return [vision.s1, vision.s2, vision.s3, vision.s4, self._learner.alignment.language_encoder]

    def loss(self, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        """One pass of the encoder; records without a report are shown with hidden blocks."""
        config, learner, rng = self.config, self._learner, draw.rng()
        numbers = rng.choice(len(self.records), size=config.batch, replace=len(self.records) < config.batch)
        records = [self.records[int(number)] for number in numbers]
        views = stack_views(records, rng)[0].to(config.trainer.device)
        told = torch.tensor([bool(record.reports) for record in records], device=views.device)
        obscured, hidden = learner.rebuild.hide(views, config.hidden_share, rng)
        hidden = hidden & ~told[:, None]
        self.work = Work(samples=config.batch)
        maps = learner.vision(torch.where(told[:, None, None, None, None], views, obscured))
        loss = self._report_loss(maps, records, told, rng)
        figures = {"report": loss.item()}
        if config.organ_weight:
            organs = self._organ_loss(maps, records, told, rng)
            figures["organs"] = organs.item()
            loss = loss + config.organ_weight * organs
        if config.reconstruction_weight and bool(hidden.any()):
            rebuilt = learner.rebuild(maps, views, hidden)
            figures["rebuilt"] = rebuilt.item()
            loss = loss + config.reconstruction_weight * rebuilt
        return loss, figures

    def saved(self, run: Run) -> None:
        """Write ``alignment.safetensors``: encoder and head, by the names they have in :class:`ImageTextModel`."""
        weights = run.weights()
        if self.out is not None and run.ranks.first:
            kept = {name: w for name, w in weights.items() if name.startswith(("vision.", "alignment."))}
            write_tensors(self.out / "alignment.safetensors", kept)

    def _report_loss(
        self, maps: list[Tensor], records: Sequence[AlignmentRecord], told: Tensor, rng: np.random.Generator
    ) -> Tensor:
        texts = [str(rng.choice(np.array(r.reports))) if r.reports else "" for r in records]
        head = self._learner.alignment
        images = head.embed_volumes(maps)
        pairs = self._pairs(texts, told, rng)
        return siglip_loss(images, pairs, pairs.gathered(), head.t_prime, head.bias)

    def _organ_loss(
        self, maps: list[Tensor], records: Sequence[AlignmentRecord], told: Tensor, rng: np.random.Generator
    ) -> Tensor:
        """Up to ``regions`` organs of every record that shows them; the other rows are empty and take no part."""
        count, head = self.config.regions, self._learner.organs
        sentences, valid = [""] * (len(records) * count), torch.zeros(len(records) * count, dtype=torch.bool)
        cells = torch.zeros(len(valid), *head.grid)
        for row, record in enumerate(records):
            if record.reports:
                chosen = rng.permutation(len(record.regions))[:count]
                for place, number in enumerate(chosen, start=row * count):
                    region = record.regions[int(number)]
                    grid = torch.from_numpy(region.cells.astype(np.float32))[None, None]
                    cells[place] = nn.functional.adaptive_avg_pool3d(grid, head.grid)[0, 0]
                    sentences[place], valid[place] = region.sentence, True
        rows = torch.arange(len(records), device=told.device).repeat_interleave(count)
        valid = valid.to(told.device)
        images = head(maps, rows, cells.to(told.device))
        pairs = self._pairs(sentences, valid, rng)
        return siglip_loss(images, pairs, pairs.gathered(), head.t_prime, head.bias)

    def _pairs(self, texts: Sequence[str], valid: Tensor, rng: np.random.Generator) -> Pairs:
        head = self._learner.alignment
        ids = text_batch(self.tokenizer, texts, head.config.max_length, rng)
        return Pairs(head.embed_texts(ids.to(valid.device)), text_keys(texts).to(valid.device), valid)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train on generated cases, measure before and after on held-out ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shipped = Path(__file__).parent / "stages" / "alignment.yaml"
    parser.add_argument("--config", type=Path, default=shipped, help="YAML file; the shipped one by default")
    parser.add_argument("--out", type=Path, required=True, help="folder for the result and the resumable state")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    config, out = read_stage_config(options.config, AlignmentStageConfig), options.out
    torch.set_num_threads(options.threads)
    ranks = Ranks.join(config.trainer.device)
    preset, data = ModelConfig.tiny(), config.data
    cache = data.cache or out / "cache"
    cases = CaseStore(range(data.generated + data.without_report), preset.vision, cache, wordings=_WORDINGS)
    records: Sequence[AlignmentRecord] = GeneratedRecords(cases, data.generated)
    if config.start is None or not (config.start / "tokenizer.json").exists():
        tokenizer = build_tokenizer(cases[: min(_SURVEYED, data.generated)], config.head.vocab_size)
    else:
        tokenizer = Tokenizer.load(config.start / "tokenizer.json")
    head = replace(config.head, vocab_size=len(tokenizer))

    def begun() -> AlignmentLearner:
        torch.manual_seed(config.trainer.seed)
        batch = config.batch * ranks.world
        learner = AlignmentLearner(preset, head, batch, batch * config.regions, tokenizer.pad_id)
        if config.start is not None:
            load_encoder(learner.vision, config.start)
        return learner

    stage = AlignmentStage(config, begun(), tokenizer, records, out)
    trainer = Trainer(stage, config.trainer, out)
    if ranks.first:
        tokenizer.save(out / "tokenizer.json")
    progress = trainer.run()
    if not ranks.first:
        return
    seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + data.held_out)
    held_out = GeneratedRecords(CaseStore(seeds, preset.vision, cache))[:]
    learner = begun()
    scores = {"before": alignment_scores(learner.vision, learner.alignment, tokenizer, held_out, config.batch)}
    trained = ImageTextModel(replace(preset, alignment=head), tokenizer)
    result, place = out / "alignment.safetensors", out / ALIGNMENT_FOLDER
    load_part(trained, read_weights(result), result)
    meta = CheckpointMeta("alignment", "0", f"Image-text model after {progress.step} steps.")
    save_checkpoint(place, trained.state_dict(), trained.config, out / "tokenizer.json", meta, overwrite=True)
    stored = load_image_text(place)  # what is scored is what is stored, in half precision
    scores["after"] = alignment_scores(stored.vision, stored.alignment, tokenizer, held_out, config.batch)
    meta = replace(meta, metrics=scores["after"])
    save_checkpoint(place, stored.state_dict(), stored.config, out / "tokenizer.json", meta, overwrite=True)
    metrics = {"steps": progress.step, "seconds": progress.seconds, "held_out_cases": data.held_out, "held_out": scores}
    write_json_atomically(out / "metrics.json", {**metrics, "history": trainer.history, "config": _plain(config)})
    print(json.dumps(metrics, indent=2))


def _plain(config: AlignmentStageConfig) -> object:
    return json.loads(json.dumps(asdict(config), default=str))


if __name__ == "__main__":
    main()
