"""Texts that people corrected or accepted, kept beside the labels as files that are never written twice.

``<store folder>/texts/<image>/version_N.json``, N from 1 on, whatever the kind of text. A version is on disk before it
is acknowledged (file and folder flushed, then renamed into place), and two writers get two numbers. Training reads them
with ``scripts/make_manifest.py store`` (:mod:`medvl_sam2.training.store_manifest`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from filelock import FileLock

from medvl_sam2.datasets.stored_texts import TEXTS_FOLDER, image_folder, read_version, text_checksum, version_files
from medvl_sam2.errors import DataError, PromptError
from medvl_sam2.files import write_json_atomically

logger = logging.getLogger(__name__)

Kind = Literal["report", "answer"]
MAX_CHARACTERS = 20_000
_SIDECAR = ".sr.json"


@dataclass(frozen=True)
class TextVersion:
    """One text. ``draft`` is what the model of ``model_version`` wrote, empty where there was none; ``time`` ISO, UTC.

    ``version`` is 0 until it is stored; ``checksum`` the SHA-256 of ``text`` in UTF-8; ``question`` only of answers.
    ``structures``: names of what the text rests on. ``sr``: where its DICOM SR lies (``SOPInstanceUID``,
    ``SeriesInstanceUID``), or why there cannot be one (``refused``); None where none was made.
    """

    kind: Kind
    text: str
    author: str
    model_version: str
    draft: str = ""
    question: str = ""
    note: str = ""
    structures: tuple[str, ...] = ()
    version: int = 0
    time: str = ""
    checksum: str = ""
    sr: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise PromptError("the text is empty; write what should be stored")
        if self.kind == "answer" and not self.question.strip():
            raise PromptError("an answer without its question; send the question too")
        longest = max(len(value) for value in (self.text, self.draft, self.question, self.note))
        if longest > MAX_CHARACTERS:
            raise PromptError(f"a text of {longest} characters; at most {MAX_CHARACTERS} are stored")


class TextVersions:
    """The texts of one store; any process may write."""

    def __init__(self, store_folder: Path) -> None:
        self._root = store_folder / TEXTS_FOLDER

    def save(self, image: str, text: TextVersion) -> TextVersion:
        """Store a text as the next version of ``image`` and return it with number, time and checksum."""
        folder = image_folder(self._root.parent, image)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(str(self._root / ".lock"), timeout=60):
            last = max(version_files(folder), default=0)
            time = datetime.now(UTC).isoformat(timespec="milliseconds")
            stored = replace(text, version=last + 1, time=time, checksum=text_checksum(text.text))
            record = asdict(replace(stored, sr=None))
            record.pop("sr")
            write_json_atomically(folder / f"version_{stored.version}.json", {"image": image, **record})
        return stored

    def add_sr(self, image: str, version: int, sr: Mapping[str, str]) -> None:
        """Note what became of a version as DICOM SR, in a file beside it: the version itself stays as it is."""
        write_json_atomically(image_folder(self._root.parent, image) / f"version_{version}{_SIDECAR}", dict(sr))

    def without_sr(self) -> Iterator[tuple[str, TextVersion]]:
        """Images and versions of which nobody noted what became of them as DICOM SR; damaged ones are left out."""
        for folder in sorted(self._root.iterdir()) if self._root.is_dir() else ():
            files = sorted(version_files(folder).items())
            yield from _readable(path for _, path in files if not _sidecar(path).exists())

    def of(self, image: str) -> list[TextVersion]:
        """Every version of an image, oldest first.

        Raises:
            DataError: a file was damaged or changed.
        """
        files = version_files(image_folder(self._root.parent, image))
        return [_read(path) for _, path in sorted(files.items())]

    def readable(self, image: str) -> list[TextVersion]:
        """As :meth:`of`, without those that are damaged: the log names them."""
        files = version_files(image_folder(self._root.parent, image))
        return [text for _, text in _readable(path for _, path in sorted(files.items()))]


def _readable(files: Iterable[Path]) -> Iterator[tuple[str, TextVersion]]:
    """Images and versions of the files that are not damaged."""
    for path in files:
        try:
            yield str(read_version(path)["image"]), _read(path)
        except (DataError, KeyError) as error:
            logger.warning("A stored text is passed over, no DICOM SR can speak of it: %s", error)


def _read(path: Path) -> TextVersion:
    fields = read_version(path)
    fields.pop("image", None)
    beside = _sidecar(path)
    try:
        fields["structures"] = tuple(fields.get("structures", ()))  # earlier releases kept none
        sr = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else None
        return TextVersion(**fields, sr=sr)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is no stored text ({error}); take it from a backup") from error


def _sidecar(version: Path) -> Path:
    return version.with_name(f"{version.stem}{_SIDECAR}")
