"""``medvl_semantic`` and ``medvl_referring``: segmentation from class names and from sentences.

Mask values: Slicer reads them by position in ``label_names`` and clears every segment listed there, so it gets values
1..k and exactly k names. OHIF reads the app-wide values of ``/info/`` and never sees ``label_names``; everybody but
Slicer gets those, with the whole vocabulary as ``label_names`` (position and value agree, as a prediction stored under
``original`` needs when Slicer opens it).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from monailabel.interfaces.tasks.infer_v2 import InferType

from lib.configs.medvl_sam2 import LABEL_VALUES, OBJECT_LABEL
from lib.infers.base import MedVLTask, Reply
from lib.request_parsing import Client, InferRequest, parse_classes, parse_text, ticked_label
from lib.runtime import Held, Runtime
from medvl_sam2.types import Segmentation
from medvl_sam2.vocabulary import CLASSES, spoken

_PROMPT_EXAMPLE = "the largest lesion in the right lobe of the liver"
# Unmodified OHIF has no button to save: with the first option ticked, the server stores what it answers.
_SAVING = {"save_label": False, "label_tag": ["original", "final"]}
_LESION = re.compile(r"\b(lesion|cyst|tumou?r|mass|nodule|metastas[ie]s|finding)s?\b", re.IGNORECASE)


class SemanticTask(MedVLTask):
    """Segments classes of the vocabulary: option ``classes`` (names with commas, empty for all)."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(
            runtime,
            InferType.SEGMENTATION,
            {name: LABEL_VALUES[name] for name in CLASSES},
            "Segments organs and lesions by name. Option classes: names with commas, empty for all. "
            "Not for clinical use.",
            {"classes": "", **_SAVING},
        )

    def check(self, request: Mapping[str, Any]) -> None:
        parse_classes(request)

    def run(self, request: Mapping[str, Any], parsed: InferRequest, held: Held) -> Reply:
        classes = parse_classes(request)
        segmentation = held.predictor.segment_classes(held.session, classes)
        values = [LABEL_VALUES[name] for name in segmentation.names]
        return _reply(segmentation, values, parsed.client)


class ReferringTask(MedVLTask):
    """Segments the one structure a sentence describes: option ``prompt``."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(
            runtime,
            InferType.SEGMENTATION,
            LABEL_VALUES,
            f"Segments what a sentence describes. Type it into option prompt, e.g. {_PROMPT_EXAMPLE!r}. "
            "Not for clinical use.",
            {"prompt": "", **_SAVING},
        )

    def check(self, request: Mapping[str, Any]) -> None:
        parse_text(request, "prompt", _PROMPT_EXAMPLE)

    def run(self, request: Mapping[str, Any], parsed: InferRequest, held: Held) -> Reply:
        text = parse_text(request, "prompt", _PROMPT_EXAMPLE)
        segmentation = held.predictor.segment_text(held.session, text)
        values = [referred_value(name, text, ticked_label(request)) for name in segmentation.names]
        reply = _reply(segmentation, values, parsed.client)
        return Reply({**reply.params, "prompt": text, "text": segmentation.text}, reply.mask, reply.geometry)


def referred_value(name: str, text: str, ticked: int | None = None) -> int:
    """App-wide mask value for a described structure.

    A class the predictor or the text names has its own value; else what OHIF's user ticked; else ``lesion`` when the
    text speaks of one; else ``object``.
    """
    if name in CLASSES:
        return LABEL_VALUES[name]
    plain = text.lower().strip(" .?!").removeprefix("the ")
    for known in CLASSES:
        if plain in (known, spoken(known)):
            return LABEL_VALUES[known]
    if ticked is not None:
        return ticked
    return LABEL_VALUES["lesion" if _LESION.search(text) else OBJECT_LABEL]


def _reply(segmentation: Segmentation, values: list[int], client: Client) -> Reply:
    """Number the mask as the client reads it; ``values`` are the app-wide ones of ``segmentation.names``."""
    mask = segmentation.mask
    if client is Client.SLICER:
        names = {name or OBJECT_LABEL: number for number, name in enumerate(segmentation.names, start=1)}
    else:
        table = np.zeros(256, np.uint8)
        table[1 : len(values) + 1] = values
        mask, names = table[mask], dict(LABEL_VALUES)
    params = {"label_names": names, "segmented": list(segmentation.names), "scores": dict(segmentation.scores)}
    return Reply(params, mask, segmentation.geometry)
