"""What the scene alignment learns from a micro-batch: reports against measured scenes, by the SigLIP loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medvl_sam2.config import AlignmentConfig, SceneSideConfig
from medvl_sam2.errors import ConfigError, DataError
from medvl_sam2.modeling.scene_text import SceneTextModel
from medvl_sam2.modeling.text_tower import text_batch
from medvl_sam2.training.alignment_learner import AlignmentData
from medvl_sam2.training.alignment_losses import Pairs, siglip_loss, text_keys
from medvl_sam2.training.case_feed import CaseFeed
from medvl_sam2.training.recall import equal_texts, hits
from medvl_sam2.training.run_settings import digest, plain_settings
from medvl_sam2.training.scene_records import SceneRecord, stack_scenes
from medvl_sam2.training.stage import Draw, ParameterGroup, Stage
from medvl_sam2.training.throughput import Work
from medvl_sam2.training.trainer import TrainerConfig


@dataclass(frozen=True)
class SceneAlignmentConfig:
    """Settings of the stage, one field for one of the YAML file."""

    start: Path | None = None
    """Checkpoint folder whose encoder and scene are measured with, and whose tokenizer is used; default: the shipped
    weights."""
    data: AlignmentData = field(default_factory=lambda: AlignmentData(generated=3000, held_out=300))
    head: AlignmentConfig = field(
        default_factory=lambda: AlignmentConfig(hidden_size=128, grams=5, scene=SceneSideConfig())
    )
    batch: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(steps=2400, warmup=90, tensorboard=True))

    def __post_init__(self) -> None:
        if self.batch < 2:
            raise ConfigError(f"batch {self.batch} must be at least 2: a pair needs another one to differ from")
        if self.head.scene is None:
            raise ConfigError("head.scene is missing; an encoder of its own is trained by the alignment stage")


def begin_bias(model: SceneTextModel, batch: int) -> None:
    """Start at the log-odds that one of ``batch`` texts matches: what the published -10 is for 32768 pairs."""
    with torch.no_grad():
        model.alignment.bias.fill_(-math.log(max(1, batch - 1)))


class SceneAlignmentStage(Stage):
    """Report pairs alone: what the encoder sees is fixed, so there is nothing else to learn from."""

    name, key = "scene alignment", "scene_alignment"

    def __init__(
        self,
        config: SceneAlignmentConfig,
        model: SceneTextModel,
        feed: CaseFeed[SceneRecord],
        world: int = 1,
    ) -> None:
        """``world``: processes that share a batch; a text of one is compared with the volumes of all."""
        self.config, self.feed, self._world = config, feed, world
        self._model = model.to(config.trainer.device).train()
        tokenizer, longest = model.tokenizer, model.alignment.config.max_length
        assert tokenizer is not None
        self._words = tokenizer
        self._ids = lru_cache(maxsize=1 << 17)(lambda text: text_batch(tokenizer, [text], longest)[0])

    @property
    def module(self) -> SceneTextModel:
        """Head and text tower."""
        return self._model

    def groups(self) -> list[ParameterGroup]:
        """Everything at one rate; temperatures, biases and norms are not pulled to zero."""
        decayed = [p for p in self._model.parameters() if p.ndim > 1]
        free = [p for p in self._model.parameters() if p.ndim <= 1]
        rate = self.config.learning_rate
        return [ParameterGroup(decayed, rate, self.config.weight_decay), ParameterGroup(free, rate)]

    def settings(self) -> dict[str, Any]:
        """The stage's numbers, its cases, the tokenizer and the scene that was measured with."""
        numbers = plain_settings(self.config, ("trainer", "data", "start"))
        head = plain_settings(self._model.alignment.config)
        return {**numbers, "head": head, "cases": self.feed.digest, "tokenizer": digest(self._words.to_json())}

    def shards(self) -> list[nn.Module]:
        """The text tower."""
        return [self._model.alignment.language_encoder]

    def loss(self, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        """One wording of every report against all scenes of the batch; records without a report take no part."""
        number, size = draw.step * draw.count + draw.number, self.config.batch
        records = self.feed.cases(number * size, size)
        rng = draw.rng(purpose=2)
        texts = [str(rng.choice(np.array(record.reports))) if record.reports else "" for record in records]
        valid = torch.tensor([bool(record.reports) for record in records])
        device, head = self.config.trainer.device, self._model.alignment
        scenes = stack_scenes(records).to(device)
        rows = [self._ids(text) for text in texts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._words.pad_id).to(device)
        own = Pairs(head.embed_texts(ids), text_keys(texts).to(device), valid.to(device))
        others = own.gathered() if self._world > 1 else own
        loss = siglip_loss(head.embed_scenes(scenes), own, others, head.t_prime, head.bias)
        self.work = Work(samples=size)
        return loss, {"report": loss.item()}


@torch.no_grad()
def scene_retrieval(model: SceneTextModel, records: list[SceneRecord]) -> dict[str, float]:
    """Recall at 1, 5 and 10 over the ``records`` that have a report (its first wording), equal reports all right.

    Names and rules are those of :func:`~medvl_sam2.training.alignment_metrics.retrieval_scores`. Raises
    :class:`DataError` when no record has a report.
    """
    told = [record for record in records if record.reports]
    if not told:
        raise DataError("no held-out record has a report; hold out some that do")
    model.eval()
    device = model.alignment.t_prime.device
    images = model.embed_scenes(stack_scenes(told).to(device))
    reports = [record.reports[0] for record in told]
    cosines = (images @ model.embed_texts(reports).T).cpu().numpy()
    right = equal_texts(reports)
    return {
        f"{name}_r{depth}": float(hits(matrix, right, depth).mean())
        for name, matrix in (("image_to_text", cosines), ("text_to_image", cosines.T))
        for depth in (1, 5, 10)
    }
