"""From corrections to a better mask.

First prompts (``first_prompts``) choose the window (a region of interest: a lesion costs what the lesion costs), the
start slice and how far to propagate. Every later click edits locally: the clicked slice is decoded again with its
previous logits, only the changed component under the click is kept, and the change fades out over neighbouring slices.
A click never re-runs the whole volume, because that was measured to destroy good slices.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from medvl_sam2.geometry import SliceCrop
from medvl_sam2.modeling.slice_segmenter import SliceMemory, SliceOutput, SlicePrompt, SliceSegmenter
from medvl_sam2.predictor.first_prompts import FirstPrompts, InteractiveConfig, click_points
from medvl_sam2.predictor.objects import CanonicalClick, ObjectState
from medvl_sam2.region_assist import box_diagonal, stroke


class InteractiveEngine:
    """Stateless over volumes: all state lies in :class:`ObjectState`."""

    def __init__(self, segmenter: SliceSegmenter, config: InteractiveConfig | None = None) -> None:
        self.segmenter = segmenter
        self.config = config or InteractiveConfig()
        self.first = FirstPrompts(segmenter, self.config)

    def click(self, state: ObjectState, spacing: tuple[float, float, float], click: CanonicalClick) -> ObjectState:
        """The state after one corrective click; the given one stays as it was, to go back to."""
        state = self._widened(state.fork(), spacing, click)
        z = int(np.clip(click.z, 0, state.stack.image.shape[0] - 1))
        painted = self._stroke(state, spacing, click) if self.config.assist else None
        state.clicks.append(click)
        if click.label == 0 and not self._reaches(state, click, z):
            return state  # background already
        if z < state.low or z > state.high:
            self._reach_out(state, z, spacing)
        before = state.logits_at(z)
        output = self._decode_again(state, z, before, spacing)
        delta = self._local_change(state, click, before, output.logits[0, 0])
        self._spread(state, z, delta, spacing)
        if painted is not None:
            self._paint(state, painted, click.label, spacing)
        before_edit = before > 0
        presence = output.presence.new_full((1,), 10.0 if bool((state.logits[z] > 0).any()) else -10.0)
        state.memory.conditioning[z] = self.segmenter.remember(
            state.stack.features([z]), state.logits[z][None, None], presence, output.pointer, prompted=True
        )
        if self.config.carry_clicks:
            changed = ((state.logits[z] > 0) != before_edit).numpy()
            self._carry(state, z, click.label, changed, spacing)
        return state

    # --- corrections ---------------------------------------------------------------------------------------------

    def _widened(self, state: ObjectState, spacing: tuple[float, float, float], click: CanonicalClick) -> ObjectState:
        """A window that holds the click with room around it; only a foreground click outside needs a new one."""
        crop = state.stack.crop
        x, y = crop.forward_points(np.array([click.position[1:]]))[0]
        margin = 0.06 * crop.size
        if click.label == 0 or (margin <= min(x, y) and max(x, y) <= crop.size - 1 - margin):
            return state
        box = state.extent_yx()
        point = np.array([click.position[1:]])
        corners = point if box is None else np.concatenate([box, point])
        wider = SliceCrop.around(
            np.stack([corners.min(axis=0), corners.max(axis=0)]),
            spacing[1:],
            1.4,
            crop.size,
            max(self.config.min_window_mm, crop.extent_mm),
        )
        return state.moved(wider)

    def _stroke(self, state: ObjectState, spacing: tuple[float, float, float], click: CanonicalClick) -> np.ndarray:
        """What the click means from intensities alone, on the mask as it was."""
        point = np.clip(np.asarray(click.position), 0, np.asarray(state.stack.image.shape) - 1)
        diagonal = box_diagonal(state.box, spacing)
        return stroke(state.stack.image, spacing, state.mask(), point, click.label, diagonal, self.config.assist_rule)

    def _paint(self, state: ObjectState, painted: np.ndarray, label: int, spacing: tuple[float, float, float]) -> None:
        """Push the painted ball's logits to the click's side; the object's range grows with foreground paint."""
        shown = [int(z) for z in np.flatnonzero(painted.any(axis=(1, 2)))]
        if label == 1:
            for z in (min(shown), max(shown)):
                if z < state.low or z > state.high:
                    self._reach_out(state, z, spacing)
        shown = [z for z in shown if state.low <= z <= state.high]
        if not shown:
            return
        small = replace(state.stack.crop, size=self.segmenter.mask_size)
        soft = small.sample(torch.from_numpy(painted[shown].astype(np.float32)))[:, 0]
        for z, plane in zip(shown, soft, strict=True):
            old = state.logits_at(z)
            push = plane * 8 - 4
            state.logits[z] = torch.maximum(old, push) if label == 1 else torch.minimum(old, -push)

    @staticmethod
    def _reaches(state: ObjectState, click: CanonicalClick, z: int) -> bool:
        """Whether a click lies in the window and in the range of slices the object may occupy."""
        x, y = state.stack.crop.forward_points(np.array([click.position[1:]]))[0]
        inside = min(x, y) >= -0.5 and max(x, y) <= state.stack.crop.size - 0.5
        return inside and state.low <= z <= state.high

    def _positions(self, state: ObjectState, spacing: tuple[float, float, float]) -> tuple[int, int]:
        """Slices a memory step and the lowest slice: memory counts steps of the propagation, not voxels."""
        return max(1, round(self.config.slice_step_mm / spacing[0])), state.low

    def _decode_again(
        self, state: ObjectState, z: int, before: Tensor, spacing: tuple[float, float, float]
    ) -> SliceOutput:
        """Decode slice ``z`` with all its clicks, its previous logits and the memory of prompted slices."""
        here = state.stack.features([z])
        on_slice = [c for c in state.clicks if c.z == z]
        points, labels = click_points(state.stack.crop, on_slice)
        prompt = SlicePrompt(points, labels)
        if bool((before > 0).any()):
            prompt = replace(prompt, mask_logits=before[None, None], mask_present=torch.ones(1, dtype=torch.bool))
        fused = None
        pace, low = self._positions(state, spacing)
        others = {(k - low) // pace: m for k, m in state.memory.conditioning.items() if k != z}
        if others and z not in state.memory.conditioning:
            count = (state.high - low) // pace + 1
            fused = self.segmenter.attend(here, (z - low) // pace, others, {}, count, reverse=z < state.start)
        return self.segmenter.decode(here, prompt, fused)

    def _local_change(self, state: ObjectState, click: CanonicalClick, before: Tensor, after: Tensor) -> Tensor:
        """Change of logits (h, h), kept only in the changed component nearest to the click; the click always wins."""
        size = before.shape[-1]
        x, y = state.stack.crop.forward_points(np.array([click.position[1:]]))[0] / state.stack.crop.size * size - 0.375
        row, column = int(np.clip(round(y), 0, size - 1)), int(np.clip(round(x), 0, size - 1))
        wanted = bool(click.label)
        changed = ((after > 0) != (before > 0)).numpy() & ((after > 0).numpy() == wanted)
        delta = torch.zeros_like(before)
        if changed.any():
            parts, count = ndimage.label(changed, structure=np.ones((3, 3)))
            distance = [np.hypot(*(np.argwhere(parts == n + 1) - (row, column)).T).min() for n in range(count)]
            nearest = int(np.argmin(distance))
            if distance[nearest] <= 2.5:
                near = ndimage.binary_dilation(parts == nearest + 1, iterations=2)
                delta = torch.where(torch.from_numpy(near), after - before, delta)
        if not wanted and _mostly_gone(before, before + delta):
            delta = torch.zeros_like(before)  # a background click takes away a part, never nearly all of a slice
        current = float((before + delta)[row, column])
        if (current > 0) != wanted:
            rows, columns = np.ogrid[:size, :size]
            bump = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * 1.5**2)).astype(np.float32)
            push = (2.0 if wanted else -2.0) - current
            delta = delta + torch.from_numpy(bump) * push
        return delta

    def _carry(
        self, state: ObjectState, z: int, label: int, changed: np.ndarray, spacing: tuple[float, float, float]
    ) -> None:
        """Carry a correction on to further slices while memory agrees with it.

        Neighbours are decoded with the corrected slice in memory; of what they would change, only the wanted kind of
        change that touches the change of the slice before is taken. It ends where nothing is left to change.
        """
        prompted = state.memory.conditioning
        pace, low = self._positions(state, spacing)
        conditioning = {(k - low) // pace: m for k, m in prompted.items()}
        count = (state.high - low) // pace + 1
        for step in (pace, -pace):
            tracked: dict[int, SliceMemory] = {}
            front = changed
            other = z + step
            while state.low <= other <= state.high and other not in prompted:
                here = state.stack.features([other])
                place = (other - low) // pace
                fused = self.segmenter.attend(here, place, conditioning, tracked, count, reverse=step < 0)
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
                tracked[place] = self.segmenter.remember(
                    here, state.logits[other][None, None], output.presence, output.pointer
                )
                other += step

    def _spread(self, state: ObjectState, z: int, delta: Tensor, spacing: tuple[float, float, float]) -> None:
        """Add the change to slice ``z`` fully and to neighbours with a weight that fades over ``reach_mm``."""
        state.logits[z] = state.logits_at(z)
        for other in sorted(state.logits):
            distance = abs(other - z) * spacing[0]
            weight = float(np.exp(-0.5 * (2.0 * distance / self.config.reach_mm) ** 2))
            if weight > 0.02:
                state.logits[other] = state.logits[other] + weight * delta

    def _reach_out(self, state: ObjectState, z: int, spacing: tuple[float, float, float]) -> None:
        """A foreground click beyond the object's range: extend the range, nothing in between is invented but faded."""
        edge = state.low if z < state.low else state.high
        known = state.logits_at(edge)
        step = 1 if z > edge else -1
        for n, between in enumerate(range(edge + step, z + step, step), start=1):
            fade = n / (abs(z - edge) + 1)
            state.logits[between] = known * (1 - fade) + torch.full_like(known, -2.0) * fade
        state.low, state.high = min(state.low, z), max(state.high, z)


def _mostly_gone(before: Tensor, after: Tensor) -> bool:
    """True when more than half of a slice's mask would vanish."""
    return float((after > 0).sum()) < 0.5 * float((before > 0).sum())
