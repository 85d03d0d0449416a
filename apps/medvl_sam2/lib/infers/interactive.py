"""``medvl_interactive``: clicks, boxes, scribbles, lassos, words. Slicer's SmartEdit, OHIF's Point Prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from monailabel.interfaces.tasks.infer_v2 import InferType

from lib.configs.medvl_sam2 import LABEL_VALUES, OBJECT_LABEL
from lib.infers.base import MedVLTask, Reply
from lib.request_parsing import InferRequest, parse_changed_box, parse_corrected, parse_label, parse_move, parse_prompt
from lib.runtime import Held, Runtime
from medvl_sam2.errors import PromptError
from medvl_sam2.types import Prompt


class InteractiveTask(MedVLTask):
    """Segments what the prompts show, as mask value 1 for both clients.

    Type deepgrow: OHIF gives any non-zero voxel the selected label, Slicer imports it under ``label``. A Slicer
    segment named in words and run without any point is a text prompt, whose mask later points correct.
    """

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(
            runtime,
            InferType.DEEPGROW,
            LABEL_VALUES,
            "Click on a structure, or draw a box around it; more clicks correct the mask. Not for clinical use.",
            {"prompt": "", "propagate": False},
        )

    def check(self, request: Mapping[str, Any]) -> None:
        parse_changed_box(request)
        if parse_move(request):
            return
        prompt = parse_prompt(request)
        if prompt.names_only and not prompt.text and parse_label(request) == OBJECT_LABEL:
            raise PromptError("no prompt: place at least one foreground point, draw a box, or name the segment")

    def corrected(self, request: Mapping[str, Any]) -> str | None:
        return parse_corrected(request)

    def run(self, request: Mapping[str, Any], parsed: InferRequest, held: Held) -> Reply:
        name, move = parse_label(request), parse_move(request)
        if move < 0:
            segmentation = held.predictor.undo(held.session, name, -move)
        elif move > 0:
            segmentation = held.predictor.redo(held.session, name, move)
        else:
            prompt = parse_prompt(request)
            if _only_background(prompt) and not held.session.stands(name):
                raise PromptError(
                    f"only background points, and there is no {name!r} yet to correct: place at least one point inside "
                    "the structure, or draw a box"
                )
            if prompt.names_only and not prompt.text:
                prompt = replace(prompt, text=name)
            segmentation = held.predictor.segment_prompt(held.session, prompt, name=name)
        params: dict[str, Any] = {"label_names": {name: 1}, "scores": dict(segmentation.scores)}
        mask = (segmentation.mask > 0).astype("uint8")
        changes, have = parse_changed_box(request)
        if not changes:
            held.sent.forget(name)
            return Reply(params, mask, segmentation.geometry)
        part = held.sent.part(name, mask, segmentation.geometry, have)
        params |= {"changed_box": part.box, "whole": part.whole, "mask_number": part.number}
        return Reply(params, part.mask, part.geometry)


def _only_background(prompt: Prompt) -> bool:
    """Whether a prompt says only where the object is not."""
    placed = [*prompt.labels.tolist(), *(stroke.label for stroke in prompt.strokes)]
    return bool(placed) and not any(placed) and prompt.box is None and prompt.mask is None and not prompt.text
