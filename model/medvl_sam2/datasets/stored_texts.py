"""Corrected texts in the folder of a MONAI Label store: ``texts/<image>/version_N.json``, never written twice.

The server writes them, manifests are made of them. A file is a JSON object with ``image``, ``kind`` (``report`` or
``answer``), ``text``, ``question`` (of an answer), ``draft``, ``author``, ``note``, ``model_version``, ``version``,
``time`` and ``checksum``, the SHA-256 of ``text`` in UTF-8.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from medvl_sam2.datasets.manifest import Question
from medvl_sam2.errors import DataError

TEXTS_FOLDER = "texts"
_VERSION = re.compile(r"version_([1-9][0-9]*)\.json")
_YES_NO = ("yes", "no")


@dataclass(frozen=True)
class StoredTexts:
    """What is known of one image: the newest report, and of every question the newest answer."""

    report: str | None
    questions: tuple[Question, ...]


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


def read_version(path: Path) -> dict[str, Any]:
    """The fields of one version.

    Raises:
        DataError: the file is damaged, or its text was changed after it was stored.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        kept = fields["checksum"] == text_checksum(fields["text"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no stored text ({error!r}); take it from a backup") from error
    if not kept:
        raise DataError(f"{path} was changed after it was stored: its checksum differs; take it from a backup")
    return dict(fields)


def stored_texts(store: Path, image: str) -> StoredTexts:
    """The newest texts of an image; :class:`DataError` for a damaged file."""
    report, answers = None, {}
    for _, path in sorted(version_files(image_folder(store, image)).items()):
        fields = read_version(path)
        if fields["kind"] == "report":
            report = fields["text"]
        else:
            answers[" ".join(fields["question"].split())] = fields["text"].strip()
    return StoredTexts(report, tuple(_question(text, answer) for text, answer in answers.items()))


def _question(text: str, answer: str) -> Question:
    """A yes or no is a closed question, as the predictor asks it."""
    plain = answer.lower().rstrip(".")
    if plain in _YES_NO:
        return Question(text, plain, "corrected", _YES_NO)
    return Question(text, answer, "corrected")
