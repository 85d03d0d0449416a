"""The unified model: one language pass, one segmentation pass, joined by the ``[SEG]`` state.

::

    volume --global view--> DCFormer -> projector, scene -> language model -> answer text
                                            |                   |
                                      maps of organs       [SEG] state -> seg projector -> l (1, C)
                                      and lesions <-points at-- |                              |
                                            |                                                  |
                                       rough place (mask prompt)                               |
                                            v                                                  v
    volume --slices--> SAM2 encoder -> features --+-- points, boxes, masks, l -> decoder -> logits per slice
                                                  +-- memory across slices (both directions from the start)

:meth:`UnifiedModel.answer` is the language pass and :meth:`UnifiedModel.segment` the segmentation pass of a single
set of rows. Clicks never touch the language model, so they stay fast; a first click or box may start from the scene.
How slices are visited (start slice, windows, propagation) is the predictor's business. The scene and its pointer are
this project's addition; without them (``SceneConfig(lesions=0)``) the rough place is left out and ``l`` alone finds the
object on the slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from medvl_sam2.config import ModelConfig
from medvl_sam2.errors import ConfigError
from medvl_sam2.geometry import global_view
from medvl_sam2.intensity import IntensityRange, global_channel
from medvl_sam2.modeling.scene_measured import MeasuredScene
from medvl_sam2.modeling.scene_pointer import SceneElements, lesions_within, pointed_place, scene_elements
from medvl_sam2.modeling.slice_segmenter import SliceFeatures, SliceOutput, SlicePrompt, SliceSegmenter
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.vision_language import VisionLanguage
from medvl_sam2.types import Modality


def language_view(
    image: np.ndarray, spacing: tuple[float, float, float], modality: Modality, size: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Input of :meth:`UnifiedModel.look` from a canonical image (Z, Y, X): view (1, 1, D, H, W), edges in mm (1, 3).

    One slab at a time: as floats a whole-body volume takes gigabytes.
    """
    extent = [n * s for n, s in zip(image.shape, spacing, strict=True)]
    limits = None if modality is Modality.CT else IntensityRange.of(image)
    count, rows = image.shape[0], min(image.shape[0], size[0])
    slabs = []
    for n in range(rows):
        slab = image[count * n // rows : -(-count * (n + 1) // rows)]
        slabs.append(global_view(global_channel(slab, modality, limits), (1, size[1], size[2])))
    return global_view(torch.cat(slabs)[:, 0], size)[None], torch.tensor([extent], dtype=torch.float32)


@dataclass(frozen=True)
class GlobalLook:
    """One volume as the language side sees it: ``tokens`` (1, n, H) and, with a scene stream, its ``elements``.

    ``scene``: what was measured of it, where :meth:`UnifiedModel.look` made this.
    """

    tokens: Tensor
    elements: SceneElements | None
    scene: MeasuredScene | None = None

    def readable(self) -> GlobalLook:
        """The same with what is read without the network, the maps and measurements, on the CPU."""
        elements = None if self.elements is None else replace(self.elements, maps=self.elements.maps.cpu())
        return replace(self, elements=elements, scene=None if self.scene is None else self.scene.to("cpu"))


@dataclass(frozen=True)
class Grounding:
    """K requests made spatial: sparse prompts ``language`` (K, C) and rough places (K, d, h, w) as logits, if any."""

    language: Tensor
    place: Tensor | None


class UnifiedModel(nn.Module):
    """MedVL-SAM2: :class:`VisionLanguage` and :class:`SliceSegmenter` under one roof."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        """Raises :class:`ConfigError` for the configuration of an image-text model, whose head this one lacks."""
        super().__init__()
        if config.alignment is not None:
            raise ConfigError(
                f"configuration {config.name!r} has an alignment section, which belongs to an image-text model; build "
                "an ImageTextModel from it, or set alignment to null"
            )
        self.config = config
        self.language = VisionLanguage(config, tokenizer)
        self.segmenter = SliceSegmenter(config.slices)

    def look(self, view: Tensor, extent_mm: Tensor) -> GlobalLook:
        """Encode one global view (1, 1, D, H, W) of edges ``extent_mm`` (1, 3)."""
        language = self.language
        maps = language.vision(view)
        if language.scene is None:
            return GlobalLook(language.project(maps, extent_mm, None), None)
        logits = language.scene(view, maps)
        facts = language.scene.measure(view, logits, extent_mm)
        tokens = language.project(maps, extent_mm, facts)
        elements = scene_elements(tokens[0, -self.config.scene_tokens :], logits[0], self.config)
        judged = language.scene.judged(facts)
        return GlobalLook(tokens, elements, MeasuredScene(judged.organs, judged.lesions, extent_mm))

    def answer(self, image_tokens: Tensor, questions: Sequence[str], max_new_tokens: int = 160) -> list[str]:
        """Greedy replies about one volume; ``image_tokens`` (1, n, H) come from :meth:`look`."""
        return self.language.generate(image_tokens, questions, max_new_tokens)

    def ground(
        self,
        look: GlobalLook,
        requests: Sequence[str],
        replies: Sequence[str],
        names: Sequence[str] = (),
        within: Sequence[str] = (),
        single: bool = False,
    ) -> Grounding:
        """Step 1 of text-prompted segmentation: what every ``[SEG]`` in ``replies`` means and roughly where it is.

        ``names``: the vocabulary class of every ``[SEG]``, where the request is a plain class name. That needs no
        pointing: the scene's map has a channel of that name, and ``lesion`` is all lesion slots. ``within``: organ
        classes that a lesion must lie in to be meant; ``single``: every request means one object.
        """
        states = self.language.seg_states(look.tokens, requests, replies)
        vectors = self.language.seg_projector(states)
        if self.language.pointer is None or look.elements is None:
            return Grounding(vectors, None)
        if names:
            return Grounding(vectors, self._class_places(look.elements, names))
        scores = self.language.pointer(states, look.elements.tokens).to(look.elements.maps.device)
        organs = self.config.scene_organs
        hosts = {organs.index(name) for name in within if name in organs}
        if hosts:
            scores = lesions_within(scores, look.elements, hosts)
        return Grounding(vectors, pointed_place(scores, look.elements, single))

    def point(self, look: GlobalLook, requests: Sequence[str], replies: Sequence[str]) -> Tensor:
        """Logits (K, E) of every ``[SEG]`` in ``replies`` against the elements of the scene.

        Raises:
            ConfigError: the model has no scene to point at.
        """
        if self.language.pointer is None or look.elements is None:
            raise ConfigError("this model has no scene to point at; its configuration says SceneConfig(lesions=0)")
        states = self.language.seg_states(look.tokens, requests, replies)
        scores: Tensor = self.language.pointer(states, look.elements.tokens)
        return scores

    def _class_places(self, elements: SceneElements, names: Sequence[str]) -> Tensor:
        """Rough places (K, d, h, w) of vocabulary classes."""
        maps, organs = elements.maps, self.config.scene_organs
        return torch.stack(
            [maps[organs.index(n)] if n in organs else maps[elements.organs :].amax(dim=0) for n in names]
        )

    def segment(
        self,
        features: SliceFeatures,
        prompt: SlicePrompt,
        language: Tensor | None = None,
        fused: Tensor | None = None,
    ) -> SliceOutput:
        """Step 2: decode B rows from geometric prompts, ``language`` (B, C), or both, with memory when ``fused``."""
        if language is not None:
            prompt = replace(prompt, language=language)
        return self.segmenter.decode(features, prompt, fused)
