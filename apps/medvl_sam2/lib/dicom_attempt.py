"""One attempt to make a DICOM object of a label or text that is kept here, and what to note of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fastapi import HTTPException

from lib.result_writing import reason_of
from medvl_sam2.errors import MedVLError, VolumeError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """``note`` is kept with the label or text: the object's UIDs, or ``refused`` with the reason, for good.

    It is empty where no object is due. ``failed``: a reason that may pass; nothing is noted, and the caller lets the
    store look back for it (``look_back_again``), which tells the log.
    """

    note: Mapping[str, str] = field(default_factory=dict)
    failed: str = ""


def attempt(what: str, kind: str, make: Callable[[], Mapping[str, str]]) -> Attempt:
    """Make an object of ``what``, which is kept whatever happens; ``make`` returns its note, ``kind`` is SEG or SR."""
    try:
        return Attempt(make())
    except Exception as error:
        if isinstance(error, HTTPException):
            reason = str(error.detail)
        else:
            reason = str(error) if isinstance(error, MedVLError) else reason_of(error)
        if _passes(error):
            return Attempt(failed=f"kept on this server, its DICOM {kind} is made later: {reason}")
        logger.warning("%s is kept, but not stored as DICOM %s: %s", what, kind, reason, exc_info=error)
        return Attempt({"refused": f"kept on this server, but not stored as DICOM {kind}: {reason}"})


def _passes(error: Exception) -> bool:
    """Whether it may go well later: a server, a disk or a lock failed, and not the object."""
    if isinstance(error, HTTPException):
        return error.status_code >= 500
    if isinstance(error, VolumeError):  # the disk, and not what the file holds: that has no number
        return isinstance(error.__cause__, OSError) and error.__cause__.errno is not None
    return isinstance(error, OSError | MemoryError)
