"""Which slices show what a text means, after Med-2E3's text-guided scoring of slices (arXiv 2411.12783).

Every place of every slice is compared with the ``[SEG]`` token. One softmax over all places of the volume, summed by
slice, is the chance that the object is met there, so its target is how the object's area is spread over the slices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SliceScorer(nn.Module):
    """Scores (K, N) of K ``[SEG]`` tokens against N slices; a softmax over the slices turns them into chances."""

    def __init__(self, width: int) -> None:
        """``width``: of tokens and features (``d_model``)."""
        super().__init__()
        self.query = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.key = nn.Linear(width, width)
        self.scale = width**-0.5

    def forward(self, tokens: Tensor, coarse: Tensor) -> Tensor:
        """Tokens (K, C) and coarse features (N, C, h, w) to logits (K, N) in float32."""
        keys = self.key(coarse.flatten(2).transpose(1, 2))
        alike = torch.einsum("kc,npc->knp", self.query(tokens), keys) * self.scale
        return torch.logsumexp(alike.float(), dim=-1)


def slice_score_loss(scores: Tensor, areas: Tensor) -> tuple[Tensor, float]:
    """Cross entropy of ``scores`` (K, N) with the spread of ``areas`` (K, N), and the share of right start slices.

    A start slice is right when it shows the object. Rows without any area take no part; without such rows the loss is
    0 and the share not a number.
    """
    there = areas.sum(dim=1) > 0
    if not bool(there.any()):
        return scores.sum() * 0, float("nan")
    scores, areas = scores[there].float(), areas[there]
    wanted = areas / areas.sum(dim=1, keepdim=True)
    loss = -(wanted * F.log_softmax(scores, dim=1)).sum(dim=1).mean()
    right = areas.gather(1, scores.argmax(dim=1, keepdim=True)) > 0
    return loss, float(right.float().mean())
