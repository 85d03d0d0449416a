"""What every DICOM object written here shares: its maker, names of persons, and the headers it is derived from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset

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
