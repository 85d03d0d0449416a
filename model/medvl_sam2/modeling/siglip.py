"""SigLIP head: volumes and texts in one space (Zhai et al., arXiv 2303.15343; Med3DVLM's ``DEC_CLIP``).

Module names follow the published checkpoint (``language_encoder.*``, ``mm_vision_proj.*``, ``mm_language_proj.*``,
``t_prime``, ``bias``); the volume encoder stands beside the head, in :class:`ImageTextModel`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from medvl_sam2.config import AlignmentConfig, ModelConfig, VisionConfig
from medvl_sam2.errors import CheckpointError, ConfigError
from medvl_sam2.modeling.dcformer import DCFormer
from medvl_sam2.modeling.text_tower import build_text_encoder, text_batch
from medvl_sam2.modeling.tokenizer import Tokenizer


class SiglipHead(nn.Module):
    """Text encoder, two projections, and temperature and bias of the pairwise loss: logits ``exp(t_prime) x.y + bias``.

    Both start as in the paper; the published weights began with ln(1/0.07) and 0.
    """

    def __init__(self, vision: VisionConfig, config: AlignmentConfig, pad_id: int = 0, features: int | None = None):
        """``features`` of what is projected of a volume; default: channels of the encoder's last map."""
        super().__init__()
        self.config = config
        self.pad_id = pad_id
        self.language_encoder = build_text_encoder(config, pad_id)
        self.mm_vision_proj = nn.Linear(features or vision.channels[-1], config.width)
        self.mm_language_proj = nn.Linear(config.hidden_size, config.width)
        self.t_prime = nn.Parameter(torch.tensor([math.log(10.0)]))  # one dimension: FSDP shards no scalars
        self.bias = nn.Parameter(torch.tensor([-10.0]))

    def embed_volumes(self, maps: list[Tensor]) -> Tensor:
        """Token maps of the volume encoder to unit vectors (B, width): the last map's mean, projected."""
        return functional.normalize(self.mm_vision_proj(maps[-1].mean(dim=1)).float(), dim=-1)

    def embed_texts(self, ids: Tensor) -> Tensor:
        """Ids (B, L) of :func:`~medvl_sam2.modeling.text_tower.text_batch` to unit vectors (B, width)."""
        states = self.language_encoder(input_ids=ids, attention_mask=ids != self.pad_id).last_hidden_state
        return functional.normalize(cast(Tensor, self.mm_language_proj(states[:, 0])).float(), dim=-1)


class TextSide(nn.Module):
    """Texts as unit vectors in the space of the head ``alignment``; what volumes are embedded from is added to it."""

    alignment: SiglipHead

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
        """``tokenizer`` None: that of the text tower is not read here, so only ids can be embedded."""
        super().__init__()
        self.config, self.tokenizer = config, tokenizer

    @property
    def pad_id(self) -> int:
        """Of the tokenizer."""
        return 0 if self.tokenizer is None else self.tokenizer.pad_id

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (B, width); of a text that is too long the first sentences count.

        Raises :class:`CheckpointError` where the text tower's tokenizer is not one of this project.
        """
        if self.tokenizer is None:
            raise CheckpointError(
                "the text tower was trained with a tokenizer that is not read here (ClinicalBERT's word pieces); "
                "give its ids to alignment.embed_texts(), or train a tower with the alignment stage"
            )
        ids = text_batch(self.tokenizer, texts, self.alignment.config.max_length)
        return self.alignment.embed_texts(ids.to(self.alignment.t_prime.device))


class ImageTextModel(TextSide):
    """Volume encoder and SigLIP head: volumes and reports as unit vectors whose product is their similarity.

    A model of its own beside :class:`~medvl_sam2.modeling.unified.UnifiedModel`, because later stages move that one's
    encoder away from the head.
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
        """Raises :class:`ConfigError` when ``config`` describes no head, or one without an encoder of its own."""
        super().__init__(config, tokenizer)
        if config.alignment is None:
            raise ConfigError("the configuration has no 'alignment' section; take config.json of an alignment stage")
        if config.alignment.scene is not None:
            raise ConfigError("the head reads the scene of a checkpoint (alignment.scene); build a SceneTextModel")
        self.vision = DCFormer(config.vision)
        self.alignment = SiglipHead(config.vision, config.alignment, self.pad_id)

    def embed_views(self, views: Tensor) -> Tensor:
        """Global views (B, 1, D, H, W) in [0, 1], canonical axes, to unit vectors (B, width)."""
        return self.alignment.embed_volumes(self.vision(views))
