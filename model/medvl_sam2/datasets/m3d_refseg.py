"""M3D-RefSeg (Bai et al. 2024): sentences that mean one region of a CT, 210 cases of TotalSegmentator.

``<case>/{ct.nii.gz,mask.nii.gz,text.json}`` and ``M3D_RefSeg_{train,test}.csv`` with ``Image, Mask, Mask_ID,
Question_Type, Question, Answer``; the region is where the mask equals ``Mask_ID``. M3D's preparation turns the volume
to (z, x, y), while that of M3D-Seg gives (z, y, x): the NIfTI files are read where they are, with their own headers,
and the axes of a prepared ``.npy`` are stated as what they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from medvl_sam2.datasets import totalsegmentator
from medvl_sam2.datasets.manifest import CaseRecord, Grid, ImageFile, LabelFile, Reference, Split
from medvl_sam2.datasets.source import NO_LICENCE, SEG, Finding, Problem, first_file, missing, read_table, relative
from medvl_sam2.errors import DataError
from medvl_sam2.types import Modality

_COLUMNS = ("Image", "Mask_ID", "Question_Type", "Question", "Answer")
_KINDS = {"0": "description", "1": "reasoning"}
_PREPARED_AXES = "SRA"  # (z, x, y) of a RAS+ volume


def read(root: Path) -> Iterator[Finding]:
    """Cases in the order of the tables."""
    tables = {Split.TRAIN: first_file(root, "M3D_RefSeg_train.csv", "M3D_RefSeg.csv", "*/M3D_RefSeg_train.csv")}
    tables[Split.TEST] = tables[Split.TRAIN].with_name("M3D_RefSeg_test.csv")
    for split, table in tables.items():
        rows: dict[str, list[Mapping[str, str]]] = {}
        for line, row in read_table(table, _COLUMNS, delimiter=","):
            try:
                _reference(row)
            except DataError as error:
                yield Problem(f"{table.name}:{line}", f"{row['Image']}: {error}")
                continue
            rows.setdefault(Path(row["Image"]).parent.name, []).append(row)
        for case, asked in rows.items():
            yield _finding(root, table.parent / case, asked, split)


def _reference(row: Mapping[str, str]) -> Reference:
    question, answer = (row[key].replace("<SEG>", SEG) for key in ("Question", "Answer"))
    value, kind = row["Mask_ID"].removesuffix(".0"), row["Question_Type"].removesuffix(".0")
    if not value.isdecimal() or int(value) < 1:
        raise DataError(f"mask id {value!r} is no number from 1 on")
    if kind not in _KINDS:
        raise DataError(f"question type {kind!r} is neither 0 nor 1")
    if SEG not in answer:
        raise DataError(f"answer {answer!r} has no {SEG}")
    return Reference(question, (f"region_{value}",), answer, _KINDS[kind])


def _finding(root: Path, folder: Path, rows: Sequence[Mapping[str, str]], split: Split) -> Finding:
    raw = (folder / "ct.nii.gz").exists() or not (folder / "ct.npy").exists()
    image, mask = (folder / f"{name}.{'nii.gz' if raw else 'npy'}" for name in ("ct", "mask"))
    reason = missing(image, mask)
    if reason is not None:
        return Problem(folder.name, reason)
    references = tuple(map(_reference, rows))
    values = sorted({int(row["Mask_ID"].removesuffix(".0")) for row in rows})
    return CaseRecord(
        id=f"m3d_refseg/{split}/{folder.name}",
        source="m3d_refseg",
        patient=totalsegmentator.patient(folder.name),
        split=split,
        modality=Modality.CT if raw else Modality.OTHER,
        licence=NO_LICENCE,
        image=ImageFile(relative(image, root), grid=None if raw else Grid(_PREPARED_AXES, assumed=True)),
        labels=(LabelFile(relative(mask, root), {value: f"region_{value}" for value in values}),),
        references=references,
    )
