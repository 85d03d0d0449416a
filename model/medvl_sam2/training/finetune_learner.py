"""The unified model under finetuning: which weights move, and what one step is.

Trained: mask decoder, memory attention and memory encoder of the segmenter, LoRA adapters on the language model, and
the projector of its ``[SEG]`` state. Frozen: both image encoders, the prompt encoder and the language model itself.

One step draws windows with simulated boxes, clicks and rough masks, and in turn a stack of slices (memory) or whole
slices of one volume asked for by name; the names go through the language model, so its adapters learn from the masks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medvl_sam2.checkpoint import ALIGNMENT_FOLDER, CheckpointMeta, load_checkpoint, load_into, save_checkpoint
from medvl_sam2.errors import CheckpointError
from medvl_sam2.modeling.lora import add_lora, merge_lora
from medvl_sam2.modeling.prompts import SEGMENT_PROMPTS, segment_prompt, segment_reply
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.unified import UnifiedModel, language_view
from medvl_sam2.predictor.predictor import Predictor
from medvl_sam2.synthesis.case import generate_case
from medvl_sam2.training.finetune import FinetuneBackend
from medvl_sam2.training.finetune_records import FinetuneConfig
from medvl_sam2.training.samples import CONCEPTS, LabelledVolume
from medvl_sam2.training.segmentation_steps import SegmentationLearner, SegmentationSteps
from medvl_sam2.training.slice_batches import SliceSampler
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
    warmup: int = 10
    """Steps over which the learning rate rises."""


def spoken_concept(concept: int) -> str:
    """What a person says for a concept: ``right kidney``, ``lesion in the liver``."""
    name = CONCEPTS[concept]
    inside = name.removeprefix("lesion_in_")
    return spoken(name) if inside == name else f"lesion in the {spoken(inside)}"


class LanguageTokens(nn.Module):
    """Concepts to sparse prompts, by the language model's ``[SEG]`` state on one volume.

    Stands where pretraining has a table of stand-in tokens. Without a volume (windows of many volumes at once) it gives
    the language model's mean token of each concept, as a constant.
    """

    table: Tensor

    def __init__(self, model: UnifiedModel, rng: np.random.Generator) -> None:
        """``rng`` picks the wording of each request."""
        super().__init__()
        self._model = (model,)  # in a tuple: the model is not a part of this module
        self._rng = rng
        self._volume: Tensor | None = None
        self.register_buffer("table", torch.zeros(len(CONCEPTS), model.config.slices.d_model), persistent=False)

    def on(self, image_tokens: Tensor | None) -> None:
        """Speak about the volume with these image tokens (1, n, H); None: about no volume in particular."""
        self._volume = image_tokens

    @torch.no_grad()
    def fill_table(self, volumes: Sequence[Tensor]) -> None:
        """Mean token of every concept over the given volumes' image tokens."""
        everything = list(range(len(CONCEPTS)))
        self.table = torch.stack([self._spoken(tokens, everything, vary=False) for tokens in volumes]).mean(dim=0)

    def forward(self, concepts: Tensor) -> Tensor:
        """Concept indices (K,) to tokens (K, d_model)."""
        if self._volume is None:
            return self.table[concepts]
        unique, where = torch.unique(concepts, return_inverse=True)
        return self._spoken(self._volume, unique.tolist(), vary=True)[where]

    def _spoken(self, image_tokens: Tensor, concepts: Sequence[int], vary: bool) -> Tensor:
        names = [spoken_concept(concept) for concept in concepts]
        pick = self._rng.integers(len(SEGMENT_PROMPTS), size=len(names)) if vary else np.zeros(len(names), dtype=int)
        requests = [segment_prompt([name], SEGMENT_PROMPTS[int(n)]) for name, n in zip(names, pick, strict=True)]
        replies = [segment_reply([name], [True]) for name in names]
        return self._model[0].language.seg_tokens(image_tokens, requests, replies)


class UnifiedLearner:
    """A :class:`~medvl_sam2.training.finetune.Learner` over a checkpoint of the unified model."""

    def __init__(self, base: Path, config: FinetuneConfig, size: StepSize | None = None) -> None:
        """Load ``base`` and freeze what does not move."""
        checkpoint = load_checkpoint(base)
        self._tokenizer_path = checkpoint.tokenizer_path
        self._size = size or StepSize()
        self._rate = config.learning_rate
        torch.manual_seed(config.seed)
        self.model = UnifiedModel(checkpoint.config, Tokenizer.load(checkpoint.tokenizer_path))
        load_into(self.model, checkpoint.state)
        self.model.eval().requires_grad_(False)
        language = checkpoint.config.language
        add_lora(self.model.language.lm, language.lora_rank, language.lora_alpha)
        self.trained = dict(self._choose())
        self._optimiser = torch.optim.AdamW(self.trained.values(), lr=self._rate, weight_decay=0.01)
        self._rng = np.random.default_rng(config.seed)
        learner = SegmentationLearner(self.model.segmenter)
        self._tokens = LanguageTokens(self.model, self._rng)
        learner.concept_tokens = self._tokens  # type: ignore[assignment]
        self._steps = SegmentationSteps(learner, config.seed)
        self._seen: list[LabelledVolume] = []
        self._views: list[Tensor] = []
        self._by_name: list[tuple[SliceSampler, Tensor, float]] = []
        self._sampler: SliceSampler | None = None
        self._done = 0

    def begin(self, volumes: Sequence[LabelledVolume], weights: Sequence[float], seed: int) -> None:
        """Draw from ``volumes`` from now on; image tokens are computed the first time a volume is seen."""
        image_size = self.model.config.slices.image_size
        if len(volumes) != len(self._seen) or any(a is not b for a, b in zip(volumes, self._seen, strict=True)):
            self._seen = list(volumes)
            self._views = [self._image_tokens(volume) for volume in volumes]
        self._tokens.fill_table(self._views[-6:])  # once an epoch: the adapters move the tokens
        torch.manual_seed(seed)
        self._rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
        self._steps.rng = np.random.default_rng(seed + 1)
        self._sampler = SliceSampler(volumes, weights, seed + 2, image_size)
        self._by_name = [
            (SliceSampler([volume], [1.0], seed + 3 + n, image_size), tokens, weight)
            for n, (volume, tokens, weight) in enumerate(zip(volumes, self._views, weights, strict=True))
            if any(target.concept is not None for target in volume.targets)
        ]

    def step(self) -> float:
        """Windows every time; in turn a stack of slices or whole slices by name."""
        if self._sampler is None:
            raise CheckpointError("nothing to draw from; call begin() before step()")
        size, sampler = self._size, self._sampler
        self.model.segmenter.train()
        self._tokens.on(None)
        windows = [sampler.window() for _ in range(size.windows)]
        loss, _, _ = self._steps.window_loss(windows, rounds=int(self._rng.integers(0, 4)))
        if self._done % 2 == 0 or not self._by_name:
            clips = [sampler.window(size.clip_length) for _ in range(size.clips)]
            loss = loss + self._steps.memory_loss(clips)[0]
        else:
            loss = loss + self._named_loss()
        self._done += 1
        for group in self._optimiser.param_groups:
            group["lr"] = self._rate * min(1.0, self._done / size.warmup)
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.trained.values()), 1.0)
        self._optimiser.step()
        return float(loss.detach())

    def save_state(self, folder: Path) -> None:
        """Trained weights in fp32, optimiser and step count."""
        weights = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        save_file(weights, folder / "trained.safetensors", metadata={"steps": str(self._done)})
        torch.save({"optimiser": self._optimiser.state_dict(), "steps": self._done}, folder / "optimiser.pt")

    def load_state(self, folder: Path) -> None:
        """Go on from :meth:`save_state`; :class:`CheckpointError` when it belongs to another model."""
        weights = load_file(folder / "trained.safetensors")
        if set(weights) != set(self.trained):
            odd = sorted(set(weights) ^ set(self.trained))[0]
            raise CheckpointError(f"state {folder} does not fit: weight {odd!r}; delete the run folder to begin anew")
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(weights[name])
        state = torch.load(folder / "optimiser.pt", weights_only=True)
        self._optimiser.load_state_dict(state["optimiser"])
        self._done = int(state["steps"])

    def export(self, directory: Path, meta: CheckpointMeta) -> None:
        """The model with its adapters merged, as a checkpoint like any other."""
        merged = copy.deepcopy(self.model)
        merge_lora(merged.language.lm)
        save_checkpoint(
            directory, merged.state_dict(), merged.config, self._tokenizer_path, meta, overwrite=True,
            alignment=self._tokenizer_path.parent / ALIGNMENT_FOLDER,
        )  # fmt: skip

    def _named_loss(self) -> Tensor:
        chance = np.array([weight for _, _, weight in self._by_name])
        sampler, tokens, _ = self._by_name[int(self._rng.choice(len(chance), p=chance / chance.sum()))]
        self._tokens.on(tokens)
        slices = [sampler.whole_slice(self._size.concepts) for _ in range(self._size.whole_slices)]
        loss, _ = self._steps.named_loss(slices, dense_weight=0.0)
        self._tokens.on(None)
        return loss

    def _choose(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that move, switched on."""
        for name, parameter in self.model.named_parameters():
            inside = name.removeprefix("segmenter.")
            segmenter = inside != name and not inside.startswith(_FROZEN_PARTS)
            adapter = ".lora_a" in name or ".lora_b" in name or name.startswith("language.seg_projector.")
            if segmenter or adapter:
                parameter.requires_grad_(True)
                yield name, parameter

    @torch.no_grad()
    def _image_tokens(self, volume: LabelledVolume) -> Tensor:
        """Image tokens (1, n, H) of the global view, as the predictor computes them."""
        size = self.model.config.vision.input_size
        return self.model.language.encode_image(*language_view(volume.image, volume.spacing, volume.modality, size))


def default_backend() -> FinetuneBackend:
    """The shipped model code: the unified learner, the served predictor, the generator."""
    return FinetuneBackend(UnifiedLearner, Predictor.load, generate_case, from_case)
