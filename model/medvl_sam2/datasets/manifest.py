"""The project's manifest: one JSON object a line, one line a case.

Every data set becomes the same records, so training and evaluation never look at a foreign folder layout. Paths are
relative, with ``/``, to the folder of the data set: the manifest's own folder, or the root given when it is read.
Reading is strict: what is not exactly a record is refused with its line, because a field that is silently dropped is a
label or a text that silently is not trained on.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath

from medvl_sam2.datasets.json_records import from_plain, to_plain
from medvl_sam2.errors import DataError
from medvl_sam2.files import atomic_writer
from medvl_sam2.types import Modality

_OPPOSITE = {"R": "L", "A": "P", "S": "I"}


class Split(StrEnum):
    """Side of a case. All cases of a patient stand on one side."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a file lie whose header does not say it, or says it wrongly.

    ``axes``: the direction (R or L, A or P, S or I) each stored axis grows towards, so NIfTI's usual RAS+ is ``RAS``.
    ``spacing``: voxel edges in mm along the stored axes; None when nobody states them (1 mm is taken).
    ``assumed``: the source states no orientation either and ``axes`` is how such files usually lie.
    """

    axes: str
    spacing: tuple[float, float, float] | None = None
    assumed: bool = False

    def __post_init__(self) -> None:
        kinds = sorted({_OPPOSITE.get(a, a) for a in self.axes})
        if len(self.axes) != 3 or kinds != sorted(_OPPOSITE.values()):
            raise DataError(f"axes {self.axes!r} must name three directions, one each of R/L, A/P and S/I")
        if self.spacing is not None and not all(math.isfinite(n) and n > 0 for n in self.spacing):
            raise DataError(f"spacing {self.spacing} must be three positive lengths in mm")


@dataclass(frozen=True)
class ImageFile:
    """The image of a case: a volume file, a ``.npy``, an array in a ``.npz``, or a folder of numbered pictures.

    ``member``: name of the array inside a ``.npz``. ``index``: the one volume meant, of the first axis of that array or
    of the fourth of a NIfTI file. ``grid`` replaces what the header says. ``rescale`` (slope, intercept): HU of a
    stored value, where only a table states it.
    """

    path: str
    member: str | None = None
    index: int | None = None
    grid: Grid | None = None
    rescale: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        _require_relative(self.path)
        if self.rescale is not None and not (all(map(math.isfinite, self.rescale)) and self.rescale[0] != 0):
            raise DataError(f"rescale {self.rescale} must be a finite slope that is not 0 and a finite intercept")


@dataclass(frozen=True)
class LabelFile:
    """A file with masks and what its values mean.

    ``names``: structure by value (0 is background). In a sparse ``.npz`` of one row a class, value ``n`` is row
    ``n - 1``. A name that is listed but has no voxel is known to be absent; a name that is not listed is unknown.
    """

    path: str
    names: Mapping[int, str]

    def __post_init__(self) -> None:
        _require_relative(self.path)
        if not self.names or min(self.names) < 1 or not all(self.names.values()):
            raise DataError(
                f"label names {dict(self.names)} of {self.path} must map values from 1 on to structure names"
            )


@dataclass(frozen=True)
class Question:
    """A question about the volume; ``choices`` is empty for an open one, otherwise ``answer`` is one of them."""

    text: str
    answer: str
    kind: str
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.text.strip() or not self.answer.strip():
            raise DataError(f"question {self.text!r} with answer {self.answer!r}: neither may be empty")
        if self.choices and self.answer not in self.choices:
            raise DataError(f"answer {self.answer!r} is none of the choices {list(self.choices)}")


@dataclass(frozen=True)
class Reference:
    """A sentence that means the structures ``targets`` (names of the case's labels).

    ``answer``: what is to be said, with ``[SEG]`` where the mask belongs.
    """

    text: str
    targets: tuple[str, ...]
    answer: str
    kind: str

    def __post_init__(self) -> None:
        if not self.text.strip() or not self.targets:
            raise DataError(f"sentence {self.text!r} for {list(self.targets)}: give a text and at least one target")


@dataclass(frozen=True)
class CaseRecord:
    """One case. ``patient`` is unique over all sources: two records with the same one show the same person.

    ``modality`` is CT only for Hounsfield units; normalised grey values are OTHER.
    """

    id: str
    source: str
    patient: str
    split: Split
    modality: Modality
    licence: str
    image: ImageFile
    labels: tuple[LabelFile, ...] = ()
    report: str | None = None
    questions: tuple[Question, ...] = ()
    references: tuple[Reference, ...] = ()

    def __post_init__(self) -> None:
        if not (self.id and self.source and self.patient and self.licence):
            raise DataError(f"case {self.id!r} needs an id, a source, a patient and a licence")
        unknown = sorted({t for r in self.references for t in r.targets} - set(self.label_names))
        if unknown:
            raise DataError(f"case {self.id!r} refers to {unknown[0]!r}, which none of its label files names")

    @property
    def label_names(self) -> tuple[str, ...]:
        """Structures whose masks are given, each once, in file and value order."""
        return tuple(dict.fromkeys(name for file in self.labels for _, name in sorted(file.names.items())))


@dataclass(frozen=True)
class Manifest:
    """Records and the folder their paths start from."""

    records: tuple[CaseRecord, ...]
    root: Path

    def of(self, split: Split) -> Manifest:
        """The records of one side."""
        return Manifest(tuple(r for r in self.records if r.split is split), self.root)


def write_manifest(path: Path, records: Iterable[CaseRecord]) -> int:
    """Write ``records``, whole or not at all; returns how many. An id that comes twice raises :class:`DataError`."""
    seen: set[str] = set()
    with atomic_writer(path) as file:
        for record in records:
            if record.id in seen:
                raise DataError(f"case id {record.id!r} comes twice; ids must be unique in a manifest")
            seen.add(record.id)
            file.write(json.dumps(to_plain(record), ensure_ascii=False).encode() + b"\n")
    return len(seen)


def read_manifest(path: Path, root: Path | None = None) -> Manifest:
    """Read a manifest; ``root`` is where its paths start from (default: the folder it lies in).

    Raises :class:`DataError` with file and line: not JSON, an unknown, missing or ill-typed field, an impossible
    value, an id or a patient that contradicts an earlier line; also for a file that is missing or holds no case.
    """
    path = Path(path)
    records: list[CaseRecord] = []
    lines: dict[str, int] = {}
    for number, text in _lines(path):
        where = f"{path}:{number}"
        try:
            record = from_plain(CaseRecord, json.loads(text))
        except (json.JSONDecodeError, DataError) as error:
            raise DataError(f"{where}: {error}; write the manifest again with scripts/make_manifest.py") from error
        if record.id in lines:
            raise DataError(f"{where}: case {record.id!r} also stands in line {lines[record.id]}; remove one of them")
        lines[record.id] = number
        records.append(record)
    if not records:
        raise DataError(f"{path} holds no case; write it with scripts/make_manifest.py")
    divided = divided_patients(records)
    if divided:
        raise DataError(f"{path}: patient {divided[0]!r} stands on several sides; give all its cases one split")
    return Manifest(tuple(records), path.parent if root is None else Path(root))


def divided_patients(records: Iterable[CaseRecord]) -> list[str]:
    """Patients with cases on more than one side, sorted. Check it over all manifests used together."""
    sides = Counter(patient for patient, _ in {(record.patient, record.split) for record in records})
    return sorted(patient for patient, count in sides.items() if count > 1)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"manifest {path} cannot be read ({error}); check the path") from error


def _require_relative(path: str) -> None:
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path:
        raise DataError(f"path {path!r} must be relative to the data folder, with '/' and without '..'")
