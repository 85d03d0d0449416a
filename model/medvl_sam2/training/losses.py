"""Mask losses of SAM2's recipe (20 focal + Dice + IoU + object score), adapted to small data.

Binary cross-entropy stands for focal loss, and masks of absent objects are trained too: without that, propagation
leaks over empty slices (measured on this project's data).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medvl_sam2.modeling.slice_segmenter import SliceOutput


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms of :func:`mask_loss`."""

    bce: float = 5.0
    dice: float = 1.0
    iou: float = 0.5
    presence: float = 0.5


def mask_loss(output: SliceOutput, truth: Tensor, weights: LossWeights) -> Tensor:
    """Mean loss over B rows. ``truth`` (B, T, T) soft mask in [0, 1]; logits are upsampled to its grid first."""
    logits = F.interpolate(output.logits, size=truth.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(dim=(1, 2))
    probability = torch.sigmoid(logits)
    present = (truth.amax(dim=(1, 2)) > 0.5).float()
    overlap = (probability * truth).sum(dim=(1, 2))
    total = probability.sum(dim=(1, 2)) + truth.sum(dim=(1, 2))
    dice = (1 - (2 * overlap + 1) / (total + 1)) * present
    with torch.no_grad():
        guess, real = logits > 0, truth > 0.5
        union = (guess | real).sum(dim=(1, 2)).clamp(min=1)
        actual = (guess & real).sum(dim=(1, 2)) / union
    iou = (output.iou - actual).abs() * present
    presence = F.binary_cross_entropy_with_logits(output.presence, present, reduction="none")
    loss: Tensor = weights.bce * bce + weights.dice * dice + weights.iou * iou + weights.presence * presence
    return loss.mean()


def dice_score(logits: Tensor, truth: Tensor) -> Tensor:
    """Hard Dice (B,) of logits (B, 1, h, h) against soft truth (B, T, T); 1 where both are empty."""
    guess = F.interpolate(logits, size=truth.shape[-2:], mode="bilinear", align_corners=False)[:, 0] > 0
    real = truth > 0.5
    total = guess.sum(dim=(1, 2)) + real.sum(dim=(1, 2))
    return torch.where(total > 0, 2 * (guess & real).sum(dim=(1, 2)) / total.clamp(min=1), torch.ones_like(total) * 1.0)
