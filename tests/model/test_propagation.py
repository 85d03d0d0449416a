"""Propagation in mm: what is remembered, where it ends, and that a lesion costs what the lesion costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medvl_sam2.intensity import SliceIntensity
from medvl_sam2.modeling.slice_segmenter import SliceFeatures, SliceMemory, SliceOutput, SlicePrompt, SliceSegmenter
from medvl_sam2.predictor.first_prompts import FirstPrompts, InteractiveConfig
from medvl_sam2.predictor.placed_segmenter import PlacedSegmenter
from medvl_sam2.predictor.propagation import MemoryRule, ObjectMemory, propagate, recall
from medvl_sam2.predictor.stack import SliceStack
from medvl_sam2.strokes import Stroke, StrokeKind
from medvl_sam2.types import Geometry, Modality, Prompt, Volume
from small_model import small_model, small_predictor

RULE = MemoryRule()


@dataclass
class Told:
    """What the segmenter was asked: the positions of its two banks, and the direction."""

    index: int
    conditioning: list[int]
    tracked: list[int]
    reverse: bool


@dataclass
class Line:
    """A segmenter over slices whose object lies on ``shown``; features are the slice's own number."""

    shown: set[int]
    told: list[Told] = field(default_factory=list)
    decoded: list[int] = field(default_factory=list)

    def attend(
        self,
        features: SliceFeatures,
        index: int,
        conditioning: Mapping[int, SliceMemory],
        tracked: Mapping[int, SliceMemory],
        count: int,
        reverse: bool,
    ) -> Tensor:
        assert 0 <= index < count
        self.told.append(Told(index, sorted(conditioning), sorted(tracked), reverse))
        return torch.zeros(1)

    def decode(self, features: Any, prompt: SlicePrompt, fused: Tensor) -> SliceOutput:
        z = int(features)
        self.decoded.append(z)
        return SliceOutput(torch.full((1, 1, 2, 2), 1.0 if z in self.shown else -1.0), *[torch.ones(1)] * 3)

    def remember(self, features: Any, logits: Tensor, presence: Tensor, pointer: Tensor) -> Any:
        return int(features)


class LineStack:
    """The part of a stack that propagation uses."""

    def __init__(self, line: Line) -> None:
        self.segmenter = line

    def features(self, slices: list[int]) -> int:
        return slices[0]


def run(line: Line, sources: list[int], plan: list[int], spacing: float, open_ended: bool = True) -> list[int]:
    memory: Any = ObjectMemory({z: z for z in sources})  # type: ignore[dict-item]
    stack: Any = LineStack(line)
    return sorted(propagate(stack, memory, plan, spacing, RULE, open_ended))


@pytest.mark.parametrize(("spacing", "beyond"), [(1.0, 6), (2.0, 3), (5.0, 2), (8.0, 1)])
def test_a_direction_ends_a_distance_after_the_object_not_a_number_of_slices(spacing: float, beyond: int) -> None:
    line = Line(set(range(40, 51)))
    assert run(line, [45], list(range(100)), spacing) == [z for z in range(40 - beyond, 51 + beyond) if z != 45]


def test_a_gap_shorter_than_the_run_is_crossed() -> None:
    line = Line({45, 46, 48, 49})
    assert run(line, [45], list(range(100)), 4.0) == [43, 44, 46, 47, 48, 49, 50, 51]


def test_slices_between_prompted_ones_are_reached_from_the_nearer_one() -> None:
    line = Line(set())
    assert run(line, [10, 20], list(range(5, 30)), 2.0) == [7, 8, 9, *range(11, 20), 21, 22, 23]
    up = [z for z, told in zip(line.decoded, line.told, strict=True) if not told.reverse]
    assert up == [11, 12, 13, 14, 15, 21, 22, 23]  # 15 is as near to both


def test_the_whole_plan_is_decoded_where_the_range_is_known() -> None:
    assert run(Line({12}), [12], list(range(5, 30)), 5.0, open_ended=False) == [z for z in range(5, 30) if z != 12]


@pytest.mark.parametrize(("spacing", "most"), [(2.0, 6), (5.0, 2), (12.0, 1), (20.0, 1)])
def test_what_is_remembered_lies_within_a_distance(spacing: float, most: int) -> None:
    line = Line(set(range(60)))
    run(line, [0], list(range(60)), spacing)
    assert max(len(told.tracked) for told in line.told) == most
    for told in line.told[1:]:
        assert told.tracked == list(range(told.index - len(told.tracked), told.index))


def test_positions_are_steps_in_mm_and_no_prompted_slice_is_lost() -> None:
    line = Line(set())
    stack: Any = LineStack(line)
    prompted: Any = {10: 1, 11: 2, 13: 3, 30: 4}
    recall(stack, stack.features([12]), 12, prompted, {}, (0, 40), 0.5, RULE, reverse=False)
    # Four slices a step: 12 is at 3; 10 and 11 fall on 2 and on what is free before it, 13 after 3, 30 at 8.
    assert line.told[0] == Told(3, [1, 2, 4, 8], [], False)
    tracked: Any = {20: 1, 24: 2, 28: 3}
    recall(stack, stack.features([32]), 32, prompted, tracked, (0, 40), 0.5, RULE, reverse=False)
    assert line.told[1].tracked == [5, 6, 7]


@dataclass
class Meter:
    """Counts what passes the encoder."""

    slices: int = 0
    pixels: int = 0

    def watch(self, monkeypatch: pytest.MonkeyPatch, segmenter: SliceSegmenter) -> None:
        encode = segmenter.encode

        def counted(images: Tensor) -> SliceFeatures:
            self.slices += len(images)
            self.pixels += len(images) * images.shape[-1] * images.shape[-2]
            return encode(images)

        monkeypatch.setattr(segmenter, "encode", counted)


def lesion_study(shape: tuple[int, int, int], corner: tuple[int, int, int]) -> Volume:
    """A lesion of 12 mm in noise, 1 mm voxels stored as (i, j, k) = (x, y, z); ``corner`` is its first voxel."""
    i, j, k = np.ogrid[: shape[0], : shape[1], : shape[2]]
    inside = sum(((axis - start - 6) / 6.0) ** 2 for axis, start in zip((i, j, k), corner, strict=True)) <= 1
    array = (np.where(inside, 160, 20) + np.random.default_rng(1).normal(0, 4, shape)).astype(np.int16)
    return Volume(array, Geometry(shape, np.diag([-1.0, -1, 1, 1])), Modality.CT)


def test_a_small_lesion_costs_the_same_in_a_small_and_in_a_large_study(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the lesion's own slices is encoded, in a window round it; counted, not timed."""
    costs = []
    for shape, corner in (((64, 64, 40), (26, 26, 14)), ((192, 160, 200), (150, 40, 170))):
        predictor = small_predictor()
        meter = Meter()
        meter.watch(monkeypatch, predictor.model.segmenter)
        session = predictor.open(lesion_study(shape, corner))
        low = np.array(corner, dtype=float)
        box = Prompt(box=np.stack([low, low + 12]))
        click = replace(box, points=low[None] + 3, labels=np.array([0]))
        line = Stroke(StrokeKind.SCRIBBLE, low + np.array([[4.0, 6, 2], [8, 6, 9]]), 1)
        for step in (box, click, replace(click, strokes=(line,)), replace(click, strokes=(line,))):
            predictor.segment_prompt(session, step)
        costs.append((meter.slices, meter.pixels))
    assert costs[0] == costs[1]
    assert 0 < costs[0][0] <= 13
    assert costs[0][1] == costs[0][0] * 64 * 64


@torch.inference_mode()
def test_the_start_of_a_box_on_a_slice_ends_where_the_object_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder here shows the object on the slices 14 to 26 alone."""
    segmenter = PlacedSegmenter(small_model().segmenter)
    volume = lesion_study((64, 64, 120), (26, 26, 14))
    image = np.ascontiguousarray(volume.array.transpose(2, 1, 0))
    stacks: list[SliceStack] = []
    features = SliceStack.features
    here: list[int] = []

    def noted(stack: SliceStack, slices: list[int]) -> SliceFeatures:
        stacks.append(stack)
        here[:] = slices
        return features(stack, slices)

    decode = segmenter.decode

    def on_lesion(encoded: SliceFeatures, prompt: SlicePrompt, fused: Tensor | None = None) -> SliceOutput:
        output = decode(encoded, prompt, fused)
        shown = torch.full_like(output.logits, -8.0)
        if len(here) == 1 and 14 <= here[0] <= 26:
            shown[..., 4:12, 4:12] = 8.0
        return replace(output, logits=shown, presence=torch.ones_like(output.presence))

    monkeypatch.setattr(SliceStack, "features", noted)
    monkeypatch.setattr(segmenter, "decode", on_lesion)
    first = FirstPrompts(segmenter, InteractiveConfig(assist=False))
    box = np.array([[20.0, 26, 26], [20.0, 38, 38]])
    state = first.from_box(image, (1.0, 1.0, 1.0), SliceIntensity.of(image, Modality.CT), box)
    assert (state.low, state.high) == (14, 26)
    assert np.array_equal(state.box, box)
    encoded = stacks[0].encoded
    assert encoded <= set(range(14 - 8, 26 + 9))
