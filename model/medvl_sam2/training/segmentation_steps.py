"""Losses of the two SAM2 phases: single slices first, then memory over short stacks.

Order and reasons: sparse prompts alone do not start learning from scratch on little data, so the image phase adds a
training-only dense head that names every pixel; memory is trained afterwards with the encoder frozen and with slices
beyond the object's end in the loss (measured recipe of this project).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvl_sam2.config import SliceConfig
from medvl_sam2.modeling.slice_segmenter import SliceFeatures, SliceMemory, SliceOutput, SlicePrompt, SliceSegmenter
from medvl_sam2.training.clicks import next_click_2d
from medvl_sam2.training.losses import LossWeights, dice_score, mask_loss
from medvl_sam2.training.samples import CONCEPTS
from medvl_sam2.training.slice_batches import TRUTH_SIZE, WholeSlice, Window


class DenseHead(nn.Module):
    """Training-only head: occupancy of every concept on the stride-4 grid from all three feature maps."""

    def __init__(self, config: SliceConfig, concepts: int) -> None:
        super().__init__()
        d = config.d_model
        self.fine = nn.Conv2d(d // 8, concepts, 1)
        self.middle = nn.Conv2d(d // 4, concepts, 1)
        self.coarse = nn.Conv2d(d, concepts, 1)

    def forward(self, features: SliceFeatures) -> Tensor:
        """Logits (N, concepts, S/4, S/4)."""
        out: Tensor = self.fine(features.fine)
        for layer, level in ((self.middle, features.middle), (self.coarse, features.coarse)):
            out = out + F.interpolate(layer(level), size=out.shape[-2:], mode="bilinear", align_corners=False)
        return out


class SegmentationLearner(nn.Module):
    """The segmenter with what only training needs: stand-in language tokens and the dense head."""

    def __init__(self, segmenter: SliceSegmenter) -> None:
        super().__init__()
        self.segmenter = segmenter
        self.concept_tokens = nn.Embedding(len(CONCEPTS), segmenter.config.d_model)
        nn.init.normal_(self.concept_tokens.weight, std=0.5)
        self.dense_head = DenseHead(segmenter.config, len(CONCEPTS))


@dataclass
class _Rows:
    """Prompts of B window rows, grown click by click (model pixels)."""

    points: list[list[tuple[float, float]]]
    labels: list[list[int]]
    masks: Tensor
    mask_present: Tensor
    language: Tensor | None
    language_present: Tensor | None
    height: Tensor | None

    def prompt(self, device: torch.device) -> SlicePrompt:
        width = max(1, max(len(p) for p in self.points))
        points = torch.zeros(len(self.points), width, 2)
        labels = torch.full((len(self.points), width), -1, dtype=torch.int32)
        for row, (xy, label) in enumerate(zip(self.points, self.labels, strict=True)):
            if xy:
                points[row, : len(xy)] = torch.tensor(xy)
                labels[row, : len(xy)] = torch.tensor(label, dtype=torch.int32)
        return SlicePrompt(
            points.to(device),
            labels.to(device),
            self.masks,
            self.mask_present,
            self.language,
            self.language_present,
            self.height,
        )


class SegmentationSteps:
    """Computes losses; owns no optimiser, so that pretraining and finetuning share it."""

    def __init__(
        self, learner: SegmentationLearner, seed: int, weights: LossWeights | None = None, bfloat16: bool = False
    ) -> None:
        self.learner = learner
        self.bfloat16 = bfloat16
        self.rng = np.random.default_rng(seed)
        self.weights = weights or LossWeights()
        self.scale = learner.segmenter.config.image_size / TRUTH_SIZE

    @property
    def device(self) -> torch.device:
        """Where the weights are; rows are drawn on the CPU and moved here."""
        return next(self.learner.segmenter.parameters()).device

    def _encode(self, images: Tensor) -> SliceFeatures:
        """Features in fp32; with ``bfloat16`` the encoder runs in bf16 (a quarter faster on CPUs that have it)."""
        if not self.bfloat16:
            return self.learner.segmenter.encode(images)
        with torch.autocast(images.device.type, torch.bfloat16):
            features = self.learner.segmenter.encode(images.to(memory_format=torch.channels_last))
        return SliceFeatures(*(t.float() for t in (features.fine, features.middle, features.coarse, features.position)))

    def named_loss(self, slices: Sequence[WholeSlice], dense_weight: float) -> tuple[Tensor, float]:
        """Whole slices with stand-in language tokens, plus the dense head -> (loss, mean Dice of present rows)."""
        segmenter = self.learner.segmenter
        features = self._encode(torch.stack([s.image for s in slices]).to(self.device))
        index = [n for n, s in enumerate(slices) for _ in s.concepts]
        concepts = torch.tensor([c for s in slices for c in s.concepts], device=self.device)
        truth = torch.cat([s.truth for s in slices]).to(self.device)
        height = torch.tensor([slices[n].height for n in index], dtype=torch.float32, device=self.device)
        prompt = replace(
            SlicePrompt.empty(len(index), self.device), language=self.learner.concept_tokens(concepts), height=height
        )
        output = segmenter.decode(features.rows(index), prompt)
        loss = mask_loss(output, truth, self.weights)
        if dense_weight:
            dense = torch.stack([s.dense for s in slices]).to(self.device)
            logits = self.learner.dense_head(features)
            valid = dense >= 0
            raw = F.binary_cross_entropy_with_logits(logits, dense.clamp(min=0), reduction="none")
            loss = loss + dense_weight * (raw * valid).sum() / valid.sum().clamp(min=1) * 10
            loss = loss + dense_weight * _dense_dice(logits, dense, valid)
        with torch.no_grad():
            present = truth.amax(dim=(1, 2)) > 0.5
            dice = dice_score(output.logits, truth)[present]
        return loss, float(dice.mean()) if len(dice) else float("nan")

    def window_loss(self, windows: Sequence[Window], rounds: int) -> tuple[Tensor, float, float]:
        """Prompted windows with ``rounds`` corrective clicks -> (loss, Dice before, Dice after the clicks)."""
        segmenter = self.learner.segmenter
        features = self._encode(torch.stack([w.images[0] for w in windows]).to(self.device))
        truth = torch.stack([w.truth[0] for w in windows]).to(self.device)
        rows = self._first_prompts(windows)
        output = segmenter.decode(features, rows.prompt(self.device))
        losses = [mask_loss(output, truth, self.weights)]
        first = output
        for _ in range(rounds):
            self._click(rows, output, truth)
            output = segmenter.decode(features, rows.prompt(self.device))
            losses.append(mask_loss(output, truth, self.weights))
        with torch.no_grad():
            before, after = dice_score(first.logits, truth).mean(), dice_score(output.logits, truth).mean()
        return torch.stack(losses).mean(), float(before), float(after)

    def memory_loss(self, windows: Sequence[Window], encoder_grad: bool = False) -> tuple[Tensor, float]:
        """Stacks of T slices: prompt the first, propagate, correct one later slice -> (loss, Dice of later slices)."""
        segmenter = self.learner.segmenter
        count, length = len(windows), len(windows[0].images)
        with torch.set_grad_enabled(encoder_grad):
            features = self._encode(torch.cat([w.images for w in windows]).to(self.device))
        truth = torch.stack([w.truth for w in windows]).to(self.device)
        rows = self._first_prompts(windows)
        conditioning: dict[int, SliceMemory] = {}
        tracked: dict[int, SliceMemory] = {}
        losses, scores = [], []
        corrected = int(self.rng.integers(1, length)) if self.rng.random() < 0.5 else -1
        persistent = rows.language_present is not None and self.rng.random() < 0.7
        for t in range(length):
            here = features.rows([n * length + t for n in range(count)])
            if t == 0:
                output = segmenter.decode(here, rows.prompt(self.device))
            else:
                fused = segmenter.attend(here, t, conditioning, tracked, length, reverse=False)
                prompt = SlicePrompt.empty(count, self.device)
                if persistent:
                    height = torch.stack([w.height[t] for w in windows]).to(self.device)
                    prompt = replace(
                        prompt, language=rows.language, language_present=rows.language_present, height=height
                    )
                output = segmenter.decode(here, prompt, fused)
                scores.append(dice_score(output.logits.detach(), truth[:, t]))
                if t == corrected:
                    losses.append(mask_loss(output, truth[:, t], self.weights))
                    fix = _Rows(
                        [[] for _ in windows],
                        [[] for _ in windows],
                        output.logits.detach(),
                        torch.ones(count, dtype=torch.bool, device=self.device),
                        None,
                        None,
                        None,
                    )
                    self._click(fix, output, truth[:, t])
                    output = segmenter.decode(here, fix.prompt(self.device), fused)
            losses.append(mask_loss(output, truth[:, t], self.weights))
            memory = self._memory(here, output, truth[:, t], teach=t == 0)
            (conditioning if t in (0, corrected) else tracked)[t] = memory
        return torch.stack(losses).mean(), float(torch.stack(scores).mean())

    def _memory(self, here: SliceFeatures, output: SliceOutput, truth: Tensor, teach: bool) -> SliceMemory:
        """Memory of a decoded slice; a third of the prompted slices are remembered by their true mask."""
        logits, presence = output.logits, output.presence
        if teach:
            given = torch.from_numpy(self.rng.random(len(logits)) < 0.33).to(logits.device)
            size = logits.shape[-2:]
            true = F.interpolate(truth[:, None], size=size, mode="area") * 20 - 10
            logits = torch.where(given[:, None, None, None], true, logits)
            presence = torch.where(given, torch.full_like(presence, 10.0), presence)
        return self.learner.segmenter.remember(here, logits, presence, output.pointer)

    def _first_prompts(self, windows: Sequence[Window]) -> _Rows:
        """Box, points, rough mask or a mixture; now and then with the object's name."""
        rng, size = self.rng, self.learner.segmenter.mask_size
        points: list[list[tuple[float, float]]] = []
        labels: list[list[int]] = []
        masks = torch.zeros(len(windows), 1, size, size)
        mask_present = torch.zeros(len(windows), dtype=torch.bool)
        for row, window in enumerate(windows):
            kind = rng.choice(["box", "points", "mask", "both"], p=[0.33, 0.25, 0.22, 0.2])
            xy: list[tuple[float, float]] = []
            label: list[int] = []
            if kind in ("box", "both"):
                x0, y0, x1, y1 = (float(v) for v in window.boxes[0])
                xy, label = [(x0, y0), (x1, y1)], [2, 3]
            if kind == "points":
                truth = window.truth[0].numpy() > 0.5
                for _ in range(int(rng.integers(1, 4))):
                    click = next_click_2d(truth, None, rng, core=0.4)
                    if click is not None:
                        half = (self.scale - 1) / 2
                        xy.append((click.position[1] * self.scale + half, click.position[0] * self.scale + half))
                        label.append(1)
            if kind in ("mask", "both"):
                guess = window.guess[0][None, None]
                masks[row] = F.interpolate(guess, size=(size, size), mode="area")[0] * 12 - 6
                mask_present[row] = True
            points.append(xy)
            labels.append(label)
        language, present = None, None
        if rng.random() < 0.5:
            concepts = torch.tensor([-1 if w.concept is None else w.concept for w in windows], device=self.device)
            present = (concepts >= 0) & torch.from_numpy(rng.random(len(windows)) < 0.85).to(self.device)
            language = self.learner.concept_tokens(concepts.clamp(min=0))
        height = torch.stack([w.height[0] for w in windows]).to(self.device)
        return _Rows(points, labels, masks.to(self.device), mask_present.to(self.device), language, present, height)

    def _click(self, rows: _Rows, output: SliceOutput, truth: Tensor) -> None:
        """Add one corrective click a row and the last logits as mask prompt."""
        with torch.no_grad():
            logits = F.interpolate(output.logits, size=truth.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
            guesses, reals = (logits > 0).cpu().numpy(), (truth > 0.5).cpu().numpy()
        for row in range(len(rows.points)):
            click = next_click_2d(reals[row], guesses[row], self.rng, core=0.5)
            if click is not None:
                y, x = click.position
                half = (self.scale - 1) / 2
                rows.points[row].append((x * self.scale + half, y * self.scale + half))
                rows.labels[row].append(click.label)
        rows.masks = output.logits.detach()
        rows.mask_present = torch.ones(len(rows.points), dtype=torch.bool, device=self.device)


def _dense_dice(logits: Tensor, dense: Tensor, valid: Tensor) -> Tensor:
    """Soft Dice over the batch for concepts that occur in it."""
    probability, truth = torch.sigmoid(logits) * valid, dense.clamp(min=0)
    overlap = (probability * truth).sum(dim=(0, 2, 3))
    total = (probability + truth * valid).sum(dim=(0, 2, 3))
    occurs = truth.amax(dim=(0, 2, 3)) > 0.5
    if not occurs.any():
        return logits.sum() * 0
    return (1 - (2 * overlap + 1) / (total + 1))[occurs].mean()
