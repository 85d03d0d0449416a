"""M3D-Cap (Bai et al. 2024): CT pictures with reports. No longer freely downloadable; read for those who have it.

Prepared: ``M3D_Cap.json`` with lists of {"image", "text"} by side, images ``.npy`` (1, 32, 256, 256) or, from
Med3DVLM, ``.nii.gz`` of 128x256x256 whose header is made up. Raw: ``{ct_case,ct_quizze}/<id>/<series>/<n>.{png,jpeg}``
and ``<id>/text.txt``, which has no split. Pictures are windowed to grey, so the modality is OTHER.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from medvl_sam2.datasets.manifest import CaseRecord, Grid, ImageFile, Split
from medvl_sam2.datasets.source import (
    Finding,
    Problem,
    first_file,
    hashed_split,
    inner,
    missing,
    read_object,
    relative,
    text_fields,
)
from medvl_sam2.errors import DataError
from medvl_sam2.types import Modality

LICENCE = "withdrawn after a notice of its source; the terms of Radiopaedia apply"
_SPLITS = {"train": Split.TRAIN, "validation": Split.VALIDATION, "test": Split.TEST}  # test100, ... are parts of test
_SECTIONS = ("study_findings:", "discussion:")
_MIN_LETTERS = 5  # as M3D: a shorter section says nothing


def read(root: Path) -> Iterator[Finding]:
    """Prepared cases where there is a ``M3D_Cap.json``, else the raw folders."""
    try:
        table = first_file(root, "M3D_Cap.json", "*/M3D_Cap.json")
    except DataError:
        yield from _read_raw(root)
        return
    data = read_object(table, *_SPLITS)
    for name, split in _SPLITS.items():
        for entry in data[name]:
            try:
                image, text = text_fields(entry, "image", "text")
            except DataError as error:
                yield Problem(table.name, str(error))
                continue
            bases = (root, table.parent)
            yield _finding(root, located(image, *bases), located(text, *bases), split)


def located(name: str, *bases: Path) -> Path:
    """The file a table means: below the first base that has it, also as Med3DVLM's ``.nii.gz`` of a ``.npy``."""
    names = (name, name.removesuffix(".npy") + ".nii.gz") if name.endswith(".npy") else (name,)
    paths = [base / variant for base in bases for variant in names]
    return next((path for path in paths if path.exists()), paths[0])


def patient(image: Path) -> str:
    """The patient of an image ``.../<ct_case or ct_quizze>/<id>/<series>``."""
    return f"m3d_cap/{image.parts[-3]}/{image.parts[-2]}"


def image_file(image: Path, root: Path) -> ImageFile:
    """The image with the axes such a series usually has; the plane stands in the name of the series.

    A ``.npy`` is ordered (slice, row, column), Med3DVLM's NIfTI the other way round.
    """
    series = image.name.lower()
    axes = "PIL" if series.startswith("cor") else "LIP" if series.startswith("sag") else "IPL"
    return ImageFile(relative(image, root), grid=Grid(axes[::-1] if ".nii" in series else axes, assumed=True))


def _read_raw(root: Path) -> Iterator[Finding]:
    base = inner(root, "M3D_Cap")
    for kind in ("ct_case", "ct_quizze"):
        for series in sorted(path for path in (base / kind).glob("*/*") if path.is_dir()):
            yield _finding(root, series, series.parent / "text.txt", None)


def _finding(root: Path, image: Path, text: Path, split: Split | None) -> Finding:
    name = "/".join(image.parts[-3:])
    reason = missing(image, text)
    report = "" if reason else _report(text.read_text(encoding="utf-8", errors="replace"))
    if reason is None and not report:
        reason = f"{text.name} holds no report"
    if reason is not None:
        return Problem(name, reason)
    return CaseRecord(
        id=f"m3d_cap/{name}",
        source="m3d_cap",
        patient=patient(image),
        split=hashed_split(patient(image)) if split is None else split,
        modality=Modality.OTHER,
        licence=LICENCE,
        image=image_file(image, root),
        report=report,
    )


def _report(text: str) -> str:
    """The findings of a case text, else its discussion, else all of it, on one line."""
    sections = re.split(f"({'|'.join(_SECTIONS)})", text)
    bodies = dict(zip(sections[1::2], sections[2::2], strict=True))
    candidates = [" ".join(part.split()) for part in (*(bodies.get(name, "") for name in _SECTIONS), text)]
    return next((line for line in candidates if len(line.replace(" ", "")) >= _MIN_LETTERS), "")
