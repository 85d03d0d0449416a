"""``medvl_interactive``: clicks, boxes, scribbles, lassos, words. Slicer's SmartEdit, OHIF's Point Prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from monailabel.interfaces.tasks.infer_v2 import InferType

from lib.configs.medvl_sam2 import LABEL_VALUES, OBJECT_LABEL
from lib.infers.base import MedVLTask, Reply
from lib.request_parsing import InferRequest, parse_corrected, parse_label, parse_move, parse_prompt
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
        if parse_move(request):
            return
        prompt = _prompt(request)
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
            prompt = _prompt(request)
            if prompt.names_only and not prompt.text:
                prompt = replace(prompt, text=name)
            segmentation = held.predictor.segment_prompt(held.session, prompt, name=name)
        params = {"label_names": {name: 1}, "scores": dict(segmentation.scores)}
        return Reply(params, (segmentation.mask > 0).astype("uint8"), segmentation.geometry)


def _prompt(request: Mapping[str, Any]) -> Prompt:
    prompt = parse_prompt(request)
    placed = [*prompt.labels.tolist(), *(stroke.label for stroke in prompt.strokes)]
    if placed and not any(placed) and prompt.box is None and prompt.mask is None and not prompt.text:
        raise PromptError("only background points: place at least one point inside the structure, or draw a box")
    return prompt
