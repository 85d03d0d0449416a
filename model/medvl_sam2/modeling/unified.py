"""The unified model: one language pass, one segmentation pass, joined by the ``[SEG]`` state.

::

    volume --global view--> DCFormer -> projector -> language model -> answer text
                                                        |
                                                  [SEG] state -> seg projector -> l (1, C)
                                                                                   |
    volume --slices--> SAM2 encoder -> features --+-- points, boxes, masks, l -> decoder -> logits per slice
                                                  +-- memory across slices (both directions from the start)

:meth:`UnifiedModel.answer` is the language pass and :meth:`UnifiedModel.segment` the segmentation pass of a single
set of rows. Clicks never touch the language model, so they stay fast. How slices are visited (start slice, windows,
propagation) is the predictor's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from medvl_sam2.config import ModelConfig
from medvl_sam2.modeling.slice_segmenter import SliceFeatures, SliceOutput, SlicePrompt, SliceSegmenter
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.vision_language import VisionLanguage


class UnifiedModel(nn.Module):
    """MedVL-SAM2: :class:`VisionLanguage` and :class:`SliceSegmenter` under one roof."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config = config
        self.language = VisionLanguage(config, tokenizer)
        self.segmenter = SliceSegmenter(config.slices)

    def answer(self, image_tokens: Tensor, questions: Sequence[str], max_new_tokens: int = 160) -> list[str]:
        """Greedy replies about one volume; ``image_tokens`` (1, n, H) come from ``language.encode_image``."""
        return self.language.generate(image_tokens, questions, max_new_tokens)

    def language_tokens(self, image_tokens: Tensor, requests: Sequence[str], replies: Sequence[str]) -> Tensor:
        """Step 1 of text-prompted segmentation: a sparse prompt (K, C) for every ``[SEG]`` in ``replies``."""
        return self.language.seg_tokens(image_tokens, requests, replies)

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
