"""What the modules of the single sources share: problems, splits, tables and file checks.

A source is a function from a folder to findings, records and problems mixed, in a fixed order. It looks at tables and
file names, never into volumes (that is :func:`~medvl_sam2.datasets.volumes.read_case`), and writes nothing.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medvl_sam2.datasets.label_names import label_name
from medvl_sam2.datasets.manifest import CaseRecord, Split, divided_patients
from medvl_sam2.errors import DataError

NO_LICENCE = "not stated in the folder; the terms of its source apply"
SEG = "[SEG]"
_SHARES = ((Split.TEST, 0.1), (Split.VALIDATION, 0.2))
_ORDER = (Split.TRAIN, Split.VALIDATION, Split.TEST)


@dataclass(frozen=True)
class Problem:
    """What is wrong with a case. ``skipped`` False: the case is kept, and ``reason`` says what was left out of it."""

    case: str
    reason: str
    skipped: bool = True


Finding = CaseRecord | Problem


def hashed_split(patient: str) -> Split:
    """Side of a patient where the source has no split: 80 % train, 10 % validation, 10 % test, the same for ever."""
    position = int(hashlib.sha256(patient.encode()).hexdigest()[:12], 16) / 16**12
    return next((split for split, share in _SHARES if position < share), Split.TRAIN)


def settled(
    records: Sequence[CaseRecord], written: Sequence[CaseRecord] = ()
) -> tuple[list[CaseRecord], list[Problem]]:
    """Records with every patient on one side: the one kept furthest from training of those its cases have.

    Use it on the records of all sources trained on together: M3D-Seg 0011 and M3D-RefSeg are TotalSegmentator cases.
    ``written``: records of manifests that stand already; their patients stay on the side they have there, even where
    that is training and the source tests with them: the message of those cases says so. Raises :class:`DataError` when
    the manifests disagree among themselves.
    """
    divided = divided_patients(written)
    if divided:
        raise DataError(f"patient {divided[0]!r} stands on several sides of the given manifests; write them again")
    side: dict[str, Split] = {}
    for record in records:
        side[record.patient] = max(side.get(record.patient, Split.TRAIN), record.split, key=_ORDER.index)
    side |= {record.patient: record.split for record in written}
    moved = [Problem(r.id, _move(r.split, side[r.patient]), False) for r in records if r.split is not side[r.patient]]
    return [dataclasses.replace(r, split=side[r.patient]) for r in records], moved


def _move(source: Split, target: Split) -> str:
    if _ORDER.index(target) < _ORDER.index(source):
        return f"patient stands in {target} of a given manifest: moved there, away from {source} of its source"
    return f"patient also in {target}: moved there from {source}"


def missing(*paths: Path) -> str | None:
    """Why a case cannot be read without opening its files: the first that is absent or empty, else None."""
    for path in paths:
        if not path.exists():
            return f"{_tail(path)} is missing"
        if path.is_file() and path.stat().st_size == 0:
            return f"{_tail(path)} is an empty file"
    return None


def read_table(
    path: Path, columns: Iterable[str], delimiter: str | None = None
) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a CSV file with their line numbers, cells stripped; a cell the row lacks is empty.

    ``delimiter`` None: ``;`` where the header has one, else ``,``. Raises :class:`DataError` for a file that is
    missing or lacks one of ``columns``.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            rows = csv.DictReader(file, delimiter=delimiter or (";" if ";" in header else ","), restval="")
            lacking = [name for name in columns if name not in (rows.fieldnames or ())]
            if lacking:
                raise DataError(f"{path} has no column {lacking[0]!r} ({rows.fieldnames}); restore the original table")
            for row in rows:
                yield rows.line_num, {key: value.strip() for key, value in row.items() if key is not None}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"table {path} cannot be read ({error}); give the folder that holds it") from error


def read_json(path: Path) -> Any:
    """A JSON file; :class:`DataError` when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); give the folder that holds the whole data set") from error


def read_object(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON object that has ``keys``; :class:`DataError` otherwise."""
    data = read_json(path)
    if not isinstance(data, dict) or any(key not in data for key in keys):
        raise DataError(f"{path} is no object with {', '.join(keys)}; restore the original file")
    return data


def text_fields(entry: Any, *keys: str) -> tuple[str, ...]:
    """Values of an entry of a JSON list; :class:`DataError` when one is missing or no text."""
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in keys):
        raise DataError(f"entry {entry!r} of the table lacks {' or '.join(keys)}")
    return tuple(entry[key] for key in keys)


def inner(root: Path, name: str) -> Path:
    """``root/name`` where there is one: people give either the data set's folder or the one its archive made in it."""
    return root / name if (root / name).is_dir() else root


def first_file(root: Path, *patterns: str) -> Path:
    """The first file below ``root`` that fits one of ``patterns``; :class:`DataError` when there is none."""
    for pattern in patterns:
        found = sorted(path for path in root.glob(pattern) if path.is_file() and not path.name.startswith("._"))
        if found:
            return found[0]
    raise DataError(f"{root} holds no {patterns[0]}; give the data set's own folder")


def nifti_files(folder: Path) -> list[Path]:
    """NIfTI files of a folder, sorted by the numbers in their names, without the ``._`` leftovers of a Mac."""
    files = [p for p in folder.glob("*.nii*") if p.name.endswith((".nii", ".nii.gz")) and not p.name.startswith("._")]
    return sorted(files, key=lambda p: [(int(n or -1), t) for n, t in re.findall(r"(\d+)|(\D+)", p.name)])


def stem(path: Path) -> str:
    """File name without ``.nii.gz`` or its other suffix."""
    return path.name.removesuffix(".gz").rsplit(".", 1)[0]


def relative(path: Path, root: Path) -> str:
    """``path`` as the manifest writes it; :class:`DataError` when a table points outside the data set."""
    if not path.is_relative_to(root):
        raise DataError(f"{path} lies outside {root}; give the folder that holds all files the tables name")
    return path.relative_to(root).as_posix()


def named_values(labels: Mapping[str, str]) -> dict[int, str]:
    """A decathlon ``labels`` table (value to name, both text) without the background, names cleaned."""
    pairs = {int(value): str(name) for value, name in labels.items() if str(value).isdecimal()}
    return {value: label_name(name) for value, name in sorted(pairs.items()) if value > 0 and label_name(name)}


def _tail(path: Path) -> str:
    return "/".join(path.parts[-2:])
