"""The challenge's container contract: a request npz in, an answer npz with key ``segs`` out.

A request holds ``imgs``, ``spacing``, optional ``boxes``, and from the first click on ``clicks`` (a class: fg and bg
lists of (z, y, x)), ``clicks_order`` and ``prev_pred``; all prompts are cumulative. ``prev_pred`` is not read: the
prompts alone lead to the answer, as they do within one process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medvl_sam2.errors import DataError
from medvl_sam2.evaluation.challenge.case import MAX_CLASSES, boxes_from, painted, volume_from
from medvl_sam2.evaluation.challenge.npz import read_npz
from medvl_sam2.evaluation.protocol import Interactive
from medvl_sam2.files import atomic_writer
from medvl_sam2.types import Prompt, Volume


@dataclass(frozen=True)
class Request:
    """A volume in the canonical frame and one prompt a class; None for a class without box and foreground click."""

    volume: Volume
    prompts: tuple[Prompt | None, ...]


def read_request(path: Path) -> Request:
    """Read a request; :class:`DataError` says what in it is missing or wrong."""
    members = read_npz(path)
    volume = volume_from(members, path)
    boxes = boxes_from(members, volume.geometry.shape, path)
    clicks = _clicks(members, path)
    classes = len(clicks) if boxes is None else len(boxes)
    if not 0 < classes <= MAX_CLASSES or (clicks and len(clicks) != classes):
        raise DataError(f"{path} has {len(boxes or ())} boxes and clicks for {len(clicks)} classes; give them a class")
    prompts = []
    for index in range(classes):
        points, labels = clicks[index] if clicks else ([], [])
        box = None if boxes is None else boxes[index].astype(np.float64)
        prompt = Prompt(np.array(points, dtype=np.float64).reshape(-1, 3), np.array(labels, dtype=np.int64), box)
        prompts.append(prompt.validated(volume.geometry.shape) if box is not None or 1 in labels else None)
    return Request(volume, tuple(prompts))


def answer(engine: Interactive, request: Request) -> np.ndarray:
    """Label map (D, H, W) uint8: class ``n`` of the request is value ``n + 1``."""
    opened = engine.open(request.volume)
    masks = [
        None if prompt is None else np.asarray(engine.segment(opened, prompt, str(index + 1))) > 0
        for index, prompt in enumerate(request.prompts)
    ]
    return painted(masks, request.volume.geometry.shape)


def predict_file(engine: Interactive, source: Path, target: Path) -> None:
    """Answer a request file.

    An answer of an earlier step at ``target`` goes first: a step that fails must not be scored by it.
    """
    target.unlink(missing_ok=True)
    labels = answer(engine, read_request(source))
    with atomic_writer(target) as file:
        np.savez_compressed(file, segs=labels)


def _clicks(members: Mapping[str, Any], path: Path) -> list[tuple[list[Sequence[float]], list[int]]]:
    """Points and labels a class in the order they were placed; without an order foreground comes first."""
    found = []
    orders = members.get("clicks_order")
    try:
        for index, placed in enumerate(members.get("clicks", ())):
            waiting = {1: list(placed["fg"]), 0: list(placed["bg"])}
            order = ["fg"] * len(waiting[1]) + ["bg"] * len(waiting[0])
            if orders is not None:
                order = [kind for kind in orders[index] if kind is not None]
            labels = [{"fg": 1, "bg": 0}[kind] for kind in order]
            found.append(([waiting[label].pop(0) for label in labels], labels))
            if waiting[0] or waiting[1]:
                raise DataError(f"{path}: clicks_order of class {index + 1} leaves out some of its clicks")
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path}: 'clicks' must hold 'fg' and 'bg' for each class, 'clicks_order' fits them") from error
    return found
