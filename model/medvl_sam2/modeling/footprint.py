"""What a model of some size costs: parameters, memory and arithmetic, counted without allocating a single weight.

The model is built on torch's meta device and its own forward passes are run there. Arithmetic is counted by torch's
``FlopCounterMode``, memory by the tensors alive. All sizes are bytes; :data:`ASSUMPTIONS` says what is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medvl_sam2.config import ModelConfig
from medvl_sam2.modeling.language import additive_mask
from medvl_sam2.modeling.lora import add_lora
from medvl_sam2.modeling.meta_device import FusedAttention, LiveBytes
from medvl_sam2.modeling.slice_segmenter import SlicePrompt
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.unified import UnifiedModel

T = TypeVar("T")

TEXT_TOKENS = 256
"""Question and reply of one sequence, behind the image slots: 512 positions in Med3DVLM."""
CACHED_SLICES = 128
"""Slices of one volume whose features inference keeps."""
CLIP_SLICES = 8
"""Slices of a training clip, as in SAM 2 and MedSAM2."""
ADAPTERS = "LoRA adapters"

STAGES: dict[str, tuple[str, ...]] = {
    "1a": ("volume",),
    "1b": ("volume", "language"),
    "1c": ("slices",),
    "2": ("volume", "language", "slices"),
    "3": ("volume", "language", "slices"),
}
"""Training stages (image-text alignment, projector, slices, joint, task) and the sides of the model each one needs."""

ASSUMPTIONS: tuple[str, ...] = (
    f"Inference: one volume, one object, weights bf16; keys and values of one sequence (image slots and {TEXT_TOKENS} "
    f"text tokens); features of {CACHED_SLICES} slices, encoded one at a time; the largest single step's results.",
    f"Training: one volume with one sequence, and one clip of {CLIP_SLICES} slices with one object, each decoded with "
    "a full memory of seven. More samples a step multiply the results, not the weights.",
    "Training: frozen weights bf16 (2 bytes), trained ones fp32 with gradient and two AdamW moments (16). A stage "
    "loads only the sides of the model it runs.",
    "Results: bf16, all kept for the backward pass (no gradient checkpointing), attention fused.",
    "Stage 1a is without the text tower, no part of this model. Stages 2 and 3 adapt the language model by LoRA; 2 "
    "also trains its embedding and output layer.",
    "FLOPs: two a multiply-add; element-wise work and the scene's measuring are left out. A further reply token costs "
    "about two a weight of the language blocks and head.",
)


@dataclass(frozen=True)
class PartCost:
    """One part: ``parameters``, the ``stages`` that train it, and the ``flops`` of its forward for one ``unit``."""

    name: str
    parameters: int
    stages: tuple[str, ...]
    flops: int
    unit: str


@dataclass(frozen=True)
class StageCost:
    """One training step: ``trained`` parameters, bytes of ``weights`` with optimiser, and of kept ``results``."""

    name: str
    trained: int
    weights: int
    results: int


@dataclass(frozen=True)
class InferenceCost:
    """Bytes of ``weights``, ``keys_values``, cached slice ``features`` and the largest ``step``."""

    weights: int
    keys_values: int
    features: int
    step: int


@dataclass(frozen=True)
class Footprint:
    """Costs of the configuration ``name``."""

    name: str
    parts: tuple[PartCost, ...]
    inference: InferenceCost
    training: tuple[StageCost, ...]

    @property
    def parameters(self) -> int:
        """Parameters of the model without adapters, which are merged after training."""
        return sum(part.parameters for part in self.parts if part.name != ADAPTERS)


def footprint(config: ModelConfig) -> Footprint:
    """Cost of a configuration; raises :class:`medvl_sam2.errors.ConfigError` when it cannot be built."""
    tokenizer = Tokenizer.train([], 262)  # bytes and special tokens; no text is read
    with torch.device("meta"), FusedAttention():
        model = UnifiedModel(config, tokenizer).eval().requires_grad_(False)
        members = _members(model)
        steps = _run(model, STAGES["3"], flops=True)
        training = [_stage(model, members, stage) for stage in ("1a", "1b", "1c")]
        adapters = add_lora(model.language.lm, config.language.lora_rank, config.language.lora_alpha)
        weights = sum(member.parameters for member in members)
        members.append(_Member(ADAPTERS, "language", ("2", "3"), tuple(adapters)))
        training += [_stage(model, members, stage) for stage in ("2", "3")]
    parts = []
    for member in members:
        step = steps.get(member.name, _Step())
        parts.append(PartCost(member.name, member.parameters, member.stages, step.flops, step.unit))
    return Footprint(config.name, tuple(parts), _inference(config, weights, steps), tuple(training))


def _inference(config: ModelConfig, weights: int, steps: Mapping[str, _Step]) -> InferenceCost:
    language, slices = config.language, config.slices
    width = language.kv_heads * (language.hidden_size // language.heads)
    grid = (slices.image_size // 16) ** 2 * slices.d_model
    return InferenceCost(
        weights=2 * weights,
        keys_values=2 * 2 * language.layers * width * (config.image_tokens + TEXT_TOKENS),
        features=2 * CACHED_SLICES * (grid + 4 * grid // 4 + 16 * grid // 8),  # strides 16, 8 and 4
        step=max(step.peak for step in steps.values()),
    )


# --- parts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Member:
    """A part of a built model: its weights, the side it is on, and the stages that train it."""

    name: str
    side: str
    stages: tuple[str, ...]
    weights: tuple[nn.Parameter, ...]

    @property
    def parameters(self) -> int:
        return sum(weight.numel() for weight in self.weights)


def _members(model: UnifiedModel) -> list[_Member]:
    """Every weight of the model, each in one part; tied weights count where they come first."""
    language, sam2 = model.language, model.segmenter.sam2
    listed: list[tuple[str, str, tuple[str, ...], list[nn.Module | None]]] = [
        ("volume encoder", "volume", ("1a",), [language.vision]),
        ("scene", "volume", ("1a", "1b"), [language.scene]),
        ("projector", "language", ("1b", "2"), [language.projector, language.extent]),
        ("language embedding", "language", ("2",), [language.lm.get_input_embeddings()]),
        ("language blocks", "language", (), [language.lm.model]),
        ("language head", "language", ("2",), [language.lm.lm_head]),
        ("[SEG] projector", "language", ("2", "3"), [language.seg_projector]),
        ("scene pointer", "language", ("2", "3"), [language.pointer]),
        ("slice encoder", "slices", ("1c",), [sam2.image_encoder]),
        ("memory attention", "slices", ("1c", "2", "3"), [sam2.memory_attention]),
        ("memory encoder", "slices", ("1c", "2", "3"), [sam2.memory_encoder]),
        ("slice scorer", "slices", ("2",), [model.segmenter.scorer]),
        ("mask decoder", "slices", ("1c", "2", "3"), [model.segmenter]),
    ]
    seen: set[int] = set()

    def new(modules: Iterable[nn.Module | None]) -> Iterator[nn.Parameter]:
        for module in modules:
            for weight in module.parameters() if module is not None else ():
                if id(weight) not in seen:
                    seen.add(id(weight))
                    yield weight

    members = [_Member(name, side, stages, tuple(new(modules))) for name, side, stages, modules in listed]
    return [member for member in members if member.weights]


# --- passes ----------------------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """Operations of a forward, what it was for, and the most bytes its results took, were they bf16."""

    flops: int = 0
    unit: str = ""
    peak: int = 0


class _Meter:
    """Runs steps and keeps what every one of them cost; ``known`` tensors are no results."""

    def __init__(self, known: Iterable[Tensor], flops: bool) -> None:
        self.steps: dict[str, _Step] = {}
        self._known, self._flops = list(known), flops
        self._kept: list[Any] = []

    def __call__(self, name: str, unit: str, step: Callable[[], T]) -> T:
        with LiveBytes(self._known) as live, ExitStack() as stack:
            counter = stack.enter_context(FlopCounterMode(display=False)) if self._flops else None
            result = step()
        self._kept.append(result)  # what the backward pass needs stays alive
        self.steps[name] = _Step(counter.get_total_flops() if counter else 0, unit, live.peak // 2)
        return result


def _run(model: UnifiedModel, sides: Sequence[str], flops: bool = False) -> dict[str, _Step]:
    """Costs of one volume, sequence, and slice with a full memory, as far as the ``sides`` go."""
    meter = _Meter([*model.parameters(), *model.buffers()], flops)
    maps = _volume_pass(model, meter) if "volume" in sides else []
    vector = _language_pass(model, maps, meter) if "language" in sides else None
    if "slices" in sides:
        _slice_pass(model, vector, meter)
    return meter.steps


def _volume_pass(model: UnifiedModel, run: _Meter) -> list[Tensor]:
    language = model.language
    view = torch.empty(1, 1, *model.config.vision.input_size)
    maps = run("volume encoder", "volume", lambda: language.vision(view))
    if language.scene is not None:
        run("scene", "volume", partial(language.scene, view, maps))
    return cast(list[Tensor], maps)


def _language_pass(model: UnifiedModel, maps: list[Tensor], run: _Meter) -> Tensor:
    """One sequence; returns what a ``[SEG]`` in it hands to the slices (1, C)."""
    language = model.language
    tokens = run("projector", "volume", lambda: language.project(maps, torch.empty(1, 3), None))
    if language.scene is not None:  # its tokens are made from measurements, which need data
        tokens = torch.cat([tokens, language.scene.slots[None]], dim=1)
    text = language.lm.get_input_embeddings()(torch.zeros(1, TEXT_TOKENS, dtype=torch.long))
    inputs = torch.cat([tokens, text], dim=1)
    unit = f"sequence of {inputs.shape[1]}"
    mask = additive_mask(torch.ones(1, inputs.shape[1], inputs.shape[1], dtype=torch.bool).tril())
    blocks = partial(language.lm.model, inputs_embeds=inputs, attention_mask=mask, use_cache=False)
    hidden = run("language blocks", unit, lambda: blocks().last_hidden_state)
    run("language head", unit, partial(language.lm.lm_head, hidden))
    return cast(Tensor, run("[SEG] projector", "object", lambda: language.seg_projector(hidden[:, -1])))


def _slice_pass(model: UnifiedModel, language: Tensor | None, run: _Meter) -> None:
    """One slice: remembered, then read as if from all slices before the last one of a clip."""
    segmenter = model.segmenter
    size = segmenter.config.image_size
    features = run("slice encoder", "slice", lambda: segmenter.encode(torch.empty(1, 3, size, size)))
    if segmenter.scorer is not None and language is not None:
        run("slice scorer", "slice and object", partial(segmenter.scorer, language, features.coarse))
    prompt = replace(SlicePrompt.empty(1, "meta"), language=language)
    unit, last = "slice and object", CLIP_SLICES - 1
    output = run("mask decoder", unit, lambda: segmenter.decode(features, prompt))
    remember = partial(segmenter.remember, features, output.logits, output.presence, output.pointer)
    memory = run("memory encoder", unit, remember)
    tracked = dict.fromkeys(range(1, last), memory)
    attend = partial(segmenter.attend, features, last, {0: memory}, tracked, CLIP_SLICES, reverse=False)
    run("memory attention", unit, attend)


def _stage(model: UnifiedModel, members: Sequence[_Member], name: str) -> StageCost:
    """One forward of a stage with gradients where it trains."""
    model.requires_grad_(False)
    for member in members:
        for weight in member.weights if name in member.stages else ():
            weight.requires_grad_(True)
    steps = _run(model, STAGES[name]).values()
    results = sum(step.peak * (CLIP_SLICES if step.unit.startswith("slice") else 1) for step in steps)
    present = [member for member in members if member.side in STAGES[name]]
    trained = sum(member.parameters for member in present if name in member.stages)
    frozen = sum(member.parameters for member in present) - trained
    return StageCost(name, trained, 16 * trained + 2 * frozen, results)
