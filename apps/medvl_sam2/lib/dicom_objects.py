"""What every DICOM object written here shares: its maker, names of persons, and the headers it is derived from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from medvl_sam2.errors import DataError

MANUFACTURER = "MedVL-SAM2"
MODEL_NAME = "MedVL-SAM2 for MONAI Label"
SERIAL_NUMBER = "none"
LONG_STRING = 64
"""Characters DICOM allows in a long string (LO), such as a segment's label."""
_MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime", "ReferringPhysicianName", "PositionReferenceIndicator",
)  # fmt: skip
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_UID_LENGTH = 64
_IDENTIFIERS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID")


def is_uid(text: str) -> bool:
    """Whether a text is a DICOM UID: numbers with dots between them, 64 characters at most."""
    return len(text) <= _UID_LENGTH and _UID.fullmatch(text) is not None


def person_name(name: str) -> str:
    """A login or a name as a DICOM person name; without ``^`` all of it is the family name."""
    plain = name.replace("\\", " ").strip() or "unknown"
    return plain[:LONG_STRING] if "^" in plain else f"{plain[: LONG_STRING - 1]}^"


def long_string(text: str) -> str:
    """Text as a DICOM long string: one line, no backslash, at most 64 characters."""
    return " ".join(text.replace("\\", "/").split())[:LONG_STRING]


def object_uid(kind: str, series: str, version: int | None, made: datetime | None, author: str) -> str:
    """The UID of what was made of version ``version`` about an image series; a new one when ``made`` is unknown.

    Whenever it is made from the same five, it is the same.
    """
    if made is None:
        return str(generate_uid())
    return str(generate_uid(entropy_srcs=[kind, series, str(version), made.isoformat(), author]))


def dated(document: Dataset, made: datetime | None) -> Dataset:
    """``document`` as of ``made``, with a time zone; highdicom writes the time at which it was built."""
    if made is not None:
        local = made.astimezone()
        for kind in ("Content", "InstanceCreation"):
            setattr(document, f"{kind}Date", local.strftime("%Y%m%d"))
            setattr(document, f"{kind}Time", local.strftime("%H%M%S.%f"))
    return document


def stamped(document: Dataset) -> Dataset:
    """``document`` with what highdicom leaves out: UTF-8 as its character set, date and time of its series."""
    document.SpecificCharacterSet = "ISO_IR 192"
    document.SeriesDate, document.SeriesTime = document.ContentDate, document.ContentTime
    return document


def source_headers(files: Iterable[Path]) -> list[Dataset]:
    """Headers of an image series, in the order of ``files``, without pixels.

    Attributes that DICOM lets be empty and old exporters leave out are added empty: patient and study data.

    Raises:
        DataError: an identifier is missing, or the slices state several studies or frames of reference.
    """
    headers = []
    for file in files:
        header = pydicom.dcmread(file, stop_before_pixels=True)
        for name in _IDENTIFIERS:
            if not str(header.get(name) or ""):
                raise DataError(f"{file.name} has no {name}, so nothing can refer to it; export the series with it")
        for name in _MAY_BE_EMPTY:
            if header.get(name) is None:
                setattr(header, name, "")
        headers.append(header)
    for name in ("StudyInstanceUID", "FrameOfReferenceUID"):
        values = {str(header.get(name)) for header in headers}
        if len(values) > 1:
            raise DataError(f"the series has {len(values)} values of {name}, so its slices share no space; split it")
    return headers
