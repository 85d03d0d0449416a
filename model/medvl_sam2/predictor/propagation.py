"""Carry a mask from prompted slices up and down through a stack, with SAM2's memory across slices.

The two directions keep separate banks (as MedSAM2's reset between passes); prompted slices serve both.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from medvl_sam2.modeling.slice_segmenter import SliceMemory, SliceOutput, SlicePrompt
from medvl_sam2.predictor.stack import SliceStack

EMPTY_RUN = 3
"""Stop an open-ended propagation after this many slices without the object."""


@dataclass
class ObjectMemory:
    """Memories of one object: ``conditioning`` of the prompted slices by canonical z."""

    conditioning: dict[int, SliceMemory] = field(default_factory=dict)


def propagate(
    stack: SliceStack,
    memory: ObjectMemory,
    plan: list[int],
    start: int,
    stop_when_empty: bool,
) -> dict[int, SliceOutput]:
    """Decode the slices of ``plan`` outwards from ``start`` (already in ``memory.conditioning``).

    ``plan`` is sorted canonical z and contains ``start``; memory distances count positions in it. With
    ``stop_when_empty`` a direction ends after :data:`EMPTY_RUN` slices without the object.
    """
    outputs: dict[int, SliceOutput] = {}
    origin = plan.index(start)
    conditioning = {plan.index(z): m for z, m in memory.conditioning.items() if z in plan}
    for step in (1, -1):
        tracked: dict[int, SliceMemory] = {}
        empty = 0
        position = origin + step
        while 0 <= position < len(plan):
            z = plan[position]
            if z in memory.conditioning:
                break
            here = stack.features([z])
            fused = stack.segmenter.attend(here, position, conditioning, tracked, len(plan), reverse=step < 0)
            output = stack.segmenter.decode(here, SlicePrompt.empty(1, fused.device), fused)
            outputs[z] = output
            tracked[position] = stack.segmenter.remember(here, output.logits, output.presence, output.pointer)
            empty = 0 if bool((output.logits > 0).any()) and float(output.presence) > 0 else empty + 1
            if stop_when_empty and empty >= EMPTY_RUN:
                break
            position += step
    return outputs
