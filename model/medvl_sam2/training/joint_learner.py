"""What the joint stage learns from a micro-batch of cases: texts, masks from words, and masks from clicks.

The ``[SEG]`` states of the same pass that learns the texts prompt the slices. A model with a scene learns masks in
windows that the scene located, and what to point at; one without learns them on whole slices, and which slices show
what is meant (Med-2E3). Both image encoders and the scene's map stay frozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from medvl_sam2.checkpoint import CheckpointMeta, save_checkpoint
from medvl_sam2.errors import ConfigError
from medvl_sam2.modeling.lora import add_lora, merged_state
from medvl_sam2.modeling.scene_pointer import scene_elements
from medvl_sam2.modeling.unified import GlobalLook, UnifiedModel
from medvl_sam2.training.case_feed import CaseFeed
from medvl_sam2.training.corpus import SegTarget
from medvl_sam2.training.language_batches import PackedBatch, pack, stack_views
from medvl_sam2.training.manifest_feed import FeedConfig
from medvl_sam2.training.pointing import pointing_loss
from medvl_sam2.training.run_settings import digest, plain_settings
from medvl_sam2.training.samples import LabelledVolume, Target
from medvl_sam2.training.scene_looks import SceneLooks
from medvl_sam2.training.segmentation_steps import SegmentationLearner, SegmentationSteps
from medvl_sam2.training.slice_batches import SliceSampler
from medvl_sam2.training.spoken_masks import SpokenRow, sheet_loss, spoken_rows_loss
from medvl_sam2.training.stage import Draw, ParameterGroup, Run, Stage
from medvl_sam2.training.taught_cases import TaughtCase
from medvl_sam2.training.taught_texts import Shares, draw_tasks, task_samples
from medvl_sam2.training.throughput import Work
from medvl_sam2.training.trainer import TrainerConfig

_NOTICE = "Research weights; not a medical device. Check every answer and every mask."
_ASKING = 64
"""Tokens left for the request beside a report."""

Phase = Literal["projector", "joint"]


@dataclass(frozen=True)
class JointData(FeedConfig):
    """Where the cases come from; the manifest's validation side is held out."""

    manifest: Path = Path("manifest.jsonl")


@dataclass(frozen=True)
class JointStageConfig:
    """Settings of the stage, one field for one of the YAML file."""

    phase: Phase = "joint"
    preset: str = "tiny"
    start: tuple[Path, ...] = ()
    """What to begin with, later ones over earlier ones: see :mod:`medvl_sam2.training.stage_start`."""
    data: JointData = field(default_factory=JointData)
    shares: Shares = field(default_factory=Shares)
    batch: int = 2
    tasks: int = 6
    """Tasks drawn for every case of a micro-batch."""
    pack_length: int = 1024
    """Positions of a case's exchanges together, its image slots included."""
    requests: int = 6
    """Most ``[SEG]`` of a micro-batch whose masks are computed."""
    slices: int = 2
    """Slices decoded for every one of them."""
    sheet: int = 12
    """Slices of a volume that are scored together, for a model without a scene."""
    clip_length: int = 5
    """Slices of a stack that clicks are carried through."""
    lora: bool = True
    """Adapters of the preset's rank, embedding and output layer are trained; False: the whole language model."""
    seam_rate: float = 1e-4
    """Learning rate of projector, scene tokens, ``[SEG]`` projector, pointer and slice scores."""
    language_rate: float = 5e-5
    segmenter_rate: float = 5e-5
    weight_decay: float = 0.01
    mask_weight: float = 1.0
    score_weight: float = 0.5
    pointer_weight: float = 1.0
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(steps=4000, warmup=120, tensorboard=True))

    def __post_init__(self) -> None:
        for name in ("batch", "tasks", "requests", "slices", "sheet"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 1")
        if self.clip_length < 2:
            raise ConfigError(f"clip_length {self.clip_length} must be at least 2: memory looks back at a slice")
        if self.phase == "projector" and not any(n for kind, n in self.shares.values.items() if kind != "interactive"):
            raise ConfigError("the projector learns from texts; give report, vqa, semantic or referring a share")

    @property
    def asked(self) -> Shares:
        """Shares of this phase: the projector learns from texts alone."""
        return self.shares if self.phase == "joint" else replace(self.shares, interactive=0.0)


class JointStage(Stage):
    """Projector alignment or joint training of a :class:`UnifiedModel`."""

    def __init__(
        self,
        config: JointStageConfig,
        model: UnifiedModel,
        feed: CaseFeed[TaughtCase],
        out: Path | None = None,
        world: int = 1,
    ) -> None:
        """``out``: where the checkpoint goes, beside its ``tokenizer.json``; ``world``: processes that share the work.

        Adapters are added to ``model``, and everything that the phase does not train is frozen.
        """
        self.name, self.key = f"{config.phase} stage", f"{config.phase}_stage"
        self.config, self.feed, self.out, self._world = config, feed, out, world
        self.model = model.to(config.trainer.device).eval()
        torch.manual_seed(config.trainer.seed)
        self.model.requires_grad_(False)
        lm, language = self.model.language.lm, self.model.config.language
        if config.phase == "joint" and config.lora:
            add_lora(lm, language.lora_rank, language.lora_alpha)
            lm.to(config.trainer.device)
            for part in (lm.get_input_embeddings(), lm.lm_head):
                part.requires_grad_(True)
        elif config.phase == "joint":
            lm.requires_grad_(True)
        for parameter in (*self._seam(), *self._segmenter()):
            parameter.requires_grad_(True)
        lm.train()  # it has no dropout; only in this mode it can be checkpointed
        self.model.segmenter.training = True  # itself, not its parts: raw logits without a gate, and no dropout
        self._steps = SegmentationSteps(SegmentationLearner(model.segmenter).to(config.trainer.device), 0)

    @property
    def module(self) -> UnifiedModel:
        """The whole model."""
        return self.model

    def groups(self) -> list[ParameterGroup]:
        """The seam, the language model, and the segmenter behind its encoder, each at its own rate."""
        config = self.config
        language = [p for p in self.model.language.lm.parameters() if p.requires_grad]
        listed = (
            (list(self._seam()), config.seam_rate),
            (language, config.language_rate),
            (list(self._segmenter()), config.segmenter_rate),
        )
        return [ParameterGroup(parameters, rate, config.weight_decay) for parameters, rate in listed if parameters]

    def settings(self) -> dict[str, Any]:
        """The stage's numbers, its cases and the tokenizer."""
        words = digest(self.model.language.tokenizer.to_json())
        numbers = plain_settings(self.config, ("trainer", "data", "start"))
        return {**numbers, "cases": self.feed.digest, "tokenizer": words}

    def shards(self) -> list[nn.Module]:
        """The layers of the language model."""
        return list(self.model.language.lm.model.layers)

    def _seam(self) -> Iterator[nn.Parameter]:
        """What turns a volume into image tokens and, in the joint phase, a ``[SEG]`` state into a place."""
        language, segmenter = self.model.language, self.model.segmenter
        parts: list[nn.Module | None] = [language.projector, language.extent]
        if language.scene is not None:
            parts += [language.scene.organ_token, language.scene.lesion_token, language.scene.words]
            yield language.scene.slots
        if self.config.phase == "joint":
            parts += [language.seg_projector, language.pointer, segmenter.scorer, segmenter.height_token]
        for part in parts:
            if part is not None:
                yield from part.parameters()

    def _segmenter(self) -> Iterator[nn.Parameter]:
        """Prompt encoder, mask decoder and memory; ``conv_s0`` and ``conv_s1`` belong to the frozen encoding."""
        if self.config.phase == "joint":
            sam2 = self.model.segmenter.sam2
            for part in (sam2.sam_prompt_encoder, sam2.sam_mask_decoder, sam2.memory_attention, sam2.memory_encoder):
                for name, parameter in part.named_parameters():
                    if not name.startswith("conv_s"):
                        yield parameter

    def loss(self, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        """One pass of the language model over all texts; masks from its ``[SEG]`` states and from clicks."""
        config, language, rng = self.config, self.model.language, draw.rng()
        number, size = draw.step * draw.count + draw.number, config.batch
        cases = self.feed.cases(number * size, size, (number + self._world) * size)
        tasks = [draw_tasks(case, config.asked, config.tasks, rng) for case in cases]
        longest = config.pack_length - language.image_slots - _ASKING
        texts = [
            [sample for kind in kinds for sample in task_samples(kind, case, language.tokenizer, longest, rng)]
            for case, kinds in zip(cases, tasks, strict=True)
        ]
        batch = pack(language, texts, config.pack_length).to(torch.device(config.trainer.device))
        views, extents = (t.to(config.trainer.device) for t in stack_views(cases, rng))
        tokens, logits = self._image_tokens(views, extents)
        hidden = language.hidden_states(tokens, batch.ids, batch.attention, batch.positions)
        losses = language.token_losses(hidden, batch.labels)
        loss = (losses * batch.weights).sum() / batch.weights.sum().clamp(min=1e-6) + self._touched()
        figures = {"language": loss.item()} if len(losses) else {}
        slices = 0
        volumes = {row: case.volume for row, case in enumerate(cases) if case.volume is not None}
        if config.phase == "joint" and volumes:
            masks = _Masks(self, draw, volumes, tokens, logits)
            states = hidden[batch.ids == language.tokenizer.seg_id]
            loss = loss + masks.spoken(batch, states, figures)
            loss = loss + masks.clicked(sum(kinds.count("interactive") for kinds in tasks), draw, figures)
            slices = masks.slices
        read = int((batch.ids != language.tokenizer.pad_id).sum())
        self.work = Work(samples=len(cases), tokens=read, slices=slices)
        return loss, figures

    def saved(self, run: Run) -> None:
        """At the end write the checkpoint folder, adapters merged."""
        if self.out is None or not run.over:
            return
        weights = run.weights()
        if not run.ranks.first:
            return
        language = self.model.config.language
        state = merged_state(weights, language.lora_alpha / language.lora_rank)
        if language.tied_head:
            state["language.lm.lm_head.weight"] = state["language.lm.model.embed_tokens.weight"]
        said = f"{_NOTICE} Written by the {self.name} after {run.progress.step} steps."
        meta = CheckpointMeta(self.model.config.name, "0", said)
        place, words = self.out / "checkpoint", self.out / "tokenizer.json"
        save_checkpoint(place, state, self.model.config, words, meta, overwrite=True)

    def _image_tokens(self, views: Tensor, extents: Tensor) -> tuple[Tensor, Tensor | None]:
        """Image tokens (B, n, H), with gradients to projector and scene tokens, and the scene's map if there is one."""
        language, logits, facts = self.model.language, None, None
        with torch.no_grad():
            maps = language.vision(views)
            if language.scene is not None:
                logits = language.scene(views, maps)
                facts = language.scene.measure(views, logits, extents)
        return language.project(maps, extents, facts), logits

    def _touched(self) -> Tensor:
        """Zero, from every trained weight but those FSDP gathers by layer: all processes then share the same ones.

        A micro-batch without masks would otherwise give no gradient where another process has one.
        """
        apart = {id(p) for part in self.shards() for p in part.parameters()}
        moving = [p for p in self.model.parameters() if p.requires_grad and id(p) not in apart]
        return torch.stack([p.float().sum() for p in moving]).sum() * 0


class _Masks:
    """Mask losses of one micro-batch."""

    def __init__(
        self,
        stage: JointStage,
        draw: Draw,
        volumes: dict[int, LabelledVolume],
        tokens: Tensor,
        logits: Tensor | None,
    ) -> None:
        """``volumes`` by row of ``tokens`` (B, n, H) and of the scene's map ``logits``."""
        self._stage, self._model, self._config = stage, stage.model, stage.config
        self._rng, self.slices = draw.rng(2), 0
        self._number = {row: number for number, row in enumerate(volumes)}
        listed, model = list(volumes.values()), stage.model
        self._looks = SceneLooks(model, listed.__getitem__)
        if logits is not None:
            for row, number in self._number.items():
                elements = scene_elements(tokens[row, -model.config.scene_tokens :], logits[row], model.config)
                self._looks.keep(number, GlobalLook(tokens[row : row + 1], elements))
        places = None if logits is None else self._place
        size = model.config.slices.image_size
        self._sampler = SliceSampler(listed, [1.0] * len(listed), 0, size, places)
        self._sampler.rng = draw.rng(3)
        stage._steps.rng = draw.rng(4)

    def _place(self, number: int, target: Target) -> Tensor | None:
        return self._looks.place(number, target.name, target)

    def spoken(self, batch: PackedBatch, states: Tensor, figures: dict[str, float]) -> Tensor:
        """Masks of some of the ``[SEG]`` states (S, H), and what else they must tell."""
        asked = [(seg, self._number[row], t) for seg, (row, t) in enumerate(batch.segs) if row in self._number]
        chosen = sorted(self._rng.permutation(len(asked))[: self._config.requests].tolist())
        if not chosen:
            return states.sum() * 0
        segs, numbers, targets = zip(*(asked[n] for n in chosen), strict=True)
        states = states[list(segs)]
        vectors = self._model.language.seg_projector(states)
        if self._model.language.pointer is None:
            return self._on_sheets(vectors, numbers, targets, figures)
        return self._in_windows(states, vectors, numbers, targets, figures)

    def _in_windows(
        self,
        states: Tensor,
        vectors: Tensor,
        numbers: Sequence[int],
        targets: Sequence[SegTarget],
        figures: dict[str, float],
    ) -> Tensor:
        looks, rows = self._looks, list[SpokenRow]()
        for index, (number, target) in enumerate(zip(numbers, targets, strict=True)):
            place = looks.place(number, target.name, target.mask)
            if place is not None:
                found = self._sampler.located(number, target.mask, place, self._config.slices)
                rows += [SpokenRow(index, row.image, row.height, row.truth, row.rough) for row in found]
        assert self._model.language.pointer is not None
        scores = self._model.language.pointer(states, torch.stack([looks.of(n).elements for n in numbers]))
        wanted = [looks.wanted(n, t.name, t.mask) for n, t in zip(numbers, targets, strict=True)]
        loss, figures["pointed"] = pointing_loss(scores, torch.stack(wanted).to(scores.device))
        loss = self._config.pointer_weight * loss
        if rows:
            masks, figures["spoken"] = spoken_rows_loss(self._model, rows, vectors, self._stage._steps.weights)
            loss = loss + self._config.mask_weight * masks
            figures["masks"] = masks.item()
        self.slices += len(rows)
        return loss

    def _on_sheets(
        self, vectors: Tensor, numbers: Sequence[int], targets: Sequence[SegTarget], figures: dict[str, float]
    ) -> Tensor:
        config, found = self._config, []
        for number in sorted(set(numbers)):
            mine = [n for n, other in enumerate(numbers) if other == number]
            sheet = self._sampler.sheet(number, [targets[n].mask for n in mine], config.sheet, config.slices)
            found.append((len(mine), sheet_loss(self._model, sheet, vectors[mine], self._stage._steps.weights)))
            self.slices += config.sheet
        masks = torch.stack([count * part.masks for count, part in found]).sum() / len(numbers)
        scores = torch.stack([part.placed * part.scores for _, part in found]).sum()
        scores = scores / max(1, sum(part.placed for _, part in found))
        figures["masks"], figures["spoken"] = masks.item(), _mean([part.dice for _, part in found])
        if self._model.segmenter.scorer is not None:
            figures["scores"], figures["started"] = scores.item(), _mean([part.right for _, part in found])
        return config.mask_weight * masks + config.score_weight * scores

    def clicked(self, count: int, draw: Draw, figures: dict[str, float]) -> Tensor:
        """Boxes, clicks and rough masks: in turn on single slices with corrections, and carried through stacks."""
        steps, config = self._stage._steps, self._config
        if not count:
            return torch.zeros((), device=steps.device)
        if draw.step % 2:
            windows = [replace(self._sampler.window(), concept=None) for _ in range(count)]
            loss, figures["window"], figures["clicked"] = steps.window_loss(windows, int(self._rng.integers(1, 4)))
            self.slices += count
        else:
            length, clips = config.clip_length, -(-count // 2)
            windows = [replace(self._sampler.window(length), concept=None) for _ in range(clips)]
            loss, figures["tracked"] = steps.memory_loss(windows)
            self.slices += clips * length
        return config.mask_weight * loss


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if value == value]
    return sum(finite) / len(finite) if finite else float("nan")
