"""What the alignment stage learns from a micro-batch: report pairs, organ pairs, and what was hidden of a volume.

Everything that is random about a case comes from its number in the run, so processes that share a batch learn what one
process with all of it would (but for the running statistics of the encoder's norms, which each takes of its own part).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medvl_sam2.config import AlignmentConfig, ModelConfig
from medvl_sam2.errors import ConfigError
from medvl_sam2.modeling.siglip import ImageTextModel, SiglipHead
from medvl_sam2.modeling.text_tower import text_batch
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.training.alignment_losses import Pairs, Reconstruction, RegionHead, siglip_loss, text_keys
from medvl_sam2.training.alignment_records import AlignmentRecord
from medvl_sam2.training.case_feed import CaseFeed
from medvl_sam2.training.language_batches import stack_views
from medvl_sam2.training.manifest_feed import FeedConfig
from medvl_sam2.training.run_settings import digest, plain_settings
from medvl_sam2.training.stage import Draw, ParameterGroup, Run, Stage
from medvl_sam2.training.throughput import Work
from medvl_sam2.training.trainer import TrainerConfig
from medvl_sam2.training.trainer_state import write_tensors

FINE_STAGE = 1
"""Stage of the encoder whose tokens organs are pooled from and hidden blocks are predicted from."""

_Row = tuple[AlignmentRecord, np.random.Generator]


@dataclass(frozen=True)
class AlignmentData(FeedConfig):
    """Where the cases come from: a manifest, whose validation side is held out, or else the generator.

    Generated cases lie in ``cache`` (default: that folder of the run), shared with the language phase.
    """

    manifest: Path | None = None
    generated: int = 600
    """Generated cases with a report; they count from seed 0 on."""
    without_report: int = 0
    """Further ones whose report is withheld."""


@dataclass(frozen=True)
class AlignmentStageConfig:
    """Settings of the stage, one field for one of the YAML file."""

    preset: str = "tiny"
    """Its volume encoder is trained."""
    start: tuple[Path, ...] = ()
    """What to begin with, later ones over earlier ones: see :mod:`medvl_sam2.training.stage_start`."""
    data: AlignmentData = field(default_factory=AlignmentData)
    head: AlignmentConfig = field(default_factory=AlignmentConfig)
    """Text tower and shared space; those of a start that has them count."""
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


class AlignmentLearner(ImageTextModel):
    """The image-text model with the heads that only training needs."""

    tokenizer: Tokenizer

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, batch: int, organs: int) -> None:
        """``batch`` reports and ``organs`` sentences meet in one step, over all processes.

        The biases start at the log-odds that two of them match: that is what the published -10 is for 32768 pairs.
        """
        super().__init__(config, tokenizer)
        self.organs = RegionHead(config.vision, self.alignment.config.width, FINE_STAGE)
        self.rebuild = Reconstruction(config.vision, FINE_STAGE)
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
        feed: CaseFeed[AlignmentRecord],
        out: Path | None = None,
        world: int = 1,
    ) -> None:
        """``world``: processes that share a batch; a text of one is compared with the volumes of all."""
        self.config, self.feed, self.out, self._world = config, feed, out, world
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
        """The stage's numbers, its cases and the tokenizer."""
        numbers = plain_settings(self.config, ("trainer", "data", "start"))
        return {**numbers, "cases": self.feed.digest, "tokenizer": digest(self._learner.tokenizer.to_json())}

    def shards(self) -> list[nn.Module]:
        """Stages of the encoder and the text tower."""
        vision = self._learner.vision
        return [vision.s1, vision.s2, vision.s3, vision.s4, self._learner.alignment.language_encoder]

    def loss(self, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        """One pass of the encoder; records without a report are shown with hidden blocks."""
        config, learner, device = self.config, self._learner, self.config.trainer.device
        number, size = draw.step * draw.count + draw.number, config.batch
        records = self.feed.cases(number * size, size, (number + self._world) * size)
        rngs = [np.random.default_rng([draw.seed, number * size + row]) for row in range(size)]
        rows = list(zip(records, rngs, strict=True))
        views = torch.cat([stack_views([record], rng)[0] for record, rng in rows]).to(device)
        told = torch.tensor([bool(record.reports) for record in records], device=device)
        veiled = torch.tensor([self._veiled(record, rng) for record, rng in rows], device=device)
        blocks = [learner.rebuild.hide(views[n : n + 1], config.hidden_share, rng) for n, rng in enumerate(rngs)]
        obscured, hidden = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        self.work = Work(samples=size)
        maps = learner.vision(torch.where(veiled[:, None, None, None, None], obscured, views))
        loss = self._report_loss(maps, rows, told)
        figures = {"report": loss.item()}
        if config.organ_weight:
            organs = self._organ_loss(maps, rows, ~veiled)
            figures["organs"] = organs.item()
            loss = loss + config.organ_weight * organs
        if config.reconstruction_weight:  # also where nothing is hidden: all processes then share the same gradients
            rebuilt = learner.rebuild(maps, views, hidden & veiled[:, None], shared=self._world > 1)
            if bool(veiled.any()):
                figures["rebuilt"] = rebuilt.item()
            loss = loss + config.reconstruction_weight * rebuilt
        return loss, figures

    def saved(self, run: Run) -> None:
        """Write ``alignment.safetensors``: encoder and head, by the names they have in :class:`ImageTextModel`."""
        weights = run.weights()
        if self.out is not None and run.ranks.first:
            kept = {name: w for name, w in weights.items() if name.startswith(("vision.", "alignment."))}
            write_tensors(self.out / "alignment.safetensors", kept)

    def _veiled(self, record: AlignmentRecord, rng: np.random.Generator) -> bool:
        """Whether a record is shown with hidden blocks: one without any text always, one with masks every other time.

        An organ behind a hidden block has no tokens of its own to learn from.
        """
        every_other = rng.random() < 0.5
        if record.reports or not self.config.reconstruction_weight:
            return False
        return every_other or not (record.regions and self.config.organ_weight)

    def _report_loss(self, maps: list[Tensor], rows: Sequence[_Row], told: Tensor) -> Tensor:
        texts = [str(rng.choice(np.array(r.reports))) if r.reports else "" for r, rng in rows]
        head = self._learner.alignment
        return self._pair_loss(head.embed_volumes(maps), texts, told, [rng for _, rng in rows], head)

    def _organ_loss(self, maps: list[Tensor], rows: Sequence[_Row], shown: Tensor) -> Tensor:
        """Up to ``regions`` organs of every record that shows them; the other places are empty and take no part."""
        count, head = self.config.regions, self._learner.organs
        sentences, valid = [""] * (len(rows) * count), torch.zeros(len(rows) * count, dtype=torch.bool)
        cells = torch.zeros(len(valid), *head.grid)
        for row, (record, rng) in enumerate(rows):
            chosen = rng.permutation(len(record.regions))[:count] if shown[row] else ()
            for place, number in enumerate(chosen, start=row * count):
                region = record.regions[int(number)]
                grid = torch.from_numpy(region.cells.astype(np.float32))[None, None]
                cells[place] = nn.functional.adaptive_avg_pool3d(grid, head.grid)[0, 0]
                sentences[place], valid[place] = region.sentence, True
        numbers = torch.arange(len(rows), device=shown.device).repeat_interleave(count)
        images = head(maps, numbers, cells.to(shown.device))
        rngs = [rng for _, rng in rows for _ in range(count)]
        return self._pair_loss(images, sentences, valid.to(shown.device), rngs, head)

    def _pair_loss(
        self,
        images: Tensor,
        texts: Sequence[str],
        valid: Tensor,
        rngs: Sequence[np.random.Generator],
        scale: SiglipHead | RegionHead,
    ) -> Tensor:
        """SigLIP loss of ``images`` (n, width) and their texts, at the temperature and bias of ``scale``."""
        head, words = self._learner.alignment, self._learner.tokenizer
        longest = head.config.max_length
        rows = [text_batch(words, [text], longest, rng)[0] for text, rng in zip(texts, rngs, strict=True)]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=words.pad_id).to(valid.device)
        own = Pairs(head.embed_texts(ids), text_keys(texts).to(valid.device), valid)
        others = own.gathered() if self._world > 1 else own
        return siglip_loss(images, own, others, scale.t_prime, scale.bias)
