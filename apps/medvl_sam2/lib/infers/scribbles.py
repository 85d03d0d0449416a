"""``medvl_scribbles``: Slicer's Scribbles panel, whose painted labelmap becomes scribbles of the interactive engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monailabel.interfaces.tasks.infer_v2 import InferType

from lib.infers.base import MedVLTask, Reply
from lib.request_parsing import InferRequest, parse_painted
from lib.runtime import Held, Runtime


class ScribblesTask(MedVLTask):
    """Corrects the selected segment by what is painted as foreground and background; mask value 1 is that segment.

    The labelmap holds the segment as it is, so every request stands alone: nothing of earlier ones is remembered.
    """

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(
            runtime,
            InferType.SCRIBBLES,
            [],
            "Corrects the selected segment where you paint foreground (green) and background (red). "
            "Not for clinical use.",
        )

    def check(self, request: Mapping[str, Any]) -> None:
        """Everything is in the labelmap, which is read once: by :meth:`run`."""

    def run(self, request: Mapping[str, Any], parsed: InferRequest, held: Held) -> Reply:
        name, prompt = parse_painted(request)
        segmentation = held.predictor.segment_prompt(held.session, prompt, name=name)
        params = {"label_names": {name: 1}, "scores": dict(segmentation.scores)}
        return Reply(params, (segmentation.mask > 0).astype("uint8"), segmentation.geometry)
