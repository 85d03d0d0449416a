"""The state of one object an annotator works on: a window, decoded logits by slice, memories and the clicks so far."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from medvl_sam2.geometry import SliceCrop
from medvl_sam2.predictor.edits import Edit
from medvl_sam2.predictor.propagation import ObjectMemory
from medvl_sam2.predictor.stack import SliceStack, interpolate_logits

OUTSIDE = -10.0
"""Logit of everything the window does not cover."""
_MOVED = 0.5
"""Logits that moved by more than this mean something else than they did."""
CanonicalPlane = tuple[int, int]
"""Axis (0, 1, 2 for z, y, x) and index of a plane of the canonical grid."""


@dataclass(frozen=True, eq=False)
class KeptSlice:
    """A slice's mask at full resolution, which stands until the logits move away from it.

    The logits' cells are coarser than the image: a mask pasted from them anew loses what was finer, as a thin rib in a
    window that had to grow, or an earlier mask that was taken over. ``mask`` bool (y1 - y0, x1 - x0) over the window,
    and ``logits`` (h, h) as they were then.
    """

    mask: np.ndarray
    logits: Tensor

    def merged(self, drawn: np.ndarray, moved: np.ndarray) -> np.ndarray:
        """The mask now that the logits draw ``drawn`` and have ``moved`` by so much, both over the window."""
        left = np.where(self.mask, moved < -_MOVED, moved > _MOVED)
        return np.where(left, drawn, self.mask)


@dataclass(frozen=True)
class PastedSlice:
    """The mask ``inside`` of one canonical slice (y1 - y0, x1 - x0) bool, and the logits it was made from."""

    below: Tensor
    above: Tensor
    inside: np.ndarray


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
    clicks: list[Edit] = field(default_factory=list)
    """Clicks, scribbles and lassos in the order they were applied."""
    box: np.ndarray | None = None
    """Canonical box (2, 3) the annotator gave, inside the volume, if any."""
    across: int | None = None
    """Axis across the plane the box was drawn on; None for a 3D box."""
    text: str | None = None
    """Words whose mask was the start, if any."""
    source: str | None = None
    """Digest of the annotator's earlier mask that was the start, if any."""
    accepted: dict[CanonicalPlane, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    """Planes the annotator is done with, and the bool mask they show."""
    propagated: bool = False
    """Whether everything prompted so far was carried through the whole object."""
    start: int = 0
    """The slice the propagation started from."""
    score: float = 0.0
    kept: dict[int, KeptSlice] = field(default_factory=dict, repr=False, compare=False)
    """Slices by z whose mask is finer than their logits, in this window."""
    pasted: dict[int, PastedSlice] = field(default_factory=dict, repr=False, compare=False)
    """Slices on the canonical grid by z; a click pastes only those whose logits it changed."""
    before: ObjectState | None = field(default=None, repr=False, compare=False)
    """The state before the last click, so that taking it back costs nothing. It shares every slice left as it was."""
    cut: bool = field(default=False, repr=False, compare=False)
    """Whether ``before`` is None only because the states before were dropped to save memory."""

    def fork(self) -> ObjectState:
        """A state to change by one click, which leaves this one as it is."""
        memory = ObjectMemory(dict(self.memory.conditioning))
        return replace(
            self,
            logits=dict(self.logits),
            memory=memory,
            clicks=list(self.clicks),
            pasted=dict(self.pasted),
            before=self,
            cut=False,
        )

    def history(self) -> Iterator[ObjectState]:
        """This state and all before it, newest first."""
        state: ObjectState | None = self
        while state is not None:
            yield state
            state = state.before

    def logits_at(self, z: int) -> Tensor:
        """Logits (h, h) of slice ``z``: decoded, interpolated, or all outside."""
        size = self.stack.segmenter.mask_size
        if not self.logits or z < self.low or z > self.high:
            return torch.full((size, size), OUTSIDE)
        return self.logits[z] if z in self.logits else interpolate_logits(self.logits, [z])[0]

    def mask(self) -> np.ndarray:
        """Canonical mask (Z, Y, X) bool: every edit's own voxels by its label, and accepted planes as they were."""
        shape = self.stack.image.shape
        result = np.zeros(shape, dtype=bool)
        if self.logits:
            self.paste_changed()
            y0, y1, x0, x1 = self.stack.crop.bounds(self.stack.plane)
            for z in range(self.low, self.high + 1):
                result[z, y0:y1, x0:x1] = self.on_window(z)
        for edit in self.clicks:
            z, y, x = np.clip(edit.voxels, 0, np.array(shape) - 1).T
            result[z, y, x] = bool(edit.label)
        for (axis, index), shown in self.accepted.items():
            result[(slice(None),) * axis + (index,)] = shown
        return result

    def on_window(self, z: int) -> np.ndarray:
        """Mask of canonical slice ``z`` over the window (y1 - y0, x1 - x0) bool, as the logits and what was kept say.

        Current after :meth:`paste_changed`; empty beyond the object's range.
        """
        if not self.logits or not self.low <= z <= self.high:
            y0, y1, x0, x1 = self.stack.crop.bounds(self.stack.plane)
            return np.zeros((y1 - y0, x1 - x0), dtype=bool)
        return self.pasted[z].inside

    def trim(self) -> None:
        """Let the range end with the outermost slices that show or keep the object; with none it is the start."""
        kept = {z for z, slice_ in self.kept.items() if slice_.mask.any()}
        shown = [z for z, values in self.logits.items() if z in kept or bool((values > 0).any())] or [self.start]
        self.low, self.high = min(shown), max(shown)
        self.logits = {z: values for z, values in self.logits.items() if self.low <= z <= self.high}

    def snapshot(self) -> ObjectState:
        """A copy to compare with after this one was changed; not a step of the history."""
        return replace(self, logits=dict(self.logits), pasted=dict(self.pasted), clicks=list(self.clicks))

    def keep(self, mask: np.ndarray) -> None:
        """Let the canonical ``mask`` (Z, Y, X) stand for the present logits, inside the window and the range."""
        self.paste_changed()
        y0, y1, x0, x1 = self.stack.crop.bounds(self.stack.plane)
        slices = range(self.low, self.high + 1)
        logits = interpolate_logits(self.logits, list(slices))
        self.kept = {z: KeptSlice(mask[z, y0:y1, x0:x1].copy(), logits[n]) for n, z in enumerate(slices)}
        self.pasted = {z: replace(self.pasted[z], inside=kept.mask) for z, kept in self.kept.items()}

    def hold(self, z: int, shown: np.ndarray) -> None:
        """Let ``shown`` (y1 - y0, x1 - x0) bool stand for slice ``z``; current after :meth:`paste_changed`."""
        self.kept = {**self.kept, z: KeptSlice(shown, self.logits_at(z))}
        self.pasted[z] = replace(self.pasted[z], inside=shown)

    def paste_changed(self) -> None:
        """Bring ``pasted`` up to date for every slice low..high; another dict where that changes anything."""
        if not self.logits:
            return
        known = sorted(self.logits)
        stale: dict[int, tuple[Tensor, Tensor]] = {}
        for z in range(self.low, self.high + 1):
            above = min(bisect_left(known, z), len(known) - 1)
            below = above if known[above] <= z else max(above - 1, 0)
            source = (self.logits[known[below]], self.logits[known[above]])
            old = self.pasted.get(z)
            if old is None or old.below is not source[0] or old.above is not source[1]:
                stale[z] = source
        if stale:
            logits = interpolate_logits(self.logits, list(stale))
            values, _ = self.stack.crop.paste_region(logits, self.stack.plane)
            self.pasted = dict(self.pasted)
            for (z, source), inside in zip(stale.items(), values.numpy() > 0, strict=True):
                self.pasted[z] = PastedSlice(*source, inside.copy())
            finer = [(n, z) for n, z in enumerate(stale) if z in self.kept]
            if finer:
                moves = torch.stack([logits[n] - self.kept[z].logits for n, z in finer])
                moved, _ = self.stack.crop.paste_region(moves, self.stack.plane)
                for (_, z), move in zip(finer, moved.numpy(), strict=True):
                    self.pasted[z] = replace(self.pasted[z], inside=self.kept[z].merged(self.pasted[z].inside, move))

    def moved(self, crop: SliceCrop) -> ObjectState:
        """The same object seen through another window: logits resampled, memories dropped (they are window-bound).

        The mask stays as it is where the new window shows it.
        """
        old = self.stack
        stack = SliceStack(old.segmenter, old.image, old.intensity, crop, old.cache)
        logits: dict[int, Tensor] = {}
        if self.logits:
            order = sorted(self.logits)
            pasted = old.crop.paste(torch.stack([self.logits[z] for z in order]), old.plane, OUTSIDE)
            size = old.segmenter.mask_size
            seen = replace(crop, size=size).sample(pasted, pad=OUTSIDE)[:, 0]
            logits = dict(zip(order, seen, strict=True))
        moved = replace(self, stack=stack, logits=logits, rough={}, memory=ObjectMemory(), pasted={}, kept={})
        if logits:
            moved.keep(self.mask())
        return moved

    def widened(self, points: np.ndarray) -> ObjectState:
        """The same object in a window that holds it and canonical ``points`` (N, 2) (y, x), with room around."""
        crop, box = self.stack.crop, self.extent_yx()
        corners = points if box is None else np.concatenate([box, points])
        corners = np.stack([corners.min(axis=0), corners.max(axis=0)])
        return self.moved(SliceCrop.around(corners, crop.spacing_yx, 1.4, crop.size, crop.extent_mm))

    def holding(self, mask: np.ndarray, voxels: np.ndarray) -> ObjectState:
        """The object in a window and range that hold ``voxels`` (N, 3); added slices show the canonical ``mask``."""
        if not len(voxels) or not self.logits:
            return self
        y0, y1, x0, x1 = self.stack.crop.bounds(self.stack.plane)
        low, high = voxels.min(axis=0), voxels.max(axis=0)
        inside = y0 <= low[1] and high[1] < y1 and x0 <= low[2] and high[2] < x1
        state = self if inside else self.widened(voxels[:, 1:].astype(np.float64))
        first, last = min(state.low, int(low[0])), max(state.high, int(high[0]))
        added = [z for z in range(first, last + 1) if not state.low <= z <= state.high]
        if not added:
            return state
        small = replace(state.stack.crop, size=state.stack.segmenter.mask_size)
        soft = small.sample(torch.from_numpy(mask[added].astype(np.float32)))[:, 0]
        logits = state.logits | {z: plane * 12 - 6 for z, plane in zip(added, soft, strict=True)}
        # The old ends bound what lies between them and the new slices, also where they were interpolated.
        ends = {z: state.logits_at(z) for z in (state.low, state.high)}
        return replace(state, low=first, high=last, logits=logits | ends, pasted=dict(state.pasted))

    def extent_yx(self) -> np.ndarray | None:
        """Box (2, 2) of the current mask in canonical (y, x) voxels over all slices, or None when empty."""
        if not self.logits:
            return None
        self.paste_changed()
        y0, _, x0, _ = self.stack.crop.bounds(self.stack.plane)
        ys, xs = np.nonzero(np.logical_or.reduce([self.on_window(z) for z in range(self.low, self.high + 1)]))
        if len(ys) == 0:
            return None
        return np.array([[ys.min() + y0, xs.min() + x0], [ys.max() + y0, xs.max() + x0]])
