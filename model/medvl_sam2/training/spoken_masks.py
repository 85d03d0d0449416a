"""Mask losses of ``[SEG]`` tokens: in windows that the scene located, or on whole slices that the text must find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from medvl_sam2.modeling.slice_scorer import slice_score_loss
from medvl_sam2.modeling.slice_segmenter import SliceOutput, SlicePrompt
from medvl_sam2.modeling.unified import UnifiedModel
from medvl_sam2.training.losses import LossWeights, dice_score, mask_loss
from medvl_sam2.training.slice_batches import Sheet


class SpokenRow(NamedTuple):
    """One slice for request ``request``; ``rough`` (h, h) logits of the scene's map, where there is one."""

    request: int
    image: Tensor
    height: float
    truth: Tensor
    rough: Tensor | None


class SheetLoss(NamedTuple):
    """Loss of the masks, mean Dice where there is one, loss of the slices' scores and share of right start slices.

    ``placed``: requests that have a mask on some slice; the last two figures are over them alone.
    """

    masks: Tensor
    dice: float
    scores: Tensor
    right: float
    placed: int


def spoken_rows_loss(
    model: UnifiedModel, rows: Sequence[SpokenRow], vectors: Tensor, weights: LossWeights
) -> tuple[Tensor, float]:
    """Mask loss of ``rows``, each with the token (R, C) of its request, and the mean Dice where there is a mask."""
    device = vectors.device
    with torch.no_grad():
        features = model.segmenter.encode(torch.stack([row.image for row in rows]).to(device))
    heights = torch.tensor([row.height for row in rows], dtype=torch.float32, device=device)
    prompt = replace(SlicePrompt.empty(len(rows), device), height=heights)
    rough = [row.rough for row in rows if row.rough is not None]
    if rough:
        present = torch.ones(len(rows), dtype=torch.bool, device=device)
        prompt = replace(prompt, mask_logits=torch.stack(rough)[:, None].to(device), mask_present=present)
    output = model.segment(features, prompt, language=vectors[[row.request for row in rows]])
    masks = torch.stack([row.truth for row in rows]).to(device)
    return mask_loss(output, masks, weights), _mean_dice(output, masks)


def sheet_loss(model: UnifiedModel, sheet: Sheet, vectors: Tensor, weights: LossWeights) -> SheetLoss:
    """Losses of K requests, their tokens ``vectors`` (K, C), on the whole slices of one volume."""
    device, segmenter = vectors.device, model.segmenter
    with torch.no_grad():
        features = segmenter.encode(sheet.images.to(device))
    shown = sheet.shown.flatten()
    prompt = replace(SlicePrompt.empty(len(shown), device), height=sheet.heights[shown].to(device))
    language = vectors.repeat_interleave(sheet.shown.shape[1], dim=0)
    output = model.segment(features.rows(shown.to(device)), prompt, language=language)
    masks = sheet.truth.flatten(0, 1).to(device)
    scores, right = vectors.sum() * 0, float("nan")
    if segmenter.scorer is not None:
        scores, right = slice_score_loss(segmenter.scorer(vectors, features.coarse), sheet.areas.to(device))
    placed = int((sheet.areas.sum(dim=1) > 0).sum())
    return SheetLoss(mask_loss(output, masks, weights), _mean_dice(output, masks), scores, right, placed)


def _mean_dice(output: SliceOutput, masks: Tensor) -> float:
    dice = dice_score(output.logits.detach(), masks)[masks.amax(dim=(1, 2)) > 0.5]
    return float(dice.mean()) if len(dice) else float("nan")
