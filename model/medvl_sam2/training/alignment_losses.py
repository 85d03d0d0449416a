"""Losses of the alignment stage: pairwise sigmoid over all processes, and reconstruction of what was hidden."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from medvl_sam2.config import VisionConfig
from medvl_sam2.training.ranks import gathered


def siglip_loss(images: Tensor, texts: Tensor, keys: Tensor, valid: Tensor, t_prime: Tensor, bias: Tensor) -> Tensor:
    """``-sum log sigmoid(z (exp(t') x.y + b)) / pairs`` over every image and every text of all processes.

    ``images`` and ``texts`` (n, width), unit vectors, row by row a pair; ``keys`` (n,) int64: texts with the same key
    are the same text, so they match each other's image too; ``valid`` (n,) bool: the others take no part. ``z`` is 1
    where key equals key and -1 elsewhere.

    The result is this process's share, scaled so that the mean over processes is the loss of the whole batch divided by
    its valid rows; n must be the same in every process.
    """
    all_texts, all_keys, all_valid = gathered(texts), gathered(keys), gathered(valid.to(images.dtype))
    logits = torch.exp(t_prime) * images @ all_texts.T + bias
    signs = torch.where(keys[:, None] == all_keys[None], 1.0, -1.0)
    pairs = valid.to(images.dtype)[:, None] * all_valid[None]
    rows = all_valid.sum() * len(images) / len(all_texts)
    return -(functional.logsigmoid(signs * logits) * pairs).sum() / rows.clamp_min(1.0)


class RegionHead(nn.Module):
    """Organ tokens in the shared space, with a temperature and bias of their own (after CT-GLIP).

    Used in training only.
    """

    def __init__(self, vision: VisionConfig, width: int, stage: int) -> None:
        super().__init__()
        self.stage, self.grid = stage, vision.grid(stage)
        self.project = nn.Linear(vision.channels[stage], width)
        self.t_prime = nn.Parameter(torch.tensor([math.log(10.0)]))
        self.bias = nn.Parameter(torch.tensor([-10.0]))

    def forward(self, maps: list[Tensor], rows: Tensor, cells: Tensor) -> Tensor:
        """Unit vectors (R, width) of the regions ``cells`` (R, d, h, w), any weights, of the volumes ``rows`` (R,)."""
        weights = functional.adaptive_avg_pool3d(cells[:, None], self.grid).flatten(1)
        weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-6)
        pooled = torch.einsum("rn,rnc->rc", weights, maps[self.stage].float()[rows])
        return functional.normalize(self.project(pooled).float(), dim=-1)


class Reconstruction(nn.Module):
    """Predicts hidden blocks of a volume from the tokens round them (after E3D-GPT); for volumes without any text.

    One token of ``stage`` predicts the mean values of the ``side``^3 parts of its own block of voxels.
    """

    def __init__(self, vision: VisionConfig, stage: int, side: int = 4) -> None:
        super().__init__()
        self.stage, self.grid, self.side = stage, vision.grid(stage), side
        self.read = nn.Linear(vision.channels[stage], side**3)

    def hide(self, views: Tensor, share: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Views (B, 1, D, H, W) with a ``share`` of their blocks set to the mean, and which tokens (B, n) those are.

        A block is two tokens wide along every axis.
        """
        d, h, w = self.grid
        coarse = rng.random((len(views), 1, -(-d // 2), -(-h // 2), -(-w // 2))) < share
        tokens = torch.from_numpy(coarse.repeat(2, 2).repeat(2, 3).repeat(2, 4)[:, :, :d, :h, :w])
        tokens = tokens.to(views.device)
        hidden = functional.interpolate(tokens.float(), size=views.shape[2:], mode="nearest") > 0.5
        means = views.mean(dim=(2, 3, 4), keepdim=True)
        return torch.where(hidden, means, views), tokens.flatten(1)

    def forward(self, maps: list[Tensor], views: Tensor, hidden: Tensor) -> Tensor:
        """Mean squared error (0-d) of the hidden tokens (B, n) against the unhidden ``views`` (B, 1, D, H, W)."""
        d, h, w = self.grid
        side = self.side
        parts = functional.adaptive_avg_pool3d(views, (d * side, h * side, w * side))
        blocks = parts.reshape(-1, d, side, h, side, w, side).permute(0, 1, 3, 5, 2, 4, 6)
        wanted = blocks.reshape(-1, d * h * w, side**3)
        error = (self.read(maps[self.stage]).float() - wanted).square().mean(dim=-1)
        return (error * hidden).sum() / hidden.sum().clamp_min(1)
