"""The only place that reads MONAI Label's request dictionary; returns typed values or raises with the reason.

Clients are told apart by what they always send: Slicer a ``client_id``; OHIF ``restore_label_idx`` (and never a
``client_id``). Both leave keys of other tasks in a request, so keys a task does not know are ignored, and every task
applies its own defaults: OHIF sends only what its user changed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from lib.configs.medvl_sam2 import LABEL_VALUES, OBJECT_LABEL
from lib.scribble_paths import painted_strokes
from medvl_sam2.errors import PromptError, VolumeError
from medvl_sam2.strokes import Plane, Stroke, StrokeKind, most_points
from medvl_sam2.types import MAX_POINTS, MAX_STROKES, Prompt
from medvl_sam2.vocabulary import CLASSES, spoken
from medvl_sam2.volume_io import read_mask

MAX_TEXT = 10_000
"""Characters of a prompt or question."""
MAX_PLANES = 10_000
"""Accepted planes of one axis."""
EXTENSIONS = (".nrrd", ".nii.gz", ".nii")
_SPOKEN = {spoken(name): name for name in CLASSES}


class UnknownImageError(VolumeError):
    """The request names an image that neither the datastore nor a session has."""


class TextTooLongError(PromptError):
    """A text is longer than :data:`MAX_TEXT`."""


class Client(Enum):
    """Who asks, because Slicer and OHIF read mask values differently."""

    SLICER = "slicer"
    OHIF = "ohif"
    API = "api"


@dataclass(frozen=True)
class InferRequest:
    """What every infer task needs from a request."""

    image: Path
    client: Client
    client_id: str
    """Key of the annotator's sessions; OHIF has no id, all its windows share one."""
    extension: str
    compress: bool
    wants_file: bool
    """False where the caller asked for JSON only (known when the server front passed it on)."""
    reset: bool


def parse_request(request: Mapping[str, Any]) -> InferRequest:
    """Read what all tasks share.

    Raises:
        UnknownImageError: no such image. PromptError: another value makes no sense.
    """
    client_id = request.get("client_id")
    if isinstance(client_id, str) and client_id:
        client = Client.SLICER
    else:
        client = Client.OHIF if "restore_label_idx" in request else Client.API
    extension = str(request.get("result_extension") or ".nrrd").lower()
    if extension not in EXTENSIONS:
        raise PromptError(f"result_extension {extension!r} cannot be written; use one of {', '.join(EXTENSIONS)}")
    # Without the server front the output is not known, and a missing file would be an error where one is wanted.
    output = request.get("output", "image")
    return InferRequest(
        image=_image(request),
        client=client,
        client_id=client_id if client is Client.SLICER and isinstance(client_id, str) else client.value,
        extension=extension,
        compress=_flag(request.get("result_compress"), default=client is not Client.OHIF),
        wants_file=output in ("image", "all") or (output is None and client is not Client.API),
        reset=_flag(request.get("reset_state"), default=False),
    )


def parse_prompt(request: Mapping[str, Any]) -> Prompt:
    """All prompts of a request, in stored voxels; bounds are checked against the image later.

    Points come as ``foreground`` and ``background`` (deepgrow), as ``points`` and ``point_labels`` (vista3d), or under
    the name of the selected label (deepedit). The box is Slicer's ``roi``: ``[i, i, j, j, k, k]``, each pair in any
    order, or ``box``: lowest and highest voxel. An uploaded ``label`` file is the mask to start from, ``prompt`` the
    words to start from. ``scribbles`` and ``lasso`` are lists of lines, each a list of voxels or an object with
    ``points`` and ``label`` (1 without it). ``accepted`` lists planes of k, or of every axis: ``{"i": [5], "k": [8]}``.

    Raises:
        PromptError: a value makes no sense in any volume.
    """
    foreground = _points(request, "foreground")
    background = _points(request, "background")
    if not foreground and not background:
        points, labels = _labelled_points(request)
        foreground = [point for point, label in zip(points, labels, strict=True) if label == 1]
        background = [point for point, label in zip(points, labels, strict=True) if label == 0]
    name = request.get("label")
    if not foreground and isinstance(name, str) and isinstance(request.get(name), list):
        foreground = _points(request, name)
    return Prompt(
        points=np.array([*foreground, *background], dtype=np.float64).reshape(-1, 3),
        labels=np.array([1] * len(foreground) + [0] * len(background), dtype=np.int64),
        box=_corners(request.get("box")) if request.get("box") else _box(request.get("roi")),
        mask=_mask(name),
        text=_words(request.get("prompt")),
        strokes=(*_strokes(request, "scribbles", StrokeKind.SCRIBBLE), *_strokes(request, "lasso", StrokeKind.LASSO)),
        accepted=_planes(request.get("accepted")),
        propagate=_flag(request.get("propagate"), default=False),
    ).well_formed()


def parse_painted(request: Mapping[str, Any]) -> tuple[str, Prompt]:
    """The segment and the prompt of Slicer's Scribbles panel, in stored voxels.

    The uploaded labelmap holds every segment by the ``id`` of ``label_info``, among them ``foreground_scribbles`` and
    ``background_scribbles``; the selected segment's own voxels are the mask to start from, else the ROI is the box.

    Raises:
        PromptError: no labelmap, or nothing in it says where the segment is.
    """
    upload, info = request.get("label"), request.get("label_info")
    if not isinstance(upload, str) or not _uploaded(upload) or not isinstance(info, list):
        raise PromptError("scribbles come as an uploaded labelmap with label_info; paint in Slicer's Scribbles panel")
    ids = {
        item["name"]: item.get("id") for item in info if isinstance(item, dict) and isinstance(item.get("name"), str)
    }
    name = _checked_text(str(request.get("selected_label_name") or OBJECT_LABEL), "selected_label_name")
    labels = read_mask(upload)[0]
    inside, drawn = painted_strokes(labels == (ids.get("foreground_scribbles") or -1), 1)
    outside, erased = painted_strokes(labels == (ids.get("background_scribbles") or -1), 0)
    mask = labels == (ids.get(name) or -1)
    box = None if mask.any() else _box(request.get("roi"))
    if not drawn and not inside and not mask.any() and box is None:
        raise PromptError(f"nothing says where {name!r} is: paint foreground inside it, or place the ROI round it")
    prompt = Prompt(
        points=np.array([*inside, *outside], dtype=np.float64).reshape(-1, 3),
        labels=np.array([1] * len(inside) + [0] * len(outside), dtype=np.int64),
        box=box,
        mask=mask if mask.any() else None,
        strokes=(*drawn, *erased),
    )
    return name, prompt.well_formed()


def parse_label(request: Mapping[str, Any]) -> str:
    """Name of the segment an annotator works on: Slicer sends it, OHIF does not (then :data:`OBJECT_LABEL`).

    Beside an uploaded mask, whose file MONAI Label puts under ``label``, the name comes as ``label_name``.
    """
    name = request.get("label")
    if isinstance(name, str) and _uploaded(name):
        name = request.get("label_name")
    if not isinstance(name, str) or not name.strip():
        return OBJECT_LABEL
    return _checked_text(name, "label")


def parse_corrected(request: Mapping[str, Any]) -> str | None:
    """The object that a request corrects or moves along its timeline; None where it asks for the whole object anew."""
    return None if _flag(request.get("propagate"), default=False) else parse_label(request)


def parse_changed_box(request: Mapping[str, Any]) -> tuple[bool, int | None]:
    """Whether only what changed since the last mask is wanted, and the number of the mask that the client ``have``.

    Clients without an id share a session, so nobody knows which mask one of them has: they get whole masks.
    """
    have = request.get("have")
    if have is not None and type(have) is not int:
        raise PromptError(f"have {have!r} must be the mask_number of a reply")
    wanted = _flag(request.get("changed_box"), default=False)
    return wanted and bool(request.get("client_id")), have


def parse_move(request: Mapping[str, Any]) -> int:
    """Steps of the timeline to go: ``redo`` (true or a count) forth, ``undo`` back, 0 when neither is asked for."""
    undo, redo = _steps(request, "undo"), _steps(request, "redo")
    if undo and redo:
        raise PromptError("undo and redo in one request; send one of them")
    return redo - undo


def parse_text(request: Mapping[str, Any], key: str, example: str) -> str:
    """A text option, stripped.

    Raises:
        PromptError: missing or blank. TextTooLongError: above :data:`MAX_TEXT` characters.
    """
    value = request.get(key)
    if value is not None and not isinstance(value, str):
        raise PromptError(f"{key} must be text, got {type(value).__name__}; for example {example!r}")
    if not value or not value.strip():
        raise PromptError(f"{key} is empty; type it into the {key!r} option, for example {example!r}")
    return _checked_text(value, key)


def parse_classes(request: Mapping[str, Any]) -> tuple[str, ...]:
    """Classes to segment, without repeats: OHIF's ticked classes (``label_prompt``), else option ``classes``, else all.

    OHIF pastes the reply to a class prompt without any ticked class by raw value, on wrong names; so that is refused.
    """
    ticked = request.get("label_prompt")
    if ticked is not None:
        values = [value for value in ticked if isinstance(value, int)] if isinstance(ticked, Sequence) else []
        names = [name for name in CLASSES if LABEL_VALUES[name] in values]
        if not names:
            raise PromptError(f"label_prompt {ticked!r} names no class; tick at least one of {', '.join(CLASSES)}")
        return tuple(names)
    given = request.get("classes") or ""
    parts = given if isinstance(given, list) else _checked_text(str(given), "classes").split(",")
    wanted = [_class(str(part)) for part in parts if str(part).strip()]
    return tuple(dict.fromkeys(wanted)) or CLASSES


def ticked_label(request: Mapping[str, Any]) -> int | None:
    """The mask value OHIF's user ticked, when it is exactly one."""
    ticked = request.get("label_prompt")
    if isinstance(ticked, list) and len(ticked) == 1 and ticked[0] in LABEL_VALUES.values():
        return int(ticked[0])
    return None


def _class(text: str) -> str:
    name = text.strip().lower()
    name = _SPOKEN.get(name, name.replace(" ", "_"))
    if name not in CLASSES:
        raise PromptError(f"class {text.strip()!r} is not in the vocabulary; choose from {', '.join(CLASSES)}")
    return name


def _checked_text(value: str, key: str) -> str:
    if len(value) > MAX_TEXT:
        raise TextTooLongError(f"{key} has {len(value)} characters; give at most {MAX_TEXT}")
    return value.strip()


def _image(request: Mapping[str, Any]) -> Path:
    image = request.get("image")
    if not isinstance(image, str) or not image:
        raise UnknownImageError(
            "image is not known: the datastore has none of that id and no session holds it (it may have expired); "
            "refresh the list of images or send it again"
        )
    path = Path(image)
    if not path.exists():
        raise UnknownImageError(f"image file {path.name} is gone from the server; refresh the list of images")
    return path


def _flag(value: Any, default: bool) -> bool:
    if value is None:
        return default
    return value.strip().lower() in ("true", "1", "yes") if isinstance(value, str) else bool(value)


def _steps(request: Mapping[str, Any], key: str) -> int:
    value = request.get(key)
    if value is None or isinstance(value, bool) or value == "":
        return int(bool(value))
    if not isinstance(value, int) or value < 1:
        raise PromptError(f"{key} {value!r} must be true or how many steps, from 1 on")
    return value


def _points(request: Mapping[str, Any], key: str, most: int = MAX_POINTS) -> list[list[float]]:
    value = request.get(key)
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        raise PromptError(f"{key} must be a list of voxels [[i, j, k], ...], got {type(value).__name__}")
    if len(value) > most:
        raise PromptError(f"{key} has {len(value)} points; give at most {most}")
    points = []
    for item in value:
        numbers = _numbers(item)
        if numbers is None or len(numbers) != 3:
            raise PromptError(f"{key} has {item!r}, which is no voxel; give three numbers [i, j, k]")
        points.append(numbers)
    return points


def _labelled_points(request: Mapping[str, Any]) -> tuple[list[list[float]], list[int]]:
    points = _points(request, "points")
    if not points:
        return [], []
    labels = request.get("point_labels")
    if not isinstance(labels, list) or len(labels) != len(points) or any(n not in (0, 1) for n in labels):
        raise PromptError(f"point_labels {labels!r} must be one 1 (object) or 0 (background) for each point")
    return points, labels


def _box(value: Any) -> np.ndarray | None:
    if not value:
        return None
    numbers = _numbers(value)
    if numbers is None or len(numbers) != 6:
        raise PromptError(f"roi {value!r} must be six numbers [i, i, j, j, k, k]")
    return np.sort(np.array(numbers, dtype=np.float64).reshape(3, 2).T, axis=0)


def _corners(value: Any) -> np.ndarray:
    corners = [_numbers(item) for item in value] if isinstance(value, list) else []
    if len(corners) != 2 or any(corner is None or len(corner) != 3 for corner in corners):
        raise PromptError(f"box {value!r} must be its lowest and its highest voxel [[i, j, k], [i, j, k]]")
    return np.array(corners, dtype=np.float64)


def _words(value: Any) -> str | None:
    return _checked_text(value, "prompt") if isinstance(value, str) and value.strip() else None


def _strokes(request: Mapping[str, Any], key: str, kind: StrokeKind) -> list[Stroke]:
    value = request.get(key)
    if value is None or value == "":
        return []
    lines = [value] if isinstance(value, dict) else value
    if not isinstance(lines, list):
        raise PromptError(f"{key} must be a list of lines, each a list of voxels, got {type(value).__name__}")
    if len(lines) > MAX_STROKES:
        raise PromptError(f"{key} has {len(lines)} lines; give at most {MAX_STROKES}")
    strokes = []
    for line in lines:
        points, label = (line.get("points"), line.get("label", 1)) if isinstance(line, dict) else (line, 1)
        if isinstance(label, bool) or label not in (0, 1):
            raise PromptError(f"{key} label {label!r} must be 1 (object) or 0 (background)")
        voxels = _points({key: points}, key, most_points(kind))
        strokes.append(Stroke(kind, np.array(voxels, dtype=np.float64).reshape(-1, 3), int(label)))
    return strokes


def _planes(value: Any) -> tuple[Plane, ...]:
    if not value:
        return ()
    by_axis = value if isinstance(value, dict) else {"k": value}
    if not set(by_axis) <= set("ijk"):
        raise PromptError(f"accepted has axes {sorted(by_axis)}; they are called i, j and k")
    planes = []
    for axis, indices in by_axis.items():
        whole = isinstance(indices, list) and all(type(n) is int for n in indices)
        if not whole or len(indices) > MAX_PLANES:
            raise PromptError(f"accepted planes of {axis} must be a list of at most {MAX_PLANES} whole numbers")
        planes += [Plane("ijk".index(axis), index) for index in indices]
    return tuple(planes)


def _numbers(value: Any) -> list[float] | None:
    if not isinstance(value, list) or any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in value):
        return None
    try:
        return [float(n) for n in value]
    except OverflowError:  # a whole number of hundreds of digits
        return None


def _uploaded(name: str) -> bool:
    """True for the temporary file MONAI Label made of an uploaded mask; never for another path a client names."""
    path = Path(name)
    try:
        return path.is_absolute() and path.parent == Path(tempfile.gettempdir()) and path.is_file()
    except OSError:  # no name a file may have
        return False


def _mask(name: Any) -> np.ndarray | None:
    if not isinstance(name, str) or not _uploaded(name):
        return None
    return read_mask(name)[0] > 0
