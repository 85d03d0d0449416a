"""Segmentation from a language prompt: find the object on the whole volume, then delineate it in its own window.

With a scene the volume's map says roughly where; without one the slice decoder searches whole slices for the token,
and where the model has a head that scores slices by text (Med-2E3) its scores choose the slice to begin on.
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
from medvl_sam2.modeling.slice_segmenter import SlicePrompt
from medvl_sam2.modeling.unified import Grounding
from medvl_sam2.predictor.feature_cache import FeatureCache
from medvl_sam2.predictor.placed_segmenter import PlacedSegmenter
from medvl_sam2.predictor.places import place_on_slices
from medvl_sam2.predictor.stack import SliceStack, interpolate_logits, planned_slices

_REACH_MM = 12.0
"""How far round its component a rough place still counts as that component's."""
_SLICES_AT_ONCE = 32
"""Full-size slices painted at once; bounds memory on large volumes."""
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
    place_cells_mm: tuple[float, float] = (6.0, 12.0)
    """Edge of the decoder's cells from which the scene's map begins to count in the mask, and at which it counts half.
    """
    smooth_slices: float = 0.7
    """Standard deviation in searched slices of the smoothing across slices."""
    rows: int = 96
    """Rows decoded at once."""


@dataclass(frozen=True, eq=False)
class Located:
    """K requests on the ``searched`` slices (canonical z) of a whole stack.

    ``decoded`` (K, n, h, h) logits of the slice decoder's own search, or None where the grounding has places.
    ``chances`` (K, n) that a request is met on a searched slice, by the head that scores slices; None without it.
    """

    stack: SliceStack
    searched: list[int]
    grounding: Grounding
    decoded: Tensor | None
    chances: Tensor | None = None

    def coarse(self, request: int) -> Tensor:
        """Coarse logits (n, g, g) of one request; a place is read on the stack's own pixels."""
        if self.decoded is not None:
            return self.decoded[request]
        assert self.grounding.place is not None
        place = self.grounding.place[request][None]
        return place_on_slices(place, self.stack.crop, self.stack.crop.size, self.searched, self.stack.image.shape)[0]


@dataclass(frozen=True)
class NamedResult:
    """``mask`` (Z, Y, X) bool canonical; ``score`` predicted IoU of the delineated slices, 0 when nothing was found."""

    mask: np.ndarray
    score: float
    entropy: float = 0.0
    """Mean binary entropy (bits) of the window's voxels inside the dilated mask."""


class NamedEngine:
    """Finds and delineates objects given what the language side says of them."""

    def __init__(
        self, segmenter: PlacedSegmenter, config: NamedConfig | None = None, cache: FeatureCache | None = None
    ) -> None:
        self.segmenter, self.cache = segmenter, cache or FeatureCache()
        self.config = config or NamedConfig()

    def whole_stack(
        self, image: np.ndarray, spacing: tuple[float, float, float], intensity: SliceIntensity
    ) -> SliceStack:
        """Stack of whole slices for :meth:`locate`; keep it with the session."""
        crop = SliceCrop.whole(
            (image.shape[1], image.shape[2]), spacing[1:], self.segmenter.config.image_size, MIN_MM_PER_PX
        )
        return SliceStack(self.segmenter, image, intensity, crop, self.cache)

    def locate(self, stack: SliceStack, spacing: tuple[float, float, float], grounding: Grounding) -> Located:
        """Where K requests are on the searched slices of the whole stack.

        With a scene its rough places say where; without one the slice decoder searches every slice for the tokens.
        """
        count = stack.image.shape[0]
        searched = planned_slices(0, count - 1, 0, spacing[0], self.config.locate_step_mm)
        if grounding.place is not None:
            return Located(stack, searched, grounding, None)
        decoded = self._decode_all(stack, searched, grounding.language)
        if self.config.smooth_slices and len(searched) > 2:
            smooth = ndimage.gaussian_filter1d(decoded.numpy(), self.config.smooth_slices, axis=1, mode="nearest")
            decoded = torch.from_numpy(smooth)
        return Located(stack, searched, grounding, decoded, self._chances(stack, searched, grounding.language))

    def _chances(self, stack: SliceStack, searched: list[int], tokens: Tensor) -> Tensor | None:
        return self.segmenter.chances(tokens, stack.coarse(searched)) if self.segmenter.scores_slices else None

    def _decode_all(self, stack: SliceStack, searched: list[int], tokens: Tensor) -> Tensor:
        """The decoder's logits (K, n, h, h) for language tokens (K, C) on every searched slice."""
        count = stack.image.shape[0]
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

    def delineate(
        self, located: Located, spacing: tuple[float, float, float], request: int, least_share: float
    ) -> NamedResult:
        """Refine where one request was found, every component in a window of its own.

        Components smaller than ``least_share`` of the largest are dropped; 1 keeps the largest only. Where slices were
        scored, a component's size is that of its area on every slice times the chance of the slice.
        """
        coarse = located.coarse(request)
        empty = NamedResult(np.zeros(located.stack.image.shape, dtype=bool), 0.0)
        chances = None if located.chances is None else located.chances[request].numpy()
        parts = self._components(coarse.numpy() > 0, least_share, chances)
        if not parts:
            return empty
        mask, scores, entropies = empty.mask, [], []
        for part in parts:
            score, entropy = self._delineate_part(located, spacing, request, coarse, part, mask)
            scores.append(score)
            entropies.append(entropy)
        return NamedResult(mask, float(np.mean(scores)), float(np.mean(entropies)))

    def start_slice(self, located: Located, request: int, part: np.ndarray) -> int:
        """Canonical slice to begin a component (n, g, g) on: the likeliest by its score, else that of most area."""
        shown = np.flatnonzero(part.any(axis=(1, 2)))
        evident = part.sum(axis=(1, 2)) if located.chances is None else located.chances[request].numpy()
        return located.searched[int(shown[np.argmax(evident[shown])])]

    def _place_share(self, located: Located, crop: SliceCrop) -> float:
        """Weight of the scene's map in the mask: it counts where the decoder's cells are the coarser ones."""
        if located.decoded is not None:
            return 0.0
        fine, coarse = self.config.place_cells_mm
        cell = crop.extent_mm / self.segmenter.mask_size
        return 0.5 * float(np.clip((cell - fine) / (coarse - fine), 0, 1))

    def _components(self, found: np.ndarray, least_share: float, chances: np.ndarray | None) -> list[np.ndarray]:
        labels = cc3d.connected_components(np.ascontiguousarray(found), connectivity=26)
        weights = None if chances is None else np.broadcast_to(chances[:, None, None], labels.shape).ravel()
        sizes = np.bincount(labels.ravel(), weights)
        if len(sizes) < 2:
            return []
        sizes[0] = 0
        order = np.argsort(sizes)[::-1]
        return [labels == n for n in order if n and sizes[n] >= least_share * sizes.max()]

    def _delineate_part(
        self,
        located: Located,
        spacing: tuple[float, float, float],
        request: int,
        coarse: Tensor,
        part: np.ndarray,
        result: np.ndarray,
    ) -> tuple[float, float]:
        """Delineate one coarse component and paint it into ``result``; returns (score, entropy)."""
        stack, searched = located.stack, located.searched
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
        start = self.start_slice(located, request, part)
        plan = planned_slices(low, high, start, spacing[0], self.config.delineate_step_mm)
        window = SliceStack(self.segmenter, stack.image, stack.intensity, crop, stack.cache)
        # Only this component's own coarse evidence is the rough mask; its neighbours are pushed below the threshold.
        reach = max(1, round(_REACH_MM / (stack.crop.extent_mm / part.shape[-1])))
        own = torch.from_numpy(ndimage.binary_dilation(part, np.ones((1, 3, 3)), iterations=reach))
        evidence = torch.where(own, coarse, coarse.clamp(max=-2.0))
        rough = interpolate_logits(dict(zip(searched, evidence, strict=True)), range(low, high + 1))
        small = replace(crop, size=self.segmenter.mask_size)
        pasted = stack.crop.paste(rough[[z - low for z in plan]], stack.plane, -6.0)
        prompts = small.sample(pasted, pad=-6.0).clamp(-8, 8)
        heights = torch.tensor(plan, dtype=torch.float32) / max(1, shape[0] - 1)
        prompt = replace(
            SlicePrompt.empty(len(plan)),
            mask_logits=prompts,
            mask_present=torch.ones(len(plan), dtype=torch.bool),
            language=located.grounding.language[request].expand(len(plan), -1),
            height=heights,
        )
        output = self.segmenter.decode(window.features(plan), prompt)
        logits = output.logits[:, 0]
        full = interpolate_logits(dict(zip(plan, logits, strict=True)), range(low, high + 1))
        share = self._place_share(located, crop)
        painted = np.zeros(high + 1 - low, dtype=bool)
        for first in range(low, high + 1, _SLICES_AT_ONCE):
            last = min(high + 1, first + _SLICES_AT_ONCE)
            values, (y0, y1, x0, x1) = crop.paste_region(full[first - low : last - low].clamp(-8, 8), stack.plane)
            if share:
                place = stack.crop.paste(rough[first - low : last - low].clamp(-8, 8), stack.plane, -6.0)
                values = (1 - share) * values + share * place[:, y0:y1, x0:x1]
            inside = values.numpy() > 0
            result[first:last, y0:y1, x0:x1] |= inside
            painted[first - low : last - low] = inside.any(axis=(1, 2))
        used = torch.from_numpy(painted[[z - low for z in plan]])
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
