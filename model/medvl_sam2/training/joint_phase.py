"""Joint phase: the language model's ``[SEG]`` state takes the place of the stand-in tokens.

The projector of the ``[SEG]`` state learns to land where the stand-in token of the same concept lies (a fast start)
and, through the mask loss, wherever the decoder segments best. The language model and the encoders stay frozen, so
that answers do not change; the mask decoder moves a little, with window and memory rows mixed in so that clicks keep
working.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from medvl_sam2.modeling.prompts import SEGMENT_PROMPTS, segment_prompt, segment_reply
from medvl_sam2.modeling.slice_segmenter import SlicePrompt
from medvl_sam2.modeling.tokenizer import SEG
from medvl_sam2.modeling.unified import UnifiedModel, language_view
from medvl_sam2.synthesis import Referring, generate_case
from medvl_sam2.training.corpus import REFERRING_TEMPLATES, TextSample
from medvl_sam2.training.language_batches import pack
from medvl_sam2.training.losses import cosine, dice_score, mask_loss
from medvl_sam2.training.pointing import pointing_loss, slot_lies_on, wanted_elements
from medvl_sam2.training.samples import CONCEPTS, LabelledVolume, Target
from medvl_sam2.training.segmentation_steps import SegmentationLearner, SegmentationSteps
from medvl_sam2.training.slice_batches import SliceSampler
from medvl_sam2.training.volume_sources import from_case
from medvl_sam2.vocabulary import CLASSES, spoken


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


@dataclass(frozen=True, eq=False)
class SpokenVolume:
    """A labelled volume, its global view and the referring sentences that are true of it."""

    volume: LabelledVolume
    referring: tuple[tuple[str, str, Target], ...] = ()

    def view(self, size: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Global view (1, 1, D, H, W) and extent (1, 3) in mm."""
        return language_view(self.volume.image, self.volume.spacing, self.volume.modality, size)


def spoken_case(seed: int) -> SpokenVolume:
    """A generated case with its referring sentences."""
    case = generate_case(seed)
    return SpokenVolume(from_case(case), tuple(_referred(item) for item in case.referring))


def _referred(item: Referring) -> tuple[str, str, Target]:
    if item.kind == "lesion":
        return item.text, item.name, Target("lesion", 1, item.values)
    return item.text, item.name, Target(CLASSES[item.values[0] - 1], 0, item.values)


@dataclass(frozen=True, eq=False)
class SeenVolume:
    """What the frozen parts say of a volume.

    Image ``tokens`` (1, n, H), scene tokens ``elements`` (E, H), and where the lesion ``slots`` lie, bool (slots, d,
    h, w).
    """

    tokens: Tensor
    elements: Tensor
    slots: Tensor


class JointPhase:
    """Trains the ``[SEG]`` projector, the scene pointer, the height token and the mask decoder."""

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
        self.rng = np.random.default_rng(config.seed + 2)
        size = model.config.slices.image_size
        self.sampler = SliceSampler([v.volume for v in volumes], list(weights), config.seed + 3, size)
        self.looks: dict[int, SeenVolume] = {}
        self.slots: dict[tuple[int, Target], Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def run(self, out: Path) -> dict[str, float]:
        """Train for the configured minutes, writing a log to ``out``; returns the last smoothed figures."""
        model, config = self.model, self.config
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        fast: list[nn.Module] = [model.language.seg_projector, model.segmenter.height_token]
        if model.language.pointer is not None:
            fast.append(model.language.pointer)
        slow = [model.segmenter.sam2.sam_mask_decoder, model.segmenter.sam2.sam_prompt_encoder]
        groups = [
            {"params": _released(fast), "peak": config.projector_rate},
            {"params": _released(slow), "peak": config.decoder_rate},
        ]
        for head in (model.segmenter.sam2.sam_mask_decoder.conv_s0, model.segmenter.sam2.sam_mask_decoder.conv_s1):
            head.requires_grad_(False)  # part of the cached features
        trained = [p for g in groups for p in g["params"] if p.requires_grad]  # type: ignore[attr-defined]
        optimiser = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.01)
        smooth: dict[str, float] = {}
        spent, step, budget = 0.0, 0, config.minutes * 60
        out.mkdir(parents=True, exist_ok=True)
        with (
            tqdm(total=round(budget), desc="joint phase", unit="s", mininterval=10) as bar,
            (out / "joint.jsonl").open("a") as log,
        ):
            while spent < budget:
                start = time.monotonic()
                rate = min(1.0, (step + 1) / 40) * cosine(spent / budget)
                for group in optimiser.param_groups:
                    group["lr"] = group["peak"] * rate
                loss, figures = self._step(step)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimiser.step()
                step += 1
                for key, value in figures.items():
                    if np.isfinite(value):
                        smooth[key] = 0.97 * smooth.get(key, value) + 0.03 * value
                spent += time.monotonic() - start
                bar.update(int(spent) - bar.n)
                if step % 25 == 0:
                    bar.set_postfix({k: f"{v:.3f}" for k, v in smooth.items()})
                    log.write(json.dumps({"step": step, **smooth}) + "\n")
                    log.flush()
        model.eval()
        return {"steps": float(step), **smooth, **{f"config_{k}": float(v) for k, v in asdict(config).items()}}

    def _step(self, step: int) -> tuple[Tensor, dict[str, float]]:
        self.model.eval()  # frozen parts keep their running statistics; there is no dropout worth having in the rest
        loss, figures = self._spoken_loss()
        if step % 2:
            windows = [self.sampler.window() for _ in range(self.config.windows)]
            prompted, figures["window"], figures["clicked"] = self.steps.window_loss(
                windows, int(self.rng.integers(1, 4))
            )
        else:
            clips = [self.sampler.window(self.config.clip_length) for _ in range(self.config.clips)]
            prompted, figures["tracked"] = self.steps.memory_loss(clips)
        return loss + prompted, figures

    def _spoken_loss(self) -> tuple[Tensor, dict[str, float]]:
        """Masks from words on whole slices, and the pull towards the stand-in tokens."""
        config, model = self.config, self.model
        numbers = self.rng.choice(len(self.volumes), size=config.volumes, p=self.chance)
        rows = [self._requests(self.volumes[int(n)]) for n in numbers]
        states = self._states(numbers, rows)
        vectors = model.language.seg_projector(states)
        flat = [(int(n), request) for n, requests in zip(numbers, rows, strict=True) for request in requests]
        images, heights, truth, index = [], [], [], []
        for row, (number, request) in enumerate(flat):
            for _ in range(config.slices):
                image, height, mask = self._slice(number, request)
                images.append(image)
                heights.append(height)
                truth.append(mask)
                index.append(row)
        with torch.no_grad():
            features = model.segmenter.encode(torch.stack(images).to(self.device))
        prompt = replace(SlicePrompt.empty(len(index), self.device), height=torch.tensor(heights, device=self.device))
        output = model.segment(features, prompt, language=vectors[index])
        masks = torch.stack(truth).to(self.device)
        loss = mask_loss(output, masks, self.steps.weights)
        known = [row for row, (_, request) in enumerate(flat) if request.concept is not None]
        if known and config.distil_weight:
            wanted = self.learner.concept_tokens.weight[[flat[row][1].concept for row in known]].detach()
            loss = loss + config.distil_weight * F.mse_loss(vectors[known], wanted) / wanted.var().clamp(min=1e-3)
        figures: dict[str, float] = {}
        if model.language.pointer is not None:
            pointed, figures["pointed"] = self._pointer_loss(states, flat)
            loss = loss + config.pointer_weight * pointed
        present = masks.amax(dim=(1, 2)) > 0.5
        dice = dice_score(output.logits.detach(), masks)[present]
        figures["spoken"] = float(dice.mean()) if len(dice) else float("nan")
        return loss, figures

    def _states(self, numbers: np.ndarray, rows: list[list[Request]]) -> Tensor:
        """``[SEG]`` states (sum of requests, H), in order."""
        language = self.model.language
        with torch.no_grad():
            tokens = torch.cat([self._look(int(n)).tokens for n in numbers])
            samples = [[TextSample(r.question, r.reply, "segment") for r in requests] for requests in rows]
            batch = pack(language, samples, 2000)
            ids = batch.ids.to(self.device)
            hidden = language.hidden_states(
                tokens, ids, batch.attention.to(self.device), batch.positions.to(self.device)
            )
            return hidden[ids == language.tokenizer.seg_id]

    def _look(self, number: int) -> SeenVolume:
        if number not in self.looks:
            view, extent = self.volumes[number].view(self.model.config.vision.input_size)
            with torch.no_grad():
                look = self.model.look(view.to(self.device), extent.to(self.device))
            elements, slots = torch.zeros(0, 0), torch.zeros(0)
            if look.elements is not None:
                elements = look.elements.tokens
                slots = look.elements.maps[len(self.model.config.scene_organs) :].cpu() > 0
            self.looks[number] = SeenVolume(look.tokens, elements, slots)
        return self.looks[number]

    def _pointer_loss(self, states: Tensor, flat: list[tuple[int, Request]]) -> tuple[Tensor, float]:
        """Cross entropy of what each state points at, and the share of requests that point exactly right."""
        assert self.model.language.pointer is not None
        tokens = torch.stack([self._look(number).elements for number, _ in flat])
        scores = self.model.language.pointer(states, tokens)
        wanted = torch.stack([self._elements_of(number, request.target) for number, request in flat]).to(self.device)
        return pointing_loss(scores, wanted)

    def _elements_of(self, number: int, target: Target | None) -> Tensor:
        """Which scene elements (E,) a target is: its organ, or the lesion slots that lie on it."""
        organs, slots = self.model.config.scene_organs, self._look(number).slots
        if target is None or target.name in organs:
            return wanted_elements(target.name if target else "", organs, torch.zeros(len(slots), dtype=torch.bool))
        key = (number, target)
        if key not in self.slots:
            volume = self.volumes[number].volume
            mask = torch.from_numpy(volume.mask(target, slice(None)).astype(np.float32))[None, None]
            cells = F.adaptive_max_pool3d(mask, slots.shape[1:])[0, 0] > 0.5
            on_target = torch.tensor([slot_lies_on(slot, cells) for slot in slots])
            self.slots[key] = wanted_elements(target.name, organs, on_target)
        return self.slots[key]

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

    def _slice(self, number: int, request: Request) -> tuple[Tensor, float, Tensor]:
        """A whole slice for a request; three in five show the target."""
        return self.sampler.whole_slice_of(number, request.target, float(self.rng.random()) < 0.6)


def _concept_of(volume: LabelledVolume, target: Target) -> int | None:
    """The concept with exactly this target's voxels, so that "the lesion in the spleen" starts from its stand-in."""
    if target.map == 0:
        return target.concept
    same = [t for t in volume.targets if t.map == target.map and set(t.values) == set(target.values)]
    narrow = [t for t in same if t.name != "lesion"] or same
    return narrow[0].concept if narrow else None


def _released(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    parameters = [p for module in modules for p in module.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters
