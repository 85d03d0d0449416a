"""The unified model under finetuning: which weights move, and what one step is.

Trained: mask decoder, memory attention and memory encoder of the segmenter, LoRA adapters on the language model, and
the projector of its ``[SEG]`` state. Frozen: both image encoders, the prompt encoder and the language model itself.

One step draws windows with simulated boxes, clicks and rough masks, and in turn a stack of slices (memory) or whole
slices of one volume asked for by name; the names go through the language model, so its adapters learn from the masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from medvl_sam2.checkpoint import (
    ALIGNMENT_FOLDER,
    TOKENIZER_FILE,
    CheckpointMeta,
    load_checkpoint,
    load_into,
    save_checkpoint,
)
from medvl_sam2.modeling.compute import Precision
from medvl_sam2.modeling.lora import add_lora, merge_lora
from medvl_sam2.modeling.prompts import SEGMENT_PROMPTS, segment_prompt, segment_reply
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.unified import UnifiedModel, language_view
from medvl_sam2.predictor.predictor import Predictor
from medvl_sam2.synthesis.case import generate_case
from medvl_sam2.training.finetune import FinetuneBackend, FinetuneData, FinetuneStage
from medvl_sam2.training.finetune_records import FinetuneConfig
from medvl_sam2.training.samples import CONCEPTS, LabelledVolume
from medvl_sam2.training.segmentation_steps import SegmentationLearner, SegmentationSteps
from medvl_sam2.training.slice_batches import SliceSampler
from medvl_sam2.training.stage import Draw, ParameterGroup, Run
from medvl_sam2.training.volume_sources import from_case
from medvl_sam2.vocabulary import spoken

_FROZEN_PARTS = ("sam2.image_encoder.", "sam2.sam_prompt_encoder.", "sam2.sam_mask_decoder.conv_s")
"""``conv_s0`` and ``conv_s1`` belong to encoding: moving them would outdate cached slices."""


@dataclass(frozen=True)
class StepSize:
    """Rows of one step: windows, stacks of ``clip_length`` slices, whole slices with ``concepts`` names each."""

    windows: int = 8
    clips: int = 3
    clip_length: int = 5
    whole_slices: int = 4
    concepts: int = 4
    held_out: int = 4
    """Draws of the held-out volumes in every validation."""


def spoken_concept(concept: int) -> str:
    """What a person says for a concept: ``right kidney``, ``lesion in the liver``."""
    name = CONCEPTS[concept]
    inside = name.removeprefix("lesion_in_")
    return spoken(name) if inside == name else f"lesion in the {spoken(inside)}"


class LanguageTokens(nn.Module):
    """Concepts to sparse prompts, by the language model's ``[SEG]`` state on one volume.

    Stands where pretraining has a table of stand-in tokens. Without a volume (windows of many volumes at once) it gives
    the language model's mean token of each concept, as a constant that an interrupted training takes along.
    """

    table: Tensor

    def __init__(self, model: UnifiedModel, rng: np.random.Generator) -> None:
        """``rng`` picks the wording of each request."""
        super().__init__()
        self._model = (model,)  # in a tuple: the model is not a part of this module
        self.rng = rng
        self._volume: Tensor | None = None
        self.register_buffer("table", torch.zeros(len(CONCEPTS), model.config.slices.d_model))

    def on(self, image_tokens: Tensor | None) -> None:
        """Speak about the volume with these image tokens (1, n, H); None: about no volume in particular."""
        self._volume = image_tokens

    @torch.no_grad()
    def fill_table(self, volumes: Sequence[Tensor]) -> None:
        """Mean token of every concept over the given volumes' image tokens."""
        everything = list(range(len(CONCEPTS)))
        # Autocast would keep weights it casts here, without their gradients, for the rest of the step.
        with torch.autocast(self.table.device.type, enabled=False):
            self.table.copy_(torch.stack([self._spoken(v, everything, vary=False) for v in volumes]).mean(dim=0))

    def forward(self, concepts: Tensor) -> Tensor:
        """Concept indices (K,) to tokens (K, d_model)."""
        if self._volume is None:
            return self.table[concepts]
        unique, where = torch.unique(concepts, return_inverse=True)
        return self._spoken(self._volume, unique.tolist(), vary=True)[where]

    def _spoken(self, image_tokens: Tensor, concepts: Sequence[int], vary: bool) -> Tensor:
        names = [spoken_concept(concept) for concept in concepts]
        pick = self.rng.integers(len(SEGMENT_PROMPTS), size=len(names)) if vary else np.zeros(len(names), dtype=int)
        requests = [segment_prompt([name], SEGMENT_PROMPTS[int(n)]) for name, n in zip(names, pick, strict=True)]
        replies = [segment_reply([name], [True]) for name in names]
        return self._model[0].language.seg_tokens(image_tokens, requests, replies)


class _Rows:
    """Volumes that rows are drawn from, and what the language model sees of them: ``views`` (1, n, H) each."""

    def __init__(
        self, volumes: Sequence[LabelledVolume], weights: Sequence[float], views: Sequence[Tensor], size: int
    ) -> None:
        self.sampler, self.views = SliceSampler(volumes, weights, 0, size), views
        named = [n for n, volume in enumerate(volumes) if any(target.concept is not None for target in volume.targets)]
        self.by_name = [(SliceSampler([volumes[n]], [1.0], 0, size), views[n]) for n in named]
        chance = np.array([weights[n] for n in named])
        self.chance = chance / chance.sum()


class UnifiedStage(FinetuneStage):
    """Finetunes a checkpoint of the unified model."""

    def __init__(self, base: Path, config: FinetuneConfig, data: FinetuneData, size: StepSize | None = None) -> None:
        """Load ``base``, freeze what does not move, and look at every volume once."""
        super().__init__(config, data)
        self._base, self._size = base, size or StepSize()
        self.model = self._adapted().to(config.place)
        self._rng = np.random.default_rng(config.seed)
        self._tokens = LanguageTokens(self.model, self._rng).to(config.place)
        self._module = nn.ModuleDict({"model": self.model, "tokens": self._tokens})
        learner = SegmentationLearner(self.model.segmenter)
        learner.concept_tokens = self._tokens  # type: ignore[assignment]
        self._steps = SegmentationSteps(learner, config.seed)
        uniform = [1.0] * len(data.held_out)
        self._training, self._held_out = self._rows(data.volumes, data.weights), self._rows(data.held_out, uniform)
        self._drawn = self._training

    @property
    def module(self) -> nn.ModuleDict:
        """The model with its adapters, and the mean tokens."""
        return self._module

    def groups(self) -> list[ParameterGroup]:
        """Everything that moves at one rate."""
        moving = [p for p in self.model.parameters() if p.requires_grad]
        return [ParameterGroup(moving, self.config.learning_rate, 0.01)]

    def shards(self) -> list[nn.Module]:
        """The layers of the language model."""
        return list(self.model.language.lm.model.layers)

    def loss(self, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        """Windows every time; in turn a stack of slices or whole slices by name."""
        size, rows, sampler = self._size, self._drawn, self._drawn.sampler
        self._rng, self._steps.rng, sampler.rng = (draw.rng(purpose) for purpose in (2, 3, 4))
        self._tokens.rng = self._rng
        if rows is self._training and draw.step % self.config.steps_per_epoch == 0:
            self._tokens.fill_table(rows.views[-6:])  # once an epoch: the adapters move the tokens
        self._tokens.on(None)
        windows = [sampler.window() for _ in range(size.windows)]
        figures: dict[str, float] = {}
        rounds = int(self._rng.integers(0, 4))
        loss, figures["window"], figures["clicked"] = self._steps.window_loss(windows, rounds)
        if draw.step % 2 == 0 or not rows.by_name:
            clips = [sampler.window(size.clip_length) for _ in range(size.clips)]
            more, figures["tracked"] = self._steps.memory_loss(clips)
        else:
            more, figures["named"] = self._named_loss(rows, draw)
        return loss + more, figures

    def validate(self, run: Run) -> dict[str, float]:
        """``held_out_loss`` of rows of the held-out patients, the same ones every time."""
        if not self.data.held_out:
            return {}
        self._drawn = self._held_out
        try:
            losses = [run.measure(Draw(self.config.seed, step))["loss"] for step in range(self._size.held_out)]
        finally:
            self._drawn = self._training
        return {"held_out_loss": float(np.mean(losses))}

    def export(self, directory: Path, meta: CheckpointMeta, weights: Mapping[str, Tensor]) -> None:
        """The model with its adapters merged, as a checkpoint like any other."""
        model = self._adapted()
        load_into(model, {n.removeprefix("model."): w for n, w in weights.items() if n.startswith("model.")})
        merge_lora(model.language.lm)
        save_checkpoint(
            directory, model.state_dict(), model.config, self._base / TOKENIZER_FILE, meta, overwrite=True,
            alignment=self._base / ALIGNMENT_FOLDER,
        )  # fmt: skip

    def _adapted(self) -> UnifiedModel:
        """The base with untrained adapters on its language model; only what is trained has ``requires_grad`` on."""
        checkpoint = load_checkpoint(self._base)
        torch.manual_seed(self.config.seed)
        model = UnifiedModel(checkpoint.config, Tokenizer.load(checkpoint.tokenizer_path))
        load_into(model, checkpoint.state)
        model.eval()
        model.segmenter.train()
        model.language.lm.train()  # it has no dropout; only in this mode it can be checkpointed
        add_lora(model.language.lm, checkpoint.config.language.lora_rank, checkpoint.config.language.lora_alpha)
        for name, parameter in model.named_parameters():
            inside = name.removeprefix("segmenter.")
            segmenter = inside != name and not inside.startswith(_FROZEN_PARTS)
            adapter = ".lora_a" in name or ".lora_b" in name or name.startswith("language.seg_projector.")
            parameter.requires_grad_(segmenter or adapter)
        return model

    def _named_loss(self, rows: _Rows, draw: Draw) -> tuple[Tensor, float]:
        sampler, tokens = rows.by_name[int(self._rng.choice(len(rows.chance), p=rows.chance))]
        sampler.rng = draw.rng(5)
        self._tokens.on(tokens)
        slices = [sampler.whole_slice(self._size.concepts) for _ in range(self._size.whole_slices)]
        return self._steps.named_loss(slices, dense_weight=0.0)

    @torch.no_grad()
    def _rows(self, volumes: Sequence[LabelledVolume], weights: Sequence[float]) -> _Rows:
        """Views are the global view's image tokens, as the predictor computes them."""
        config, place, views = self.model.config, self.config.place, []
        for one in volumes:
            view, extent = language_view(one.image, one.spacing, one.modality, config.vision.input_size)
            views.append(self.model.language.encode_image(view.to(place), extent.to(place)))
        return _Rows(volumes, weights, views, config.slices.image_size)


def default_backend(device: str = "auto", precision: Precision = "auto") -> FinetuneBackend:
    """The shipped model code: the unified model's stage, the predictor as it is served, the generator.

    ``device`` and ``precision`` are those that served masks are computed with.
    """
    predictor = partial(Predictor.load, device=device, precision=precision)
    return FinetuneBackend(UnifiedStage, predictor, generate_case, from_case)
