"""What people corrected in a MONAI Label store: submitted labels and stored texts, as one data set.

The store keeps ``datastore_v2.json``, images, ``labels/final/`` and ``texts/<image>/version_N.json``. A case has the
label that is final and its texts: the newest report, and of every question the newest answer. Splits follow the
patient (``PatientID`` of the image's info, or ``patients.json`` beside the images, as finetuning reads it).
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from urllib.parse import quote

TEXTS_FOLDER = "texts"
_VERSION = re.compile(r"version_([1-9][0-9]*)\.json")


def image_folder(store: Path, image: str) -> Path:
    """Folder of an image's texts; every id is one plain name below :data:`TEXTS_FOLDER`."""
    name = quote(image, safe=" ")
    return store / TEXTS_FOLDER / (f"%2E{name[1:]}" if name.startswith(".") else name)


def version_files(folder: Path) -> dict[int, Path]:
    """Stored versions by number; what is being written is not among them."""
    found = {path: _VERSION.fullmatch(path.name) for path in (folder.iterdir() if folder.is_dir() else ())}
    return {int(match[1]): path for path, match in found.items() if match}


def text_checksum(text: str) -> str:
    """SHA-256 of a text in UTF-8, as hex."""
    return hashlib.sha256(text.encode()).hexdigest()
