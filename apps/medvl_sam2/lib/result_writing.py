"""Results as the clients read them, and the only place where a :class:`MedVLError` becomes an HTTP error.

Every file written here is a new temporary one: MONAI Label deletes what a task returns after sending it.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import nrrd
import numpy as np
from fastapi import HTTPException

from lib.request_parsing import TextTooLongError, UnknownImageError
from medvl_sam2.errors import (
    Cancelled,
    CheckpointError,
    ConfigError,
    DataError,
    GeometryError,
    MedVLError,
    PromptError,
    VolumeError,
)
from medvl_sam2.types import Answer, Geometry
from medvl_sam2.volume_io import write_mask

logger = logging.getLogger(__name__)

_STATUS: tuple[tuple[type[MedVLError], int], ...] = (
    (UnknownImageError, 404),
    (TextTooLongError, 413),
    (PromptError, 400),
    (VolumeError, 415),
    (GeometryError, 422),
    (DataError, 422),
    (ConfigError, 400),
    (Cancelled, 409),
    (CheckpointError, 503),
)
_BLOCK = 64
"""Rows of a mask turned at a time."""
_MARKUPS_SCHEMA = (
    "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
    "markups-schema-v1.0.3.json#"
)
_NOTICE_OFFSET_MM = 15.0


def http_error(error: MedVLError) -> HTTPException:
    """The status that fits the error, with its message as the reason: Slicer shows it to the annotator."""
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 400)
    return HTTPException(status_code=status, detail=str(error))


def reason_of(error: BaseException) -> str:
    """Class and message of an error that nobody expected; of one of the system without the path it names."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else error
    return f"{type(error).__name__}: {said}"


@contextmanager
def http_errors(what: str) -> Iterator[None]:
    """Turn errors of the block into HTTP errors that state a reason; ``what`` names the work in the log."""
    try:
        yield
    except HTTPException:
        raise
    except MedVLError as error:
        logger.info("%s refused: %s", what, error)
        raise http_error(error) from error
    except MemoryError as error:
        logger.exception("%s ran out of memory", what)
        raise HTTPException(507, f"{what} ran out of memory; close other images or use a larger machine") from error
    except Exception as error:
        logger.exception("%s failed", what)
        raise HTTPException(500, f"{what} failed: {reason_of(error)}; see the server's log") from error


@contextmanager
def file_called(name: str, path: Path) -> Iterator[None]:
    """Let errors of a file call it by its ``name``: where it lies on the server stands in the log, and in no reply.

    Raises:
        VolumeError: as the block, with that name.
    """
    try:
        yield
    except VolumeError as error:
        logger.warning("%s: %s", name, error)
        raise VolumeError(str(error).replace(str(path), name)) from error


def write_label_map(mask: np.ndarray, geometry: Geometry, extension: str, compress: bool) -> str:
    """Write labels (I, J, K) as one byte a voxel on the stored grid; return the temporary file's path.

    OHIF pastes NRRD voxels in file order, Slicer places them by the header; the stored order serves both.
    """
    path = _temporary(extension)
    if extension == ".nrrd":
        _write_nrrd(path, mask, geometry, compress)
    else:
        write_mask(path, mask, geometry)
    return str(path)


def write_untouched(geometry: Geometry) -> str:
    """A label map that changes nothing, for a client that wants an image where the answer is text.

    It is a valid NRRD of zeros on the stored grid: readers of images (ITK, Slicer) get an empty mask. OHIF's
    Auto-Segmentation would replace everything on screen by such a mask. But OHIF's reader (nrrd-js) fails on the
    standard field ``space units``, because it tests the length of every quoted string against a variable that is not
    the string; the paste is then skipped and the labels on screen stay. ``tests/app/test_ohif_reader.py`` runs that
    reader from the installed OHIF on this file and on ordinary masks.
    """
    path = _temporary(".nrrd")
    _write_nrrd(path, np.zeros(geometry.shape, np.uint8), geometry, compress=True, extra={"space units": ["mm"] * 3})
    return str(path)


def write_markups(answer: Answer, geometry: Geometry) -> str:
    """A text answer as Slicer markups: one control point labelled with the text at the centre of the volume.

    A second point below it carries the notice; then follows a point at the centre of every structure that the text
    rests on, named and described by how it was found. Slicer opens a ``.json`` result of an Auto-Segmentation model
    with ``loadMarkups``, which recognises it by the schema in the first 300 characters.
    """
    center = geometry.voxel_to_world((np.array([geometry.shape]) - 1) / 2)[0]
    below = center - [0.0, 0.0, _NOTICE_OFFSET_MM]
    points = [_control_point(1, answer.text, answer.question, center)]
    if answer.notice:
        points.append(_control_point(2, answer.notice, "Notice", below))
    for item in answer.evidence:
        if item.centroid is not None:
            place = geometry.voxel_to_world(np.array([item.centroid]))[0]
            points.append(_control_point(len(points) + 1, item.name.replace("_", " "), item.why, place))
    markups = {"type": "Fiducial", "coordinateSystem": "RAS", "locked": True, "controlPoints": points}
    path = _temporary(".json")
    path.write_text(json.dumps({"@schema": _MARKUPS_SCHEMA, "markups": [markups]}, indent=1), encoding="utf-8")
    return str(path)


def _control_point(number: int, label: str, description: str, position: np.ndarray) -> dict[str, Any]:
    return {
        "id": str(number),
        "label": label,
        "description": description,
        "position": [round(float(x), 3) for x in position],
        "visibility": True,
        "positionStatus": "defined",
    }


@cache
def _own_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="medvl-results-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def result_folder() -> Path:
    """Where results wait to be sent: a folder of this process.

    Not the temporary folder itself. MONAI Label's client stores what it receives there under the name the server gave
    it; on the same machine that would be the very file the server is about to delete.
    """
    folder = _own_folder()
    folder.mkdir(mode=0o700, exist_ok=True)  # a machine's clean-up may have taken it
    return folder


def _temporary(extension: str) -> Path:
    handle, name = tempfile.mkstemp(suffix=extension, prefix="medvl-", dir=result_folder())
    os.close(handle)
    return Path(name)


def _write_nrrd(
    path: Path, mask: np.ndarray, geometry: Geometry, compress: bool, extra: Mapping[str, Any] | None = None
) -> None:
    to_lps = np.diag([-1.0, -1.0, 1.0])
    header = {
        "encoding": "gzip" if compress else "raw",
        "space": "left-posterior-superior",
        "space directions": (to_lps @ geometry.affine[:3, :3]).T,
        "space origin": to_lps @ geometry.affine[:3, 3],
        "kinds": ["domain"] * 3,
        **(extra or {}),
    }
    reversed_axes = _in_file_order(mask.astype(np.uint8, copy=False))
    nrrd.write(str(path), reversed_axes, header, compression_level=1, index_order="C")


def _in_file_order(mask: np.ndarray) -> np.ndarray:
    """Labels (I, J, K) as (K, J, I), C contiguous: the order of a NRRD file's bytes.

    Turned here by blocks that the processor's cache holds. The writer's own ``tobytes`` would take eight times as long
    for 26 million voxels and keep the interpreter, and with it every other request, waiting for 0.8 s.
    """
    if mask.flags.f_contiguous:
        return mask.T
    turned = np.empty(mask.shape[::-1], mask.dtype)
    for start in range(0, len(mask), _BLOCK):
        np.copyto(turned[:, :, start : start + _BLOCK], mask[start : start + _BLOCK].T)
    return turned
