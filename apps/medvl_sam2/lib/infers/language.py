"""``medvl_vqa`` and ``medvl_report``: answers in words, in a form that no client stumbles over.

* A program gets JSON (``answer``, ``notice``, ``evidence``: the structures the text rests on, also by sentence).
* Slicer needs a file: it gets a markups file whose control points carry the text and, at the centre of each, the
  structures it rests on; ``label_names`` stays away and the task has no labels, so no segment changes.
* OHIF asks for an image, cannot show text, and in Auto-Segmentation replaces its whole labelmap by the reply. Hiding
  the tasks from OHIF by another task type would hide them from Slicer's panel too, and type ``detection`` would make
  Slicer submit boxes instead of labels. So OHIF gets a label map that its reader turns down, which leaves the labels
  on screen alone (see ``result_writing.write_untouched``); the answer stands in the server's log, which OHIF links.

Nothing is returned as a file where the caller wants to store it as a label.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from monailabel.interfaces.tasks.infer_v2 import InferType

from lib.infers.base import MedVLTask, Reply
from lib.request_parsing import Client, InferRequest, parse_text
from lib.result_writing import write_markups, write_untouched
from lib.runtime import Held, Runtime
from medvl_sam2.types import Answer, Evidence

logger = logging.getLogger(__name__)
_QUESTION_EXAMPLE = "is there a lesion in the liver?"


class LanguageTask(MedVLTask):
    """Base of the tasks that answer in words."""

    def __init__(self, runtime: Runtime, description: str, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(runtime, InferType.SEGMENTATION, [], description, options)

    @abstractmethod
    def answer(self, request: Mapping[str, Any], held: Held) -> Answer:
        """Ask the predictor."""

    def run(self, request: Mapping[str, Any], parsed: InferRequest, held: Held) -> Reply:
        answer = self.answer(request, held)
        logger.info("%s: %r -> %r (%s)", parsed.image.name, answer.question, answer.text, answer.notice)
        sentences = [
            {"text": sentence.text, "evidence": [_evidence(item) for item in sentence.evidence]}
            for sentence in answer.sentences
        ]
        params = {
            "question": answer.question,
            "answer": answer.text,
            "notice": answer.notice,
            "evidence": [_evidence(item) for item in answer.evidence],
            "sentences": sentences,
        }
        if request.get("save_label") or not parsed.wants_file:
            return Reply(params)
        geometry = held.session.volume.geometry
        if parsed.client is Client.SLICER:
            return Reply(params, file=write_markups(answer, geometry))
        return Reply(params, file=write_untouched(geometry))


def _evidence(item: Evidence) -> dict[str, Any]:
    return {"name": item.name, "voxels": item.voxels, "centroid_voxel": item.centroid, "why": item.why}


class VqaTask(LanguageTask):
    """Answers the question in option ``question``."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(
            runtime,
            f"Answers a question about the image. Type it into option question, e.g. {_QUESTION_EXAMPLE!r}. "
            "Not for clinical use.",
            {"question": ""},
        )

    def check(self, request: Mapping[str, Any]) -> None:
        parse_text(request, "question", _QUESTION_EXAMPLE)

    def answer(self, request: Mapping[str, Any], held: Held) -> Answer:
        return held.predictor.answer(held.session, parse_text(request, "question", _QUESTION_EXAMPLE))


class ReportTask(LanguageTask):
    """Writes a report of the image."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime, "Writes a short report of the image. Not for clinical use.")

    def check(self, request: Mapping[str, Any]) -> None:
        """A report needs nothing but an image."""

    def answer(self, request: Mapping[str, Any], held: Held) -> Answer:
        return held.predictor.report(held.session)
