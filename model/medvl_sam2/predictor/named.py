"""Segmentation from a language prompt: find the object on the whole volume, then delineate it in its own window.

Zooming matters because the decoder's grid is a quarter of its input: an organ of 30 mm is two cells wide on a whole
slice and twenty in its window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cc3d
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from medvl_sam2.geometry import SliceCrop
from medvl_sam2.intensity import SliceIntensity
from medvl_sam2.modeling.slice_segmenter import SlicePrompt, SliceSegmenter
from medvl_sam2.modeling.unified import Grounding
from medvl_sam2.predictor.stack import SliceStack, interpolate_logits, planned_slices

MIN_MM_PER_PX = 3.0
"""Whole-slice pixels never get finer: organs keep their physical size in any field of view; training imports this."""


@dataclass(frozen=True)
class NamedConfig:
    """Choices of the text-prompted path."""

    locate_step_mm: float = 3.0
    """Slices are searched in steps of about this."""
    delineate_step_mm: float = 2.0
    window_factor: float = 1.6
    min_window_mm: float = 24.0
    min_share: float = 0.15
    """Components smaller than this share of the largest are dropped (largest only, when ``single``)."""
    scene_share: float = 0.8
    """Weight of the scene's rough place against the slice decoder's own search."""
    smooth_slices: float = 0.7
    """Standard deviation in searched slices of the smoothing across slices."""
    rows: int = 96
    """Rows decoded at once."""


@dataclass(frozen=True)
class NamedResult:
    """``mask`` (Z, Y, X) bool canonical; ``score`` predicted IoU of the delineated slices, 0 when nothing was found."""

    mask: np.ndarray
    score: float
    entropy: float = 0.0
    """Mean binary entropy (bits) of the window's voxels inside the dilated mask."""


class NamedEngine:
    """Finds and delineates objects given language tokens; whole-slice features are encoded once per volume."""

    def __init__(self, segmenter: SliceSegmenter, config: NamedConfig | None = None) -> None:
        self.segmenter = segmenter
        self.config = config or NamedConfig()

    def whole_stack(
        self, image: np.ndarray, spacing: tuple[float, float, float], intensity: SliceIntensity
    ) -> SliceStack:
        """Stack of whole slices for :meth:`locate`; keep it with the session."""
        crop = SliceCrop.whole(
            (image.shape[1], image.shape[2]), spacing[1:], self.segmenter.config.image_size, MIN_MM_PER_PX
        )
        return SliceStack(self.segmenter, image, intensity, crop)

    def locate(
        self, stack: SliceStack, spacing: tuple[float, float, float], grounding: Grounding
    ) -> tuple[list[int], Tensor]:
        """Coarse logits (K, n, h, h) of K requests on the searched slices of the whole stack, and their z.

        The scene's rough place and the slice decoder's own answer to the language token are mixed; without a scene the
        decoder is alone.
        """
        count = stack.image.shape[0]
        searched = planned_slices(0, count - 1, 0, spacing[0], self.config.locate_step_mm)
        share = self.config.scene_share if grounding.place is not None else 0.0
        coarse: Tensor | None = None
        if share < 1.0:
            coarse = self._decode_all(stack, searched, grounding.language)
        if grounding.place is not None:
            place = self._on_slices(stack, searched, grounding.place)
            coarse = place if coarse is None else share * place + (1 - share) * coarse
        assert coarse is not None
        if self.config.smooth_slices and len(searched) > 2:
            smooth = ndimage.gaussian_filter1d(coarse.cpu().numpy(), self.config.smooth_slices, axis=1, mode="nearest")
            coarse = torch.from_numpy(smooth)
        return searched, coarse

    def _decode_all(self, stack: SliceStack, searched: list[int], tokens: Tensor) -> Tensor:
        """The decoder's logits (K, n, h, h) for language tokens (K, C) on every searched slice."""
        count = stack.image.shape[0]
        stack.encode(searched)
        rows = [(k, z) for k in range(len(tokens)) for z in searched]
        parts = []
        for start in range(0, len(rows), self.config.rows):
            part = rows[start : start + self.config.rows]
            features = stack.features([z for _, z in part])
            heights = torch.tensor([z / max(1, count - 1) for _, z in part], dtype=torch.float32)
            prompt = replace(SlicePrompt.empty(len(part)), language=tokens[[k for k, _ in part]], height=heights)
            parts.append(self.segmenter.decode(features, prompt).logits[:, 0])
        size = self.segmenter.mask_size
        return torch.cat(parts).reshape(len(tokens), len(searched), size, size)

    def _on_slices(self, stack: SliceStack, searched: list[int], place: Tensor) -> Tensor:
        """Rough places (K, d, h, w), spanning the whole volume, on the searched slices' grid: (K, n, h, h)."""
        size, shape = self.segmenter.mask_size, stack.image.shape
        cell = stack.crop.size / size
        pixels = (np.arange(size) + 0.5) * cell - 0.5
        corners = stack.crop.inverse_points(np.stack([pixels, pixels], axis=1))  # (y, x) along the diagonal
        edges = [(2 * (v + 0.5) / n - 1) for v, n in ((corners[:, 0], shape[1]), (corners[:, 1], shape[2]))]
        heights = 2 * (np.asarray(searched) + 0.5) / shape[0] - 1
        z, y, x = np.meshgrid(heights, edges[0], edges[1], indexing="ij")
        grid = torch.from_numpy(np.stack([x, y, z], axis=-1).astype(np.float32))[None]
        sampled = F.grid_sample(place[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]
        outside = torch.from_numpy((np.abs(x) > 1) | (np.abs(y) > 1))
        return sampled.masked_fill(outside, -8.0)

    def delineate(
        self,
        stack: SliceStack,
        spacing: tuple[float, float, float],
        searched: list[int],
        coarse: Tensor,
        token: Tensor,
        single: bool,
    ) -> NamedResult:
        """Refine the coarse logits (n, h, h) of one token (C,) in a window of its own.

        ``single``: keep the largest component only; otherwise every component of sufficient size gets its window.
        """
        empty = NamedResult(np.zeros(stack.image.shape, dtype=bool), 0.0)
        parts = self._components(coarse.numpy() > 0, single)
        if not parts:
            return empty
        mask, scores, entropies = empty.mask, [], []
        for part in parts:
            score, entropy = self._delineate_part(stack, spacing, searched, coarse, part, token, mask)
            scores.append(score)
            entropies.append(entropy)
        return NamedResult(mask, float(np.mean(scores)), float(np.mean(entropies)))

    def _components(self, found: np.ndarray, single: bool) -> list[np.ndarray]:
        labels = cc3d.connected_components(np.ascontiguousarray(found), connectivity=26)
        counts = np.bincount(labels.ravel())
        if len(counts) < 2:
            return []
        counts[0] = 0
        order = np.argsort(counts)[::-1]
        kept = order[:1] if single else [n for n in order if counts[n] >= max(1, self.config.min_share * counts.max())]
        return [labels == n for n in kept if counts[n] > 0]

    def _delineate_part(
        self,
        stack: SliceStack,
        spacing: tuple[float, float, float],
        searched: list[int],
        coarse: Tensor,
        part: np.ndarray,
        token: Tensor,
        result: np.ndarray,
    ) -> tuple[float, float]:
        """Delineate one coarse component and paint it into ``result``; returns (score, entropy)."""
        shape = stack.image.shape
        shown = np.flatnonzero(part.any(axis=(1, 2)))
        low = searched[max(0, shown[0] - 1)]
        high = searched[min(len(searched) - 1, shown[-1] + 1)]
        ys, xs = np.nonzero(part.any(axis=0))
        cell = stack.crop.size / part.shape[-1]
        corners = np.array([[xs.min(), ys.min()], [xs.max(), ys.max()]]) * cell + np.array([[0.0], [cell - 1]])
        crop = SliceCrop.around(
            stack.crop.inverse_points(corners),
            spacing[1:],
            self.config.window_factor,
            stack.crop.size,
            self.config.min_window_mm,
        )
        start = searched[int(shown[np.argmax(part[shown].sum(axis=(1, 2)))])]
        plan = planned_slices(low, high, start, spacing[0], self.config.delineate_step_mm)
        window = SliceStack(self.segmenter, stack.image, stack.intensity, crop)
        window.encode(plan)
        # Only this component's own coarse evidence is the rough mask; its neighbours are pushed below the threshold.
        own = torch.from_numpy(ndimage.binary_dilation(part, np.ones((1, 3, 3))))
        evidence = torch.where(own, coarse, coarse.clamp(max=-2.0))
        rough = interpolate_logits(dict(zip(searched, evidence, strict=True)), 0, shape[0] - 1)[plan]
        small = replace(crop, size=self.segmenter.mask_size)
        pasted = stack.crop.paste(rough, stack.plane, -6.0)
        prompts = small.sample(pasted, pad=-6.0).clamp(-8, 8)
        heights = torch.tensor(plan, dtype=torch.float32) / max(1, shape[0] - 1)
        prompt = replace(
            SlicePrompt.empty(len(plan)),
            mask_logits=prompts,
            mask_present=torch.ones(len(plan), dtype=torch.bool),
            language=token.expand(len(plan), -1),
            height=heights,
        )
        output = self.segmenter.decode(window.features(plan), prompt)
        logits = output.logits[:, 0]
        full = interpolate_logits(dict(zip(plan, logits, strict=True)), low, high)
        values, (y0, y1, x0, x1) = crop.paste_region(full, stack.plane)
        inside = values.numpy() > 0
        result[low : high + 1, y0:y1, x0:x1] |= inside
        used = (logits > 0).any(dim=-1).any(dim=-1)
        score = float(output.iou[used].mean()) if bool(used.any()) else 0.0
        return score, _boundary_entropy(logits)


def _boundary_entropy(logits: Tensor) -> float:
    """Mean binary entropy (bits) over the mask and a rim of two cells: organ size and field of view cancel out."""
    mask = (logits > 0).float()
    if not bool(mask.any()):
        return 1.0
    near = F.max_pool2d(mask[:, None], 5, stride=1, padding=2)[:, 0] > 0
    p = torch.sigmoid(logits[near]).clamp(1e-6, 1 - 1e-6)
    return float((-(p * p.log2() + (1 - p) * (1 - p).log2())).mean())
