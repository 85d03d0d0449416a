"""The state of one object an annotator works on: a window, decoded logits by slice, memories and the clicks so far."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from medvl_sam2.geometry import SliceCrop
from medvl_sam2.predictor.propagation import ObjectMemory
from medvl_sam2.predictor.stack import SliceStack, interpolate_logits

OUTSIDE = -10.0
"""Logit of everything the window does not cover."""


@dataclass(frozen=True)
class CanonicalClick:
    """A click in canonical voxels: ``position`` (z, y, x), ``label`` 1 object or 0 background."""

    position: tuple[float, float, float]
    label: int

    @property
    def z(self) -> int:
        """Nearest slice."""
        return round(self.position[0])


@dataclass(frozen=True, eq=False)
class KeptMask:
    """A mask at full resolution that stands until the logits change sign.

    The logits' cells are coarser than the image: a mask painted from them anew loses what was finer, as a thin rib in a
    window that had to grow, or an earlier mask that was taken over. ``mask`` and ``drawn`` bool (n, rows, columns) from
    slice ``low`` on in the plane's ``window`` (y0, y1, x0, x1): what the mask was, and what the logits alone drew then.
    """

    low: int
    window: tuple[int, int, int, int]
    mask: np.ndarray
    drawn: np.ndarray

    def merged(self, drawn: np.ndarray, low: int) -> np.ndarray:
        """The mask of logits that now draw ``drawn`` (m, rows, columns) from slice ``low`` on, in the same window."""
        first, last = max(low, self.low), min(low + len(drawn), self.low + len(self.mask))
        here, there = slice(first - low, last - low), slice(first - self.low, last - self.low)
        merged = drawn.copy()
        merged[here] = np.where(drawn[here] == self.drawn[there], self.mask[there], drawn[here])
        return merged


@dataclass
class ObjectState:
    """``logits`` (h, h) by canonical z inside ``stack.crop``; the object lies within ``low``..``high``."""

    stack: SliceStack
    low: int
    high: int
    logits: dict[int, Tensor] = field(default_factory=dict)
    rough: dict[int, Tensor] = field(default_factory=dict)
    """Rough first mask by canonical z, soft values (h, h) in [0, 1] in the window; empty when there is none."""
    rough_weight: float = 0.0
    """Share of the rough mask in the first logits."""
    from_scene: bool = False
    """Whether the first prompt was taken to mean an element of the scene, whose map ``rough`` is then."""
    memory: ObjectMemory = field(default_factory=ObjectMemory)
    clicks: list[CanonicalClick] = field(default_factory=list)
    box: np.ndarray | None = None
    """Canonical box (2, 3) the annotator gave, if any."""
    start: int = 0
    """The slice the propagation started from."""
    score: float = 0.0
    kept: KeptMask | None = None

    def logits_at(self, z: int) -> Tensor:
        """Logits (h, h) of slice ``z``: decoded, interpolated, or all outside."""
        size = self.stack.segmenter.mask_size
        if not self.logits or z < self.low or z > self.high:
            return torch.full((size, size), OUTSIDE)
        return self.logits[z] if z in self.logits else interpolate_logits(self.logits, z, z)[0]

    def mask(self) -> np.ndarray:
        """Canonical mask (Z, Y, X) bool; it holds every foreground click's voxel and no background click's."""
        shape = self.stack.image.shape
        result = np.zeros(shape, dtype=bool)
        if self.logits:
            drawn, (y0, y1, x0, x1) = self._drawn()
            result[self.low : self.high + 1, y0:y1, x0:x1] = self.kept.merged(drawn, self.low) if self.kept else drawn
        for click in self.clicks:
            z, y, x = (int(np.clip(round(c), 0, n - 1)) for c, n in zip(click.position, shape, strict=True))
            result[z, y, x] = bool(click.label)
        return result

    def keep(self, mask: np.ndarray) -> None:
        """Let the canonical ``mask`` (Z, Y, X) stand for the present logits, inside the window and the range."""
        drawn, window = self._drawn()
        y0, y1, x0, x1 = window
        self.kept = KeptMask(self.low, window, mask[self.low : self.high + 1, y0:y1, x0:x1].copy(), drawn)

    def _drawn(self) -> tuple[np.ndarray, tuple[int, int, int, int]]:
        """What the logits draw on the slices of the range, bool (n, rows, columns), and where in the plane."""
        stacked = interpolate_logits(self.logits, self.low, self.high)
        values, window = self.stack.crop.paste_region(stacked, self.stack.plane)
        return values.numpy() > 0, window

    def moved(self, crop: SliceCrop) -> ObjectState:
        """The same object seen through another window: logits resampled, memories dropped (they are window-bound).

        The mask stays as it is where the new window shows it.
        """
        old = self.stack
        stack = SliceStack(old.segmenter, old.image, old.intensity, crop)
        logits: dict[int, Tensor] = {}
        if self.logits:
            order = sorted(self.logits)
            pasted = old.crop.paste(torch.stack([self.logits[z] for z in order]), old.plane, OUTSIDE)
            size = old.segmenter.mask_size
            seen = replace(crop, size=size).sample(pasted, pad=OUTSIDE)[:, 0]
            logits = dict(zip(order, seen, strict=True))
        moved = replace(self, stack=stack, logits=logits, rough={}, memory=ObjectMemory(), kept=None)
        if logits:
            moved.keep(self.mask())
        return moved

    def extent_yx(self) -> np.ndarray | None:
        """Box (2, 2) of the current mask in canonical (y, x) voxels over all decoded slices, or None when empty."""
        if not self.logits:
            return None
        top = torch.stack(list(self.logits.values())).amax(dim=0)
        values, (y0, _, x0, _) = self.stack.crop.paste_region(top[None], self.stack.plane)
        ys, xs = np.nonzero(values[0].numpy() > 0)
        if len(ys) == 0:
            return None
        return np.array([[ys.min() + y0, xs.min() + x0], [ys.max() + y0, xs.max() + x0]])
