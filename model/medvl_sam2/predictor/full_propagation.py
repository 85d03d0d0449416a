"""Carry everything an annotator prompted through the whole object again, on request."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from medvl_sam2.modeling.slice_segmenter import SliceMemory, SlicePrompt
from medvl_sam2.predictor.first_prompts import FirstPrompts
from medvl_sam2.predictor.objects import ObjectState
from medvl_sam2.predictor.propagation import ObjectMemory, propagate
from medvl_sam2.predictor.slice_points import click_points
from medvl_sam2.predictor.stack import planned_slices


class FullPropagation:
    """Stateless over volumes, as the engine it belongs to."""

    def __init__(self, first: FirstPrompts) -> None:
        self.first, self.config, self.segmenter = first, first.config, first.segmenter

    def run(self, state: ObjectState, spacing: tuple[float, float, float]) -> ObjectState:
        """The state with every slice recomputed but the prompted and the accepted ones, which stay.

        All of these are remembered; slices between two of them are reached from the nearer one, and beyond the
        outermost ones a direction ends where the object does, also beyond the range it had, but not beyond a box that
        bounds the object there. What a slice showed before prompts its decoder, too: memory alone was measured to
        lose more than it mends. The given state stays.
        """
        if not state.logits:
            return state
        state = state.fork()
        state.start = min(max(state.start, state.low), state.high)  # a start that shows nothing may lie beyond
        sources = self._sources(state)
        state.memory = ObjectMemory({z: self._remembered(state, z) for z in sources})
        low, high = self._bounds(state, sources, spacing[0])
        plan = planned_slices(low, high, state.start, spacing[0], self.config.slice_step_mm)
        plan = sorted({*plan, *sources})
        known = {z: state.logits_at(z) for z in plan if state.low <= z <= state.high}
        known = {z: logits for z, logits in known.items() if bool((logits > 0).any())}
        standing = {z: state.logits_at(z) for z in sources}
        masks = {z: state.kept[z] for z in sources if z in state.kept}
        outputs = propagate(state.stack, state.memory, plan, spacing[0], self.config.memory, True, known)
        state.logits = standing | {z: self.first.blended(state, z, out.logits[0, 0]) for z, out in outputs.items()}
        state.kept = masks
        state.trim()
        state.propagated = True
        return state

    def _bounds(self, state: ObjectState, sources: list[int], spacing: float) -> tuple[int, int]:
        """First and last slice the object may occupy.

        A box that is thick along the slices says so, the scene's map within a little; else any slice may show it.
        """
        last = state.stack.image.shape[0] - 1
        box = state.box
        if box is not None and state.across != 0:
            low, high = round(float(box[0, 0])), round(float(box[1, 0]))
        elif state.from_scene and state.rough:
            more = int(self.config.memory.empty / spacing)
            low, high = min(state.rough) - more, max(state.rough) + more
        else:
            low, high = 0, last
        return max(0, min(low, sources[0])), min(last, max(high, sources[-1]))

    @staticmethod
    def _sources(state: ObjectState) -> list[int]:
        """Slices the annotator has judged: the start, those with edits, and accepted ones within the range."""
        last = state.stack.image.shape[0] - 1
        edited = {int(np.clip(z, 0, last)) for edit in state.clicks for z in edit.slices}
        accepted = {index for axis, index in state.accepted if axis == 0}
        return sorted(z for z in {state.start} | edited | accepted if state.low <= z <= state.high)

    def _remembered(self, state: ObjectState, z: int) -> SliceMemory:
        """What slice ``z`` as it stands leaves behind; decoded once more for its pointer."""
        features, logits = state.stack.features([z]), self._standing(state, z)
        prompt = SlicePrompt(*click_points(state.stack.crop, state.clicks, z))
        shown = bool((logits > 0).any())
        if shown:
            prompt = replace(prompt, mask_logits=logits[None, None], mask_present=torch.ones(1, dtype=torch.bool))
        output = self.segmenter.decode(features, prompt)
        presence = output.presence.new_full((1,), 10.0 if shown else -10.0)
        return self.segmenter.remember(features, logits[None, None], presence, output.pointer, prompted=True)

    def _standing(self, state: ObjectState, z: int) -> Tensor:
        """Logits (h, h) of what slice ``z`` shows: an accepted mask where there is one."""
        accepted = state.accepted.get((0, z))
        if accepted is None:
            return state.logits_at(z)
        small = replace(state.stack.crop, size=self.segmenter.mask_size)
        return small.sample(torch.from_numpy(accepted[None].astype(np.float32)))[0, 0] * 12 - 6
