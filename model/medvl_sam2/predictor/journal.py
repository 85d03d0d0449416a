"""A session's prompts on disk, so that it goes on after the server was stopped or killed.

A folder a session: ``journal.jsonl`` and the masks that prompts held, as compressed bits named by their content. The
first line says which weights and which image; every further one is a :class:`Change`, on disk before it is answered.
States are not written: they follow from the prompts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import zipfile
import zlib
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medvl_sam2.errors import DataError
from medvl_sam2.files import atomic_writer, sync_path
from medvl_sam2.predictor.timeline import Change
from medvl_sam2.strokes import Plane, Stroke, StrokeKind
from medvl_sam2.types import Prompt

logger = logging.getLogger(__name__)

FORMAT = "medvl-sam2-session-1"
FILE = "journal.jsonl"


@dataclass(frozen=True)
class JournalHeader:
    """Which weights answered (``version``, ``sha256``) and which file was asked about (``stamp``: its change in ns)."""

    version: str
    sha256: str
    image: str
    stamp: int


def session_name(client: str, image: str) -> str:
    """Folder name for an annotator's session on an image, whatever characters their names have."""
    return hashlib.sha256(json.dumps([client, image]).encode()).hexdigest()[:40]


class Journal:
    """``changes`` are those found on disk; ``weights_changed`` tells whether other weights had answered them."""

    def __init__(self, folder: Path, header: JournalHeader, fresh: bool = False) -> None:
        """Read what is there. A journal of another state of the image or a damaged one is put aside.

        ``fresh``: what is there is removed unread.
        """
        self.folder, self.header = folder, header
        self.changes: list[Change] = []
        self.weights_changed = False
        self._begun = False
        self._masks: dict[str, np.ndarray] = {}
        if fresh:
            self.remove()
        if not (folder / FILE).is_file():
            return
        try:
            self._read()
        except (DataError, OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            self.set_aside(str(error))

    def append(self, change: Change) -> None:
        """Put a change on disk.

        Raises:
            OSError: it cannot be written.
        """
        record: dict[str, Any] = {"object": change.name}
        record |= {"stand": change.at} if change.prompt is None else {"at": change.at}
        if change.prompt is not None:
            record["prompt"] = self._written(change.prompt)
        lines = [record]
        if not self._begun:
            self.folder.mkdir(parents=True, exist_ok=True)
            lines.insert(0, {"format": FORMAT, **asdict(self.header)})
        with open(self.folder / FILE, "ab") as file:
            file.write("".join(f"{json.dumps(line)}\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())
        if not self._begun:
            sync_path(self.folder)
            sync_path(self.folder.parent)
            self._begun = True

    def remove(self) -> None:
        """Take the session off the disk; the next change begins a new journal."""
        (self.folder / FILE).unlink(missing_ok=True)  # this must not fail unseen: nothing comes back after a restart
        shutil.rmtree(self.folder, ignore_errors=True)
        self.changes, self.weights_changed, self._begun = [], False, False

    def set_aside(self, reason: str) -> None:
        """Rename what is on disk; the next change begins a new journal."""
        aside = self.folder.with_name(f"{self.folder.name}.aside-{time.time_ns()}")
        self.folder.rename(aside)
        logger.warning("The session in %s is not taken up: %s", aside, reason)
        self.changes, self.weights_changed, self._begun = [], False, False

    def _read(self) -> None:
        content = (self.folder / FILE).read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # a write that was cut off leaves no end of line
        records = [json.loads(line) for line in whole.splitlines()]
        if not records:
            raise DataError("its first line was never finished")
        for record in records:
            if "format" in record:
                self._check(record)
                continue
            at, prompt = record["at"] if "prompt" in record else record["stand"], record.get("prompt")
            if type(at) is not int:
                raise DataError(f"{at!r} is no count of steps")
            self.changes.append(Change(str(record["object"]), at, None if prompt is None else self._prompt(prompt)))
        self._masks = {}
        if len(whole) < len(content):
            os.truncate(self.folder / FILE, len(whole))
        # Other weights answer from here on: the header comes again before their first change.
        self._begun = not self.weights_changed

    def _check(self, record: dict[str, Any]) -> None:
        if record["format"] != FORMAT:
            raise DataError(f"its format {record['format']!r} is not {FORMAT!r}")
        if (record["image"], record["stamp"]) != (self.header.image, self.header.stamp):
            raise DataError(f"the image {record['image']} is another file now")
        self.weights_changed = (record["version"], record["sha256"]) != (self.header.version, self.header.sha256)

    def _written(self, prompt: Prompt) -> dict[str, Any]:
        """A prompt as JSON; its mask goes into a file of its own."""
        return {
            "points": prompt.points.tolist(),
            "labels": prompt.labels.tolist(),
            "box": None if prompt.box is None else prompt.box.tolist(),
            "mask": None if prompt.mask is None else self._written_mask(prompt.mask),
            "text": prompt.text,
            "strokes": [
                {"kind": stroke.kind.value, "points": stroke.points.tolist(), "label": stroke.label}
                for stroke in prompt.strokes
            ],
            "accepted": [[plane.axis, plane.index] for plane in prompt.accepted],
            "propagate": prompt.propagate,
        }

    def _written_mask(self, mask: np.ndarray) -> str:
        bits = np.packbits(mask)
        name = hashlib.sha256(repr(mask.shape).encode() + bits.tobytes()).hexdigest()
        path = self.folder / f"{name}.npz"
        if not path.is_file():
            with atomic_writer(path) as file:
                np.savez_compressed(file, bits=bits, shape=np.array(mask.shape))
        return name

    def _prompt(self, record: dict[str, Any]) -> Prompt:
        name, box = record["mask"], record["box"]
        return Prompt(
            points=np.array(record["points"], dtype=np.float64).reshape(-1, 3),
            labels=np.array(record["labels"], dtype=np.int64),
            box=None if box is None else np.array(box, dtype=np.float64),
            mask=None if name is None else self._mask(name),
            text=record["text"],
            strokes=tuple(
                Stroke(StrokeKind(line["kind"]), np.array(line["points"]), line["label"]) for line in record["strokes"]
            ),
            accepted=tuple(Plane(axis, index) for axis, index in record["accepted"]),
            propagate=record["propagate"],
        )

    def _mask(self, name: str) -> np.ndarray:
        if not name.isalnum():
            raise DataError(f"{name!r} is no name of a mask")
        if name in self._masks:  # clients send an earlier mask again with every click
            return self._masks[name]
        with np.load(self.folder / f"{name}.npz", allow_pickle=False) as stored:
            shape = tuple(int(size) for size in stored["shape"])
            mask = np.unpackbits(stored["bits"], count=int(np.prod(shape))).reshape(shape).astype(bool)
        self._masks[name] = mask
        return mask


def remove_old(folder: Path, days: int, keep: Collection[str]) -> None:
    """Remove sessions under ``folder`` that nobody changed for ``days`` days, but those named in ``keep``."""
    for session in folder.iterdir() if folder.is_dir() else ():
        file = session / FILE
        last = file.stat().st_mtime if file.is_file() else session.stat().st_mtime
        if session.is_dir() and session.name not in keep and time.time() - last > days * 86_400:
            shutil.rmtree(session, ignore_errors=True)
