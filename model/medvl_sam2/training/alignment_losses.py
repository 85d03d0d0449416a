"""Losses of the alignment stage: pairwise sigmoid over all processes, and reconstruction of what was hidden."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from medvl_sam2.config import VisionConfig
from medvl_sam2.training.ranks import gathered


class Pairs(NamedTuple):
    """Texts that images are compared with: unit vectors (n, width), ``keys`` (n,) int64 and ``valid`` (n,) bool.

    Texts with the same key are the same text, so they match each other's image too; invalid rows take no part.
    """

    texts: Tensor
    keys: Tensor
    valid: Tensor

    def gathered(self) -> Pairs:
        """Those of every process, in rank order; n must be the same in each."""
        return Pairs(gathered(self.texts), gathered(self.keys), gathered(self.valid.long()).bool())


def siglip_loss(images: Tensor, own: Pairs, others: Pairs, t_prime: Tensor, bias: Tensor) -> Tensor:
    """``-sum log sigmoid(z (exp(t') x.y + b)) / pairs`` over ``images`` (n, width) and the texts of ``others``.

    ``own``: the images' own texts, row by row; ``z`` is 1 where key equals key and -1 elsewhere. In a training
    ``others`` are ``own.gathered()``: the result is then this process's share, scaled so that the mean over processes
    is the loss of the whole batch divided by its valid rows.
    """
    with torch.autocast(images.device.type, enabled=False):  # exp(t') would multiply the rounding of bfloat16
        logits = torch.exp(t_prime) * (images @ others.texts.T) + bias
    signs = torch.where(own.keys[:, None] == others.keys[None], 1.0, -1.0)
    counted = own.valid[:, None] & others.valid[None]
    rows = others.valid.sum() * len(images) / len(others.texts)
    return -(functional.logsigmoid(signs * logits) * counted).sum() / rows.clamp_min(1.0)


def text_keys(texts: Sequence[str]) -> Tensor:
    """The same number (n,) for the same text, in every process."""
    return torch.tensor([zlib.crc32(text.encode()) for text in texts])


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

    def forward(self, maps: list[Tensor], views: Tensor, hidden: Tensor, shared: bool = False) -> Tensor:
        """Mean squared error (0-d) of the hidden tokens (B, n) against the unhidden ``views`` (B, 1, D, H, W).

        ``shared``: other processes have other rows of the batch; the mean over them is then that of all rows.
        """
        d, h, w = self.grid
        side = self.side
        parts = functional.adaptive_avg_pool3d(views, (d * side, h * side, w * side))
        blocks = parts.reshape(-1, d, side, h, side, w, side).permute(0, 1, 3, 5, 2, 4, 6)
        wanted = blocks.reshape(-1, d * h * w, side**3)
        error = (self.read(maps[self.stage]).float() - wanted).square().mean(dim=-1)
        count = hidden.sum().float()[None]
        count = gathered(count).mean() if shared else count[0]
        return (error * hidden).sum() / count.clamp_min(1)
