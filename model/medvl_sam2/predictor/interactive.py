"""From corrections to a better mask.

First prompts (``first_prompts``) choose the window (a region of interest: a lesion costs what the lesion costs), the
start slice and how far to propagate. Every later edit (click, scribble or lasso) stays local: its slices are decoded
again with their previous logits, only the changed component at the edit is kept, the change fades out over neighbouring
slices and is carried on by memory as far as they change with it. ``locality`` holds it to its region. An edit never
re-runs the whole volume, because that was measured to destroy good slices; the annotator may ask for it
(:meth:`InteractiveEngine.propagate`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from medvl_sam2.modeling.slice_segmenter import SliceMemory, SliceOutput, SlicePrompt
from medvl_sam2.predictor.edits import CanonicalStroke, Edit
from medvl_sam2.predictor.feature_cache import FeatureCache
from medvl_sam2.predictor.first_prompts import FirstPrompts, InteractiveConfig
from medvl_sam2.predictor.full_propagation import FullPropagation
from medvl_sam2.predictor.locality import EditRegion, opened, restrict
from medvl_sam2.predictor.objects import ObjectState
from medvl_sam2.predictor.painting import Painted, paint
from medvl_sam2.predictor.placed_segmenter import PlacedSegmenter
from medvl_sam2.predictor.propagation import recall
from medvl_sam2.predictor.slice_points import click_points

Spacing = tuple[float, float, float]


class InteractiveEngine:
    """Stateless over volumes: all state lies in :class:`ObjectState`."""

    def __init__(
        self, segmenter: PlacedSegmenter, config: InteractiveConfig | None = None, cache: FeatureCache | None = None
    ) -> None:
        self.segmenter = segmenter
        self.config = config or InteractiveConfig()
        self.first = FirstPrompts(segmenter, self.config, cache)
        self._everywhere = FullPropagation(self.first)

    def edit(self, state: ObjectState, spacing: Spacing, edit: Edit, opens: bool = True) -> ObjectState:
        """The state after one correction; the given one stays as it was, to go back to.

        ``opens``: whether accepted planes the edit lies on may change; not where it is applied once more.
        """
        state = self._widened(state.fork(), edit)
        state = opened(state, edit) if opens else state
        state.propagated = False
        state.paste_changed()
        reference = state.snapshot()
        region = self.region(state, spacing, edit)
        painted = paint(state, spacing, edit, self.config.assist_rule) if self.config.assist else None
        state.clicks.append(edit)
        last = state.stack.image.shape[0] - 1
        slices = [int(z) for z in np.unique(np.clip(edit.slices, 0, last))]
        if edit.label == 0:
            slices = [z for z in slices if self._reaches(state, edit, z)]
            if not slices:
                return state  # background already
        for z in slices:
            if z < state.low or z > state.high:
                self._reach_out(state, z)
        before = {z: state.logits_at(z) for z in slices}
        outputs = {z: self._decode_again(state, z, before[z], spacing) for z in slices}
        deltas = {z: self._local_change(state, edit, z, before[z], outputs[z].logits[0, 0]) for z in slices}
        self._spread(state, deltas, spacing, region)
        if painted is not None:
            self._lay_on(state, painted, edit.label)
        for z in slices:
            shown = state.logits[z]
            presence = outputs[z].presence.new_full((1,), 10.0 if bool((shown > 0).any()) else -10.0)
            features = state.stack.features([z])
            memory = self.segmenter.remember(features, shown[None, None], presence, outputs[z].pointer, prompted=True)
            state.memory.conditioning[z] = memory
        if self.config.carry_clicks:
            for z in slices:
                changed = ((state.logits[z] > 0) != (before[z] > 0)).numpy()
                self._carry(state, z, edit.label, changed, spacing, region)
        restrict(state, reference, region, edit.label)
        return state

    def region(self, state: ObjectState, spacing: Spacing, edit: Edit) -> EditRegion:
        """Where an edit may change the mask: nearby, measured by the object as it is and by the box drawn round it."""
        corners = [] if state.box is None else [state.box]
        drawn = state.extent_yx()
        if drawn is not None:
            corners.append(np.column_stack([[state.low, state.high], drawn]))
        edges = [(box[1] - box[0] + 1) * np.asarray(spacing) for box in corners]
        diagonal = max((float(np.linalg.norm(edge)) for edge in edges), default=0.0)
        reach = max(self.config.edit_reach_mm, self.config.edit_share * diagonal)
        return EditRegion.around(edit, state.stack.image.shape, spacing, reach)

    def propagate(self, state: ObjectState, spacing: Spacing) -> ObjectState:
        """The state after everything prompted was carried through the whole object; the given one stays as it was."""
        return self._everywhere.run(state, spacing)

    # --- corrections ---------------------------------------------------------------------------------------------

    @staticmethod
    def _widened(state: ObjectState, edit: Edit) -> ObjectState:
        """A window that holds the edit with room around it; only a foreground edit outside needs another one."""
        crop = state.stack.crop
        points = edit.voxels[:, 1:].astype(np.float64) if isinstance(edit, CanonicalStroke) else edit.anchors[:, 1:]
        pixels = crop.forward_points(points)
        margin = 0.06 * crop.size
        if edit.label == 0 or (margin <= pixels.min() and pixels.max() <= crop.size - 1 - margin):
            return state
        return state.widened(points)

    def _lay_on(self, state: ObjectState, painted: Painted, label: int) -> None:
        """Push the painted region's logits to the edit's side; the object's range grows with foreground paint."""
        shown = painted.slices
        if label == 1:
            for z in (min(shown), max(shown)):
                if z < state.low or z > state.high:
                    self._reach_out(state, z)
        shown = [z for z in shown if state.low <= z <= state.high]
        if not shown:
            return
        small = replace(state.stack.crop, size=self.segmenter.mask_size)
        soft = small.sample(torch.from_numpy(painted.planes(shown, state.stack.plane)))[:, 0]
        for z, plane in zip(shown, soft, strict=True):
            old = state.logits_at(z)
            push = plane * 8 - 4
            state.logits[z] = torch.maximum(old, push) if label == 1 else torch.minimum(old, -push)

    @staticmethod
    def _reaches(state: ObjectState, edit: Edit, z: int) -> bool:
        """Whether an edit on slice ``z`` lies in the window and in the range of slices the object may occupy."""
        pixels = state.stack.crop.forward_points(_anchors_on(edit, z)[:, 1:])
        inside = ((pixels >= -0.5) & (pixels <= state.stack.crop.size - 0.5)).all(axis=1).any()
        return bool(inside) and state.low <= z <= state.high

    def _decode_again(self, state: ObjectState, z: int, before: Tensor, spacing: Spacing) -> SliceOutput:
        """Decode slice ``z`` with all its edits, its previous logits and the memory of prompted slices."""
        here = state.stack.features([z])
        prompt = SlicePrompt(*click_points(state.stack.crop, state.clicks, z))
        if bool((before > 0).any()):
            prompt = replace(prompt, mask_logits=before[None, None], mask_present=torch.ones(1, dtype=torch.bool))
        fused = None
        others = {k: m for k, m in state.memory.conditioning.items() if k != z}
        if others and z not in state.memory.conditioning:
            extent = (state.low, state.high)
            fused = recall(
                state.stack, here, z, others, {}, extent, spacing[0], self.config.memory, reverse=z < state.start
            )
        return self.segmenter.decode(here, prompt, fused)

    def _local_change(self, state: ObjectState, edit: Edit, z: int, before: Tensor, after: Tensor) -> Tensor:
        """Change of logits (h, h), kept only in the changed components nearest to the edit; the edit always wins."""
        size = before.shape[-1]
        wanted = bool(edit.label)
        pixels = state.stack.crop.forward_points(_anchors_on(edit, z)[:, 1:]) / state.stack.crop.size * size - 0.375
        cells = [(int(r), int(c)) for c, r in np.clip(np.rint(pixels), 0, size - 1)]
        changed = ((after > 0) != (before > 0)).numpy() & ((after > 0).numpy() == wanted)
        delta = torch.zeros_like(before)
        if changed.any():
            parts, count = ndimage.label(changed, structure=np.ones((3, 3)))
            own = np.zeros(count + 1, dtype=bool)
            places = [np.argwhere(parts == n + 1) for n in range(count)]
            for cell in cells:
                distance = [np.hypot(*(place - cell).T).min() for place in places]
                nearest = int(np.argmin(distance))
                own[nearest + 1] |= distance[nearest] <= 2.5
            if own.any():
                near = ndimage.binary_dilation(own[parts], iterations=2)
                delta = torch.where(torch.from_numpy(near), after - before, delta)
        if not wanted and _mostly_gone(before, before + delta):
            delta = torch.zeros_like(before)  # a background edit takes away a part, never nearly all of a slice
        rows, columns = np.ogrid[:size, :size]
        for row, column in cells:
            current = float((before + delta)[row, column])
            if (current > 0) != wanted:
                bump = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * 1.5**2)).astype(np.float32)
                push = (2.0 if wanted else -2.0) - current
                delta = delta + torch.from_numpy(bump) * push
        return delta

    def _carry(
        self, state: ObjectState, z: int, label: int, changed: np.ndarray, spacing: Spacing, region: EditRegion
    ) -> None:
        """Carry a correction on to further slices while memory agrees with it.

        Neighbours are decoded with the corrected slice in memory; of what they would change, only the wanted kind of
        change that touches the change of the slice before is taken. It ends where nothing is left to change, at a slice
        that was prompted or accepted, and where the edit's region ends.
        """
        prompted, rule = state.memory.conditioning, self.config.memory
        barred = set(prompted) | {index for axis, index in state.accepted if axis == 0}
        low, high = max(state.low, int(region.low[0])), min(state.high, int(region.high[0]))
        for step in (rule.pace(spacing[0]), -rule.pace(spacing[0])):
            tracked: dict[int, SliceMemory] = {}
            front = changed
            other = z + step
            while low <= other <= high and other not in barred:
                here = state.stack.features([other])
                extent = (state.low, state.high)
                fused = recall(state.stack, here, other, prompted, tracked, extent, spacing[0], rule, reverse=step < 0)
                output = self.segmenter.decode(here, SlicePrompt.empty(1), fused)
                old, new = state.logits_at(other), output.logits[0, 0]
                wanted = ((new > 0) == bool(label)) & ((old > 0) != bool(label))
                near = ndimage.binary_dilation(front, iterations=1)
                parts, _ = ndimage.label(wanted.numpy(), structure=np.ones((3, 3)))
                touching = np.unique(parts[near])
                front = np.isin(parts, touching[touching > 0])
                if front.sum() < 2:
                    break
                accepted = torch.from_numpy(ndimage.binary_dilation(front, iterations=1))
                carried = torch.where(accepted, new, old)
                if not label and _mostly_gone(old, carried):
                    break
                state.logits[other] = carried
                tracked[other] = self.segmenter.remember(
                    here, state.logits[other][None, None], output.presence, output.pointer
                )
                other += step

    def _spread(self, state: ObjectState, deltas: dict[int, Tensor], spacing: Spacing, region: EditRegion) -> None:
        """Add each change to its slice fully, and to neighbours with a weight that fades over ``reach_mm``.

        Of several changed slices the nearest one counts.
        """
        for z in deltas:
            state.logits[z] = state.logits_at(z)
        for other in sorted(state.logits):
            if not region.low[0] <= other <= region.high[0]:
                continue
            nearest = min(deltas, key=lambda z: abs(z - other))
            distance = abs(other - nearest) * spacing[0]
            weight = float(np.exp(-0.5 * (2.0 * distance / self.config.reach_mm) ** 2))
            if weight > 0.02:
                state.logits[other] = state.logits[other] + weight * deltas[nearest]

    def _reach_out(self, state: ObjectState, z: int) -> None:
        """A foreground edit beyond the object's range: extend the range, nothing in between is invented but faded."""
        edge = state.low if z < state.low else state.high
        known = state.logits_at(edge)
        step = 1 if z > edge else -1
        for n, between in enumerate(range(edge + step, z + step, step), start=1):
            fade = n / (abs(z - edge) + 1)
            state.logits[between] = known * (1 - fade) + torch.full_like(known, -2.0) * fade
        state.low, state.high = min(state.low, z), max(state.high, z)


def _anchors_on(edit: Edit, z: int) -> np.ndarray:
    """Anchors (M, 3) of an edit on slice ``z``, or the nearest one for a slice that was clipped to the volume."""
    distance = np.abs(np.rint(edit.anchors[:, 0]) - z)
    return edit.anchors[distance == distance.min()]


def _mostly_gone(before: Tensor, after: Tensor) -> bool:
    """True when more than half of a slice's mask would vanish."""
    return float((after > 0).sum()) < 0.5 * float((before > 0).sum())
