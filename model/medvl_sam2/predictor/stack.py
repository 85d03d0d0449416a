"""A stack of slices seen through one window: encoded lazily, decoded logits kept by slice.

Axis order is canonical (z, y, x). Decoded masks stay on the decoder's low-resolution grid until they are pasted back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from medvl_sam2.geometry import SliceCrop
from medvl_sam2.intensity import SliceIntensity
from medvl_sam2.modeling.slice_segmenter import SliceFeatures
from medvl_sam2.predictor.feature_cache import FeatureCache
from medvl_sam2.predictor.placed_segmenter import PlacedSegmenter

ENCODE_BATCH = {"cpu": 1, "cuda": 4}
"""Slices encoded at once, always so many: sums of another batch size differ in the last bits, and a slice that is
encoded again, or for somebody else, must be the same. On a CPU larger batches were measured to gain little, and a
single slice, as propagation asks for, would cost as much as a batch."""


class SliceStack:
    """Features of canonical slices in one :class:`SliceCrop`, held by a cache that all stacks of a predictor share."""

    def __init__(
        self,
        segmenter: PlacedSegmenter,
        image: np.ndarray,
        intensity: SliceIntensity,
        crop: SliceCrop,
        cache: FeatureCache | None = None,
    ) -> None:
        self.segmenter, self.image, self.intensity, self.crop = segmenter, image, intensity, crop
        self.cache = cache or FeatureCache()

    def encode(self, slices: Iterable[int]) -> dict[int, SliceFeatures]:
        """Features (1 row) by canonical z; only those that are not in the cache are encoded."""
        known = {z: self.cache.get(self.image, self.crop, z) for z in dict.fromkeys(int(z) for z in slices)}
        found = {z: features for z, features in known.items() if features is not None}
        missing = [z for z in known if z not in found]
        size = ENCODE_BATCH.get(self.segmenter.device.type, 1)
        for start in range(0, len(missing), size):
            part = missing[start : start + size]
            features = self.segmenter.encode(self.pixels([*part, *[part[-1]] * (size - len(part))]))
            for row, z in enumerate(part):
                found[z] = features.rows(slice(row, row + 1))
                self.cache.put(self.image, self.crop, z, found[z])
        return found

    def pixels(self, slices: list[int]) -> Tensor:
        """Model input (N, 3, S, S) of canonical slices, on the CPU."""
        raw = torch.from_numpy(self.image[slices].astype(np.float32))
        return self.intensity.channels(self.crop.sample(raw, pad=self.intensity.pad)[:, 0])

    def features(self, slices: list[int]) -> SliceFeatures:
        """Features of ``slices`` as rows (a slice may repeat)."""
        found = self.encode(slices)
        parts = [found[int(z)] for z in slices]
        return SliceFeatures(
            torch.cat([p.fine for p in parts]),
            torch.cat([p.middle for p in parts]),
            torch.cat([p.coarse for p in parts]),
            parts[0].position,
        )

    def coarse(self, slices: list[int]) -> Tensor:
        """The coarse features alone (N, C, S/16, S/16), a quarter of what :meth:`features` would copy."""
        found = self.encode(slices)
        return torch.cat([found[int(z)].coarse for z in slices])

    @property
    def plane(self) -> tuple[int, int]:
        """In-plane size (Y, X) of the canonical volume."""
        return int(self.image.shape[1]), int(self.image.shape[2])

    @property
    def encoded(self) -> set[int]:
        """Slices whose features are held."""
        return self.cache.slices(self.image, self.crop)


def planned_slices(low: int, high: int, start: int, spacing: float, target_mm: float) -> list[int]:
    """Slices of ``low``..``high`` (inclusive) to decode: ``start``, both ends, and steps of about ``target_mm``.

    Thin slices are skipped and interpolated: neighbours 1 mm apart hold the same contour at ten times the cost.
    """
    step = max(1, round(target_mm / spacing))
    below = range(start, low - 1, -step)
    above = range(start, high + 1, step)
    return sorted({low, high, *below, *above})


def interpolate_logits(logits: dict[int, Tensor], wanted: Sequence[int]) -> Tensor:
    """Logits (n, h, h) of the slices ``wanted``, linear between decoded slices, nearest beyond the last ones."""
    known = sorted(logits)
    stacked = torch.stack([logits[z] for z in known])
    position = np.interp(wanted, known, np.arange(len(known)))
    left = np.floor(position).astype(int)
    right = np.minimum(left + 1, len(known) - 1)
    share = torch.as_tensor(position - left, dtype=stacked.dtype)[:, None, None]
    return stacked[left] * (1 - share) + stacked[right] * share
