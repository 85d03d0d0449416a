"""CT-RATE (Hamamci et al. 2024): chest CT with reports, CC-BY-NC-SA-4.0.

``dataset/{train,valid}/<patient>/<study>/<patient_study_recon>.nii.gz``; beside them ``radiology_text_reports``,
``metadata`` and ``multi_abnormality_labels`` with one CSV a side. The headers of these NIfTI files state neither
spacing nor orientation and the values are not HU: all three come from the metadata table. The later release in
``{train,valid}_fixed`` has true headers and is taken as it is.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from nibabel.orientations import aff2axcodes

from medvl_sam2.datasets.manifest import CaseRecord, Grid, ImageFile, Question, Split
from medvl_sam2.datasets.source import Finding, Problem, inner, missing, nifti_files, read_table, relative
from medvl_sam2.errors import DataError
from medvl_sam2.types import Modality

_BROKEN = ("train_1267_a_4.nii.gz", "train_11755_a_3.nii.gz", "train_11755_a_4.nii.gz")
_PARTS = (("train", "train", Split.TRAIN), ("valid", "validation", Split.VALIDATION))
_NOT_GIVEN = ("", "Not given.")
_YES_NO = ("Yes", "No")
_COLUMNS = ("VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing")


def read(root: Path) -> Iterator[Finding]:
    """Volumes in the order of the report tables, then volumes on disk that no table names."""
    base = inner(root, "dataset")
    for part, table, split in _PARTS:
        if (base / part).is_dir() or (base / f"{part}_fixed").is_dir():
            yield from _read_part(root, base, part, table, split)


def _read_part(root: Path, base: Path, part: str, table: str, split: Split) -> Iterator[Finding]:
    fixed = (base / f"{part}_fixed").is_dir()
    volumes = base / (f"{part}_fixed" if fixed else part)
    reports = _by_name(base / "radiology_text_reports" / f"{table}_reports.csv", "Findings_EN", "Impressions_EN")
    metadata = {} if fixed else _by_name(base / "metadata" / f"{table}_metadata.csv", *_COLUMNS)
    labels_path = base / "multi_abnormality_labels" / f"{part}_predicted_labels.csv"
    labels = _by_name(labels_path) if labels_path.exists() else {}
    no_chest = _names_in(base / "metadata" / f"no_chest_{part}.txt")
    for name, report in reports.items():
        study = name.rsplit("_", 1)[0]
        path = volumes / study.rsplit("_", 1)[0] / study / name
        try:
            stated = None if fixed else metadata.get(name, {})
            yield _record(root, path, split, report, stated, labels.get(name, {}), no_chest)
        except DataError as error:
            yield Problem(name, str(error))
    for path in (p for folder in sorted(volumes.glob("*/*")) for p in nifti_files(folder)):
        if path.name not in reports:
            yield Problem(path.name, f"no row in {table}_reports.csv")


def _record(
    root: Path,
    path: Path,
    split: Split,
    report: Mapping[str, str],
    metadata: Mapping[str, str] | None,
    labels: Mapping[str, str],
    no_chest: frozenset[str],
) -> CaseRecord:
    """The record of one volume; :class:`DataError` says why there is none."""
    if path.name in _BROKEN:
        raise DataError("known to be broken: its slice spacing was never recorded")
    if path.name in no_chest:
        raise DataError("listed by the data set as no chest CT")
    text = " ".join(report[key] for key in ("Findings_EN", "Impressions_EN") if report[key] not in _NOT_GIVEN)
    reason = missing(path) or ("" if text else "its report says 'Not given.'")
    if reason:
        raise DataError(reason)
    parts = path.name.removesuffix(".nii.gz").split("_")
    image = ImageFile(relative(path, root))
    if metadata is not None:
        if not metadata:
            raise DataError("no row in the metadata table, so HU and spacing are unknown")
        numbers = _number(metadata["RescaleSlope"]), _number(metadata["RescaleIntercept"])
        image = ImageFile(relative(path, root), grid=_grid(metadata), rescale=numbers)
    return CaseRecord(
        id=f"ct_rate/{'_'.join(parts)}",
        source="ct_rate",
        patient=f"ct_rate/{'_'.join(parts[:2])}",
        split=split,
        modality=Modality.CT,
        licence="CC-BY-NC-SA-4.0",
        image=image,
        report=text,
        questions=tuple(
            Question(f"Is there {name.lower()}?", _YES_NO[value != "1"], "abnormality", _YES_NO)
            for name, value in labels.items()
            if name != "VolumeName" and value in ("0", "1")
        ),
    )


def _grid(metadata: Mapping[str, str]) -> Grid:
    """Spacing, and axes from the DICOM orientation (row and column cosines, LPS) the table keeps.

    The first stored axis runs along a row, the second down the columns, the third along their cross product. Turns of
    less than 45 degrees are dropped. Where the table has no orientation, the patient is taken to lie supine.
    """
    edges = _numbers(metadata["XYSpacing"], 2)
    spacing = (edges[0], edges[1], _number(metadata["ZSpacing"]))
    orientation = metadata.get("ImageOrientationPatient", "")
    if not orientation:
        return Grid("LPS", spacing, assumed=True)
    row, column = np.reshape(_numbers(orientation, 6), (2, 3))
    affine = np.eye(4)
    affine[:3, :3] = np.stack([row, column, np.cross(row, column)], axis=1)
    affine[:2] *= -1  # LPS to RAS+
    axes = aff2axcodes(affine)
    if None in axes:
        raise DataError(f"orientation {orientation} in the metadata table names no three axes")
    return Grid("".join(axes), spacing)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"value {text!r} in the metadata table is no number")
    return value


def _numbers(text: str, count: int) -> list[float]:
    """A bracketed list as pandas writes it."""
    try:
        values = [float(value) for value in ast.literal_eval(text)]
    except (ValueError, SyntaxError, TypeError):
        values = []
    if len(values) != count or not all(map(math.isfinite, values)):
        raise DataError(f"value {text!r} in the metadata table is no list of {count} numbers")
    return values


def _by_name(path: Path, *columns: str) -> dict[str, dict[str, str]]:
    return {row["VolumeName"]: row for _, row in read_table(path, ("VolumeName", *columns), delimiter=",")}


def _names_in(path: Path) -> frozenset[str]:
    if not path.exists():
        return frozenset()
    return frozenset(line.strip().rsplit("/", 1)[-1] for line in path.read_text(encoding="utf-8").splitlines())
