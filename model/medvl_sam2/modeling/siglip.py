"""SigLIP head: volumes and texts in one space (Zhai et al., arXiv 2303.15343; Med3DVLM's ``DEC_CLIP``).

Module names follow the published checkpoint (``language_encoder.*``, ``mm_vision_proj.*``, ``mm_language_proj.*``,
``t_prime``, ``bias``); the volume encoder stands outside.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from medvl_sam2.config import AlignmentConfig, VisionConfig
from medvl_sam2.modeling.text_tower import build_text_encoder


class SiglipHead(nn.Module):
    """Text encoder, two projections, and temperature and bias of the pairwise loss: logits ``exp(t_prime) x.y + bias``.

    Both start as in the paper; the published weights began with ln(1/0.07) and 0.
    """

    def __init__(self, vision: VisionConfig, config: AlignmentConfig, pad_id: int = 0):
        super().__init__()
        self.config = config
        self.pad_id = pad_id
        self.language_encoder = build_text_encoder(config, pad_id)
        self.mm_vision_proj = nn.Linear(vision.channels[-1], config.width)
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
