"""Carry a mask from prompted slices up and down through a stack, with SAM2's memory across slices.

The two directions keep separate banks (as MedSAM2's reset between passes); prompted slices serve both. What a slice
remembers, and where the object ends, is decided in mm: slices 5 mm apart have little in common after a few of them,
where slices 1 mm apart are all but the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from medvl_sam2.modeling.slice_segmenter import SliceFeatures, SliceMemory, SliceOutput, SlicePrompt
from medvl_sam2.predictor.stack import SliceStack


@dataclass
class ObjectMemory:
    """Memories of one object: ``conditioning`` of the prompted slices by canonical z."""

    conditioning: dict[int, SliceMemory] = field(default_factory=dict)


@dataclass(frozen=True)
class MemoryRule:
    """Lengths in mm.

    ``step``: one position on SAM2's time axis, at least one slice. ``reach``: how far back slices that were not
    prompted are remembered, the last one always. ``empty``: a direction ends after so much without the object.
    """

    step: float = 2.0
    reach: float = 12.0
    empty: float = 6.0

    def pace(self, spacing: float) -> int:
        """Slices a position, for slices ``spacing`` mm apart."""
        return max(1, round(self.step / spacing))


def recall(
    stack: SliceStack,
    here: SliceFeatures,
    z: int,
    conditioning: Mapping[int, SliceMemory],
    tracked: Mapping[int, SliceMemory],
    extent: tuple[int, int],
    spacing: float,
    rule: MemoryRule,
    reverse: bool,
) -> Tensor:
    """Features ``here`` (1 row) of slice ``z`` fused with memory: (1, C, S/16, S/16).

    ``conditioning``: prompted slices by z, of which the nearest count (``SliceConfig.max_cond_slices``). ``tracked``:
    slices decoded in this direction, by z. ``extent``: first and last slice of the run. Tracked slices follow one
    another without gaps on the time axis, as in training, where strides of 1 to 6 mm were drawn.
    """
    low, high = extent
    pace = rule.pace(spacing)
    place = round((z - low) / pace)
    fixed: dict[int, SliceMemory] = {}
    for k in sorted(conditioning, key=lambda k: (abs(k - z), k)):
        away = 1 if k > z else -1
        position = round((k - low) / pace)
        while position == place or position in fixed:  # nearer than one step: next to what is there
            position += away
        fixed[position] = conditioning[k]
    order = sorted(tracked, key=lambda k: abs(k - z))
    near = [k for n, k in enumerate(order) if n == 0 or abs(k - z) * spacing <= rule.reach]
    behind = {place + (rank if reverse else -rank): tracked[k] for rank, k in enumerate(near, start=1)}
    return stack.segmenter.attend(here, place, fixed, behind, (high - low) // pace + 1, reverse)


def propagate(
    stack: SliceStack,
    memory: ObjectMemory,
    plan: list[int],
    spacing: float,
    rule: MemoryRule,
    open_ended: bool,
    known: Mapping[int, Tensor] | None = None,
) -> dict[int, SliceOutput]:
    """Decode the slices of ``plan`` outwards from those in ``memory.conditioning``, of which it holds at least one.

    ``plan`` is sorted canonical z, ``spacing`` the distance of slices in mm. A slice between two prompted ones is
    reached from the nearer one. With ``open_ended`` the two outer directions end where the object does. ``known``:
    logits (h, h) by z that a slice had before, which prompt the decoder beside the memory.
    """
    outputs: dict[int, SliceOutput] = {}
    sources = [z for z in plan if z in memory.conditioning]
    for number, source in enumerate(sources):
        above = sources[number + 1] if source != sources[-1] else None
        below = sources[number - 1] if number else None
        upward = [z for z in plan if z > source and (above is None or z - source <= above - z)]
        downward = [z for z in reversed(plan) if z < source and (below is None or source - z < z - below)]
        for run, reverse, outer in ((upward, False, above is None), (downward, True, below is None)):
            extent, ends = (plan[0], plan[-1]), open_ended and outer
            outputs |= _run(stack, memory, source, run, extent, spacing, rule, reverse, ends, known or {})
    return outputs


def _run(
    stack: SliceStack,
    memory: ObjectMemory,
    source: int,
    run: Iterable[int],
    extent: tuple[int, int],
    spacing: float,
    rule: MemoryRule,
    reverse: bool,
    open_ended: bool,
    known: Mapping[int, Tensor],
) -> dict[int, SliceOutput]:
    """Decode slices one after the other away from ``source``."""
    outputs: dict[int, SliceOutput] = {}
    tracked: dict[int, SliceMemory] = {}
    seen = source
    for z in run:
        here = stack.features([z])
        fused = recall(stack, here, z, memory.conditioning, tracked, extent, spacing, rule, reverse)
        prompt = SlicePrompt.empty(1)
        if z in known:
            prompt = replace(prompt, mask_logits=known[z][None, None], mask_present=torch.ones(1, dtype=torch.bool))
        output = stack.segmenter.decode(here, prompt, fused)
        outputs[z] = output
        tracked[z] = stack.segmenter.remember(here, output.logits, output.presence, output.pointer)
        if bool((output.logits > 0).any()) and float(output.presence) > 0:
            seen = z
        elif open_ended and abs(z - seen) * spacing >= rule.empty:
            break
    return outputs
