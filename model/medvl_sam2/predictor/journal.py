"""A session's prompts on disk, so that it goes on after the server was stopped or killed.

A folder a session: ``journal.jsonl`` and the masks that prompts held, as compressed bits named by their content. The
first line says which weights and which image; every further one is a :class:`Change`, on disk before it is answered. Of
a prompt, which lists all that stands, a line has what differs from the object's prompt before, so it costs what was
placed. States are not written: they follow from the prompts. A journal with far more lines than its timelines have
steps, and one that missed a change because it could not be written, is written anew in one step.
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
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medvl_sam2.errors import DataError
from medvl_sam2.files import atomic_writer, sync_path
from medvl_sam2.predictor.timeline import Change, Timeline, mask_key
from medvl_sam2.strokes import Plane, Stroke, StrokeKind
from medvl_sam2.types import Prompt

logger = logging.getLogger(__name__)

FORMAT = "medvl-sam2-session-2"
READABLE = (FORMAT, "medvl-sam2-session-1")
"""The first format wrote whole prompts."""
FILE = "journal.jsonl"
SPARE_LINES = 100
"""Lines that a journal may have beyond twice what its timelines need."""
_EMPTY: dict[str, Any] = {
    "points": [], "box": None, "mask": None, "text": None, "strokes": [], "accepted": [], "propagate": False
}  # fmt: skip
"""The prompt before an object's first one, as JSON."""
_LISTS = ("points", "strokes", "accepted")


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
        self._lines = 0
        self._behind = False
        """Whether the last change could not be written."""
        self._last: dict[str, dict[str, Any]] = {}
        """The last prompt of each object as JSON."""
        self._masks: dict[str, np.ndarray] = {}
        if fresh:
            self.remove()
        if not (folder / FILE).is_file():
            return
        try:
            self._read()
        except (DataError, OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            self.set_aside(str(error))

    def write(self, change: Change, timelines: Mapping[str, Timeline]) -> None:
        """Put a change on disk, of which ``timelines`` are what came out.

        Raises:
            OSError: it cannot be written; it will be with the next one.
        """
        behind, self._behind = self._behind, True
        if behind:
            self._write_anew(timelines)
        else:
            self._append(change)
            self._compact(timelines)
        self._behind = False

    def compact(self, timelines: Mapping[str, Timeline]) -> None:
        """Write the journal anew where that saves much; ``timelines`` are what its changes made.

        Raises:
            OSError: it cannot be written; what is on disk stays.
        """
        if self._begun:
            self._compact(timelines)

    def _compact(self, timelines: Mapping[str, Timeline]) -> None:
        needed = sum(len(timeline.steps) + 1 for timeline in timelines.values())
        if self._lines > 2 * needed + SPARE_LINES:
            self._write_anew(timelines)

    def _append(self, change: Change) -> None:
        lines = [self._line(change)]
        if not self._begun:
            self.folder.mkdir(parents=True, exist_ok=True)
            lines.insert(0, self._head)
        with open(self.folder / FILE, "ab") as file:
            file.write("".join(f"{json.dumps(line)}\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())
        self._lines += len(lines)
        if not self._begun:
            sync_path(self.folder)
            sync_path(self.folder.parent)
            self._begun = True

    def _write_anew(self, timelines: Mapping[str, Timeline]) -> None:
        """Replace the file by the fewest lines that make ``timelines``; masks that none of them names go."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._last = {}
        lines = [self._head]
        for name, timeline in timelines.items():
            lines += [self._line(Change(name, n, step.whole())) for n, step in enumerate(timeline.steps)]
            lines.append(self._line(Change(name, timeline.position)))
        with atomic_writer(self.folder / FILE) as file:
            file.writelines(f"{json.dumps(line)}\n".encode() for line in lines)
        sync_path(self.folder.parent)
        self._begun, self._lines = True, len(lines)
        named = {step.mask_key for timeline in timelines.values() for step in timeline.steps}
        for path in self.folder.glob("*.npz"):
            if path.stem not in named:
                path.unlink()

    @property
    def _head(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self.header)}

    def _line(self, change: Change) -> dict[str, Any]:
        """A change as JSON."""
        if change.prompt is None:
            return {"object": change.name, "stand": change.at}
        before, prompt = self._last.get(change.name, _EMPTY), self._written(change.prompt)
        self._last[change.name] = prompt
        return {"object": change.name, "at": change.at, "changed": _difference(before, prompt)}

    def remove(self) -> None:
        """Take the session off the disk; the next change begins a new journal."""
        (self.folder / FILE).unlink(missing_ok=True)  # this must not fail unseen: nothing comes back after a restart
        shutil.rmtree(self.folder, ignore_errors=True)
        self._forget()

    def set_aside(self, reason: str) -> None:
        """Rename what is on disk; the next change begins a new journal."""
        aside = self.folder.with_name(f"{self.folder.name}.aside-{time.time_ns()}")
        self.folder.rename(aside)
        logger.warning("The session in %s is not taken up: %s", aside, reason)
        self._forget()

    def _forget(self) -> None:
        self.changes, self.weights_changed, self._begun, self._behind = [], False, False, False
        self._lines, self._last = 0, {}

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
            name, at = str(record["object"]), record["stand"] if "stand" in record else record["at"]
            if type(at) is not int:
                raise DataError(f"{at!r} is no count of steps")
            if "stand" not in record:
                whole_prompt = _first_format(record["prompt"]) if "prompt" in record else None
                before = self._last.get(name, _EMPTY)
                self._last[name] = whole_prompt or _applied(before, record["changed"])
            self.changes.append(Change(name, at, None if "stand" in record else self._prompt(self._last[name])))
        self._masks, self._lines = {}, len(records)
        if len(whole) < len(content):
            os.truncate(self.folder / FILE, len(whole))
        # Other weights answer from here on: the header comes again before their first change.
        self._begun = not self.weights_changed

    def _check(self, record: dict[str, Any]) -> None:
        if record["format"] not in READABLE:
            raise DataError(f"its format {record['format']!r} is none of {', '.join(READABLE)}")
        if (record["image"], record["stamp"]) != (self.header.image, self.header.stamp):
            raise DataError(f"the image {record['image']} is another file now")
        self.weights_changed = (record["version"], record["sha256"]) != (self.header.version, self.header.sha256)

    def _written(self, prompt: Prompt) -> dict[str, Any]:
        """A prompt as JSON; its mask goes into a file of its own."""
        return {
            "points": [
                [*point, label] for point, label in zip(prompt.points.tolist(), prompt.labels.tolist(), strict=True)
            ],
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
        name = mask_key(mask)
        path = self.folder / f"{name}.npz"
        if not path.is_file():
            with atomic_writer(path) as file:
                np.savez_compressed(file, bits=np.packbits(mask), shape=np.array(mask.shape))
        return name

    def _prompt(self, record: dict[str, Any]) -> Prompt:
        name, box = record["mask"], record["box"]
        points = np.array(record["points"], dtype=np.float64).reshape(-1, 4)
        return Prompt(
            points=points[:, :3],
            labels=points[:, 3].astype(np.int64),
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


def _difference(before: Mapping[str, Any], prompt: Mapping[str, Any]) -> dict[str, Any]:
    """What of a prompt differs from the one before; of lists how many items stay at both ends, and those between."""
    changed = {key: value for key, value in prompt.items() if value != before[key]}
    for key in changed.keys() & set(_LISTS):
        old, new = before[key], prompt[key]
        most = min(len(old), len(new))
        head = next((n for n in range(most) if old[n] != new[n]), most)
        tail = next((n for n in range(most - head) if old[-1 - n] != new[-1 - n]), most - head)
        changed[key] = [head, tail, new[head : len(new) - tail]]
    return changed


def _applied(before: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt that :func:`_difference` was made of."""
    prompt = {**before, **changed}
    for key in changed.keys() & set(_LISTS):
        head, tail, between = changed[key]
        if not 0 <= head <= head + tail <= len(before[key]):
            raise DataError(f"its {key} keep {head} and {tail} of {len(before[key])}")
        prompt[key] = [*before[key][:head], *between, *before[key][len(before[key]) - tail :]]
    return prompt


def _first_format(record: Mapping[str, Any]) -> dict[str, Any]:
    """A whole prompt as the first format had it."""
    points = [[*point, label] for point, label in zip(record["points"], record["labels"], strict=True)]
    return {key: points if key == "points" else record[key] for key in _EMPTY}


def remove_old(folder: Path, days: int, keep: Collection[str]) -> None:
    """Remove sessions under ``folder`` that nobody changed for ``days`` days, but those named in ``keep``."""
    for session in folder.iterdir() if folder.is_dir() else ():
        file = session / FILE
        last = file.stat().st_mtime if file.is_file() else session.stat().st_mtime
        if session.is_dir() and session.name not in keep and time.time() - last > days * 86_400:
            shutil.rmtree(session, ignore_errors=True)
