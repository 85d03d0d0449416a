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
from medvl_sam2.modeling.slice_segmenter import SliceFeatures, SliceSegmenter

ENCODE_BATCH = {"cpu": 2, "cuda": 16}
"""Slices encoded at once, always so many: sums of another batch size differ in the last bits, and a slice that is
encoded again, or for somebody else, must be the same. On a CPU more at once was measured to be no faster."""


class SliceStack:
    """Features of canonical slices in one :class:`SliceCrop`; every slice is encoded at most once."""

    def __init__(
        self, segmenter: SliceSegmenter, image: np.ndarray, intensity: SliceIntensity, crop: SliceCrop
    ) -> None:
        self.segmenter, self.image, self.intensity, self.crop = segmenter, image, intensity, crop
        self._features: dict[int, SliceFeatures] = {}

    def encode(self, slices: Iterable[int]) -> None:
        """Encode those of ``slices`` (canonical z) that are not encoded yet."""
        missing = [z for z in dict.fromkeys(int(z) for z in slices) if z not in self._features]
        size = ENCODE_BATCH.get(next(self.segmenter.parameters()).device.type, 1)
        for start in range(0, len(missing), size):
            part = missing[start : start + size]
            features = self.segmenter.encode(self.pixels([*part, *[part[-1]] * (size - len(part))]))
            for row, z in enumerate(part):
                self._features[z] = features.rows(slice(row, row + 1))

    def pixels(self, slices: list[int]) -> Tensor:
        """Model input (N, 3, S, S) of canonical slices."""
        raw = torch.from_numpy(self.image[slices].astype(np.float32))
        device = next(self.segmenter.parameters()).device
        return self.intensity.channels(self.crop.sample(raw, pad=self.intensity.pad)[:, 0]).to(device)

    def features(self, slices: list[int]) -> SliceFeatures:
        """Features of ``slices`` as rows (a slice may repeat)."""
        self.encode(slices)
        parts = [self._features[int(z)] for z in slices]
        return SliceFeatures(
            torch.cat([p.fine for p in parts]),
            torch.cat([p.middle for p in parts]),
            torch.cat([p.coarse for p in parts]),
            parts[0].position,
        )

    def release(self) -> None:
        """Forget what is encoded; it is encoded again where it is needed."""
        self._features.clear()

    @property
    def plane(self) -> tuple[int, int]:
        """In-plane size (Y, X) of the canonical volume."""
        return int(self.image.shape[1]), int(self.image.shape[2])

    @property
    def bytes(self) -> int:
        """Memory held by the encoded slices."""
        return sum(
            t.element_size() * t.nelement() for f in self._features.values() for t in (f.fine, f.middle, f.coarse)
        )


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
