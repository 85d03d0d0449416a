"""Joint phase: the language model's ``[SEG]`` state takes the place of the stand-in tokens.

The projector of the ``[SEG]`` state learns to land where the stand-in token of the same concept lies (a fast start)
and, through the mask loss, wherever the decoder segments best. The language model and the image encoders stay frozen,
so that answers do not change. Decoder and memory learn from what the scene makes of volumes: text requests in windows
round what it located, with its map as rough mask; clicks and memory in windows round the object, with its map as half
of the rough masks. Lesions that it misses or makes up give no row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvl_sam2.modeling.prompts import SEGMENT_PROMPTS, segment_prompt, segment_reply
from medvl_sam2.modeling.tokenizer import SEG
from medvl_sam2.modeling.unified import UnifiedModel
from medvl_sam2.synthesis import Referring, generate_case
from medvl_sam2.training.corpus import REFERRING_TEMPLATES, TextSample
from medvl_sam2.training.language_batches import pack
from medvl_sam2.training.pointing import pointing_loss
from medvl_sam2.training.run_settings import digest, plain_settings
from medvl_sam2.training.samples import CONCEPTS, LabelledVolume, Target, volumes_digest
from medvl_sam2.training.scene_looks import SceneLooks
from medvl_sam2.training.segmentation_steps import SegmentationLearner, SegmentationSteps
from medvl_sam2.training.slice_batches import SliceSampler
from medvl_sam2.training.spoken_masks import SpokenRow, spoken_rows_loss
from medvl_sam2.training.stage import Draw, ParameterGroup, Stage
from medvl_sam2.training.trainer import Trainer, TrainerConfig
from medvl_sam2.training.volume_sources import from_case
from medvl_sam2.vocabulary import CLASSES, spoken

_LAST_LINES = 5


@dataclass(frozen=True)
class JointConfig:
    """Numbers of the joint phase."""

    minutes: float = 15.0
    volumes: int = 4
    requests: int = 4
    slices: int = 2
    windows: int = 6
    clips: int = 3
    clip_length: int = 5
    projector_rate: float = 1e-3
    decoder_rate: float = 1.5e-4
    distil_weight: float = 1.0
    pointer_weight: float = 3.0
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """What is asked of a volume: the words, the reply with one ``[SEG]``, the target (None: absent) and its concept."""

    question: str
    reply: str
    target: Target | None
    concept: int | None

    @property
    def name(self) -> str:
        """Class of what is asked for, whether the volume has it or not."""
        if self.target is not None:
            return self.target.name
        return "" if self.concept is None else CONCEPTS[self.concept]


@dataclass(frozen=True, eq=False)
class SpokenVolume:
    """A labelled volume and the referring sentences that are true of it."""

    volume: LabelledVolume
    referring: tuple[tuple[str, str, Target], ...] = ()


def spoken_case(seed: int) -> SpokenVolume:
    """A generated case with its referring sentences."""
    case = generate_case(seed)
    return SpokenVolume(from_case(case), tuple(_referred(item) for item in case.referring))


def _referred(item: Referring) -> tuple[str, str, Target]:
    if item.kind == "lesion":
        return item.text, item.name, Target("lesion", 1, item.values)
    return item.text, item.name, Target(CLASSES[item.values[0] - 1], 0, item.values)


class JointPhase(Stage):
    """Trains the ``[SEG]`` projector, the scene pointer, the height token, the mask decoder and the memory."""

    name, key = "joint phase", "joint"

    def __init__(
        self,
        config: JointConfig,
        model: UnifiedModel,
        stand_ins: Tensor,
        volumes: Sequence[SpokenVolume],
        weights: Sequence[float],
    ) -> None:
        torch.manual_seed(config.seed)
        self.config, self.model = config, model
        self.learner = SegmentationLearner(model.segmenter).to(next(model.parameters()).device)
        with torch.no_grad():
            self.learner.concept_tokens.weight.copy_(stand_ins)
        self.steps = SegmentationSteps(self.learner, config.seed + 1)
        self.volumes = list(volumes)
        self.chance = np.asarray(weights) / np.sum(weights)
        self.rng = np.random.default_rng(config.seed)
        size = model.config.slices.image_size
        self.looks = SceneLooks(model, lambda number: self.volumes[number].volume)
        places = None if model.language.pointer is None else self._place
        self.sampler = SliceSampler([v.volume for v in volumes], list(weights), config.seed + 3, size, places)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def _place(self, number: int, target: Target) -> Tensor | None:
        return self.looks.place(number, target.name, target)

    def run(self, out: Path) -> dict[str, float]:
        """Train for the configured minutes, or the rest of them when the folder ``out`` holds an interrupted run.

        Returns the mean figures of the log's last lines, and the steps and seconds of the whole run.
        """
        config = self.config
        self.model.requires_grad_(False)
        for part in (*self._fast(), *self._slow()):
            part.requires_grad_(True)
        decoder = self.model.segmenter.sam2.sam_mask_decoder
        for head in (decoder.conv_s0, decoder.conv_s1):
            head.requires_grad_(False)  # part of the cached features
        trainer = TrainerConfig(
            minutes=config.minutes,
            seed=config.seed + 1,
            precision="float32",
            device=self.device.type,
            betas=(0.9, 0.999),
        )
        run = Trainer(self, trainer, out, log="joint.jsonl")
        progress = run.run()
        self.model.eval()
        last = run.history[-_LAST_LINES:]
        names = {name for line in last for name in line}
        means = {name: float(np.mean([line[name] for line in last if name in line])) for name in names}
        figures = {**means, "steps": float(progress.step), "seconds": progress.seconds}
        return {**figures, **{f"config_{k}": float(v) for k, v in asdict(config).items()}}

    @property
    def module(self) -> UnifiedModel:
        """The whole model; stand-in tokens and dense head only teach."""
        return self.model

    def groups(self) -> list[ParameterGroup]:
        """The seam fast, decoder and memory slowly."""
        rates = ((self._fast(), self.config.projector_rate), (self._slow(), self.config.decoder_rate))
        return [ParameterGroup(_trained(parts), rate, 0.01) for parts, rate in rates]

    def settings(self) -> dict[str, Any]:
        """The phase's numbers, its volumes with their sentences, and the tokenizer."""
        volumes = volumes_digest([v.volume for v in self.volumes], list(self.chance))
        sentences = digest([[text for text, _, _ in v.referring] for v in self.volumes])
        words = digest(self.model.language.tokenizer.to_json())
        return {
            **plain_settings(self.config, ("minutes",)),
            "volumes": volumes,
            "sentences": sentences,
            "tokenizer": words,
        }

    def _fast(self) -> list[nn.Module]:
        optional = (self.model.segmenter.height_token, self.model.language.pointer)
        return [self.model.language.seg_projector, *(part for part in optional if part is not None)]

    def _slow(self) -> list[nn.Module]:
        sam2 = self.model.segmenter.sam2
        return [sam2.sam_mask_decoder, sam2.sam_prompt_encoder, sam2.memory_attention, sam2.memory_encoder]

    def loss(self, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        """Masks from words every time; in turn windows by prompt and stacks of slices."""
        self.rng, self.steps.rng, self.sampler.rng = (draw.rng(purpose) for purpose in (2, 3, 4))
        self.model.eval()  # frozen parts keep their running statistics; there is no dropout worth having in the rest
        loss, figures = self._spoken_loss()
        if draw.step % 2:
            windows = [self.sampler.window() for _ in range(self.config.windows)]
            prompted, figures["window"], figures["clicked"] = self.steps.window_loss(
                windows, int(self.rng.integers(1, 4))
            )
        else:
            clips = [self.sampler.window(self.config.clip_length) for _ in range(self.config.clips)]
            prompted, figures["tracked"] = self.steps.memory_loss(clips)
        return loss + prompted, figures

    def _spoken_loss(self) -> tuple[Tensor, dict[str, float]]:
        """Masks from words, and the pull towards the stand-in tokens."""
        config, model = self.config, self.model
        numbers = self.rng.choice(len(self.volumes), size=config.volumes, p=self.chance)
        asked = [self._requests(self.volumes[int(n)]) for n in numbers]
        states = self._states(numbers, asked)
        vectors = model.language.seg_projector(states)
        flat = [(int(n), request) for n, requests in zip(numbers, asked, strict=True) for request in requests]
        rows = [row for index, (number, request) in enumerate(flat) for row in self._rows(index, number, request)]
        loss, figures = vectors.sum() * 0, {}
        if rows:
            masked, figures["spoken"] = spoken_rows_loss(model, rows, vectors, self.steps.weights)
            loss = loss + masked
        known = [row for row, (_, request) in enumerate(flat) if request.concept is not None]
        if known and config.distil_weight:
            wanted = self.learner.concept_tokens.weight[[flat[row][1].concept for row in known]].detach()
            loss = loss + config.distil_weight * F.mse_loss(vectors[known], wanted) / wanted.var().clamp(min=1e-3)
        if model.language.pointer is not None:
            pointed, figures["pointed"] = self._pointer_loss(states, flat)
            loss = loss + config.pointer_weight * pointed
        return loss, figures

    def _rows(self, index: int, number: int, request: Request) -> list[SpokenRow]:
        """Slices of a request: in the window of what the scene located; whole slices for a model without a scene."""
        count, target = self.config.slices, request.target
        if self.model.language.pointer is None:
            whole = [self.sampler.whole_slice_of(number, target, self.rng.random() < 0.6) for _ in range(count)]
            return [SpokenRow(index, image, height, truth, None) for image, height, truth in whole]
        place = self.looks.place(number, request.name, target)
        located = [] if place is None else self.sampler.located(number, target, place, count)
        return [SpokenRow(index, row.image, row.height, row.truth, row.rough) for row in located]

    def _states(self, numbers: np.ndarray, rows: list[list[Request]]) -> Tensor:
        """``[SEG]`` states (sum of requests, H), in order."""
        language = self.model.language
        with torch.no_grad():
            tokens = torch.cat([self.looks.of(int(n)).tokens for n in numbers])
            samples = [[TextSample(r.question, r.reply, "segment") for r in requests] for requests in rows]
            batch = pack(language, samples, 2000)
            ids = batch.ids.to(self.device)
            hidden = language.hidden_states(
                tokens, ids, batch.attention.to(self.device), batch.positions.to(self.device)
            )
            return hidden[ids == language.tokenizer.seg_id]

    def _pointer_loss(self, states: Tensor, flat: list[tuple[int, Request]]) -> tuple[Tensor, float]:
        """Cross entropy of what each state points at, and the share of requests that point exactly right."""
        assert self.model.language.pointer is not None
        tokens = torch.stack([self.looks.of(number).elements for number, _ in flat])
        scores = self.model.language.pointer(states, tokens)
        wanted = torch.stack([self.looks.wanted(number, request.name, request.target) for number, request in flat]).to(
            self.device
        )
        return pointing_loss(scores, wanted)

    def _requests(self, item: SpokenVolume) -> list[Request]:
        """Half classes (also absent ones), half referring sentences where there are any, lesions first among them."""
        rng, volume = self.rng, item.volume
        requests: list[Request] = []
        lesions = [r for r in item.referring if r[2].name == "lesion"]
        organs = [r for r in item.referring if r[2].name != "lesion"]
        known = [n for n in CLASSES if n in volume.known]
        for number in range(self.config.requests):
            if item.referring and number % 2:
                pool = lesions if lesions and rng.random() < 0.6 else organs or lesions
                text, name, target = pool[int(rng.integers(len(pool)))]
                question = text
                if text[:1].islower():
                    question = str(rng.choice(np.array(REFERRING_TEMPLATES))).format(text.rstrip("."))
                requests.append(Request(question, f"{name} {SEG}", target, _concept_of(volume, target)))
            else:
                here = [n for n in known if volume.find(n) is not None]
                chosen = str(rng.choice(np.array(here if here and rng.random() < 0.8 else known)))
                template = SEGMENT_PROMPTS[0] if rng.random() < 0.5 else str(rng.choice(np.array(SEGMENT_PROMPTS)))
                requests.append(
                    Request(
                        segment_prompt([spoken(chosen)], template),
                        segment_reply([spoken(chosen)], [True]),
                        volume.find(chosen),
                        CONCEPTS.index(chosen),
                    )
                )
        return requests


def _concept_of(volume: LabelledVolume, target: Target) -> int | None:
    """The concept with exactly this target's voxels, so that "the lesion in the spleen" starts from its stand-in."""
    if target.map == 0:
        return target.concept
    same = [t for t in volume.targets if t.map == target.map and set(t.values) == set(target.values)]
    narrow = [t for t in same if t.name != "lesion"] or same
    return narrow[0].concept if narrow else None


def _trained(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [p for module in modules for p in module.parameters() if p.requires_grad]
