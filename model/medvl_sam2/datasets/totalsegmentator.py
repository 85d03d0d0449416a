"""TotalSegmentator v2 (Wasserthal et al. 2023, zenodo 6802613): 1,228 CT with one binary file a class.

``sXXXX/ct.nii.gz``, ``sXXXX/segmentations/<class>.nii.gz``, ``meta.csv`` (``;``) with ``image_id`` and ``split``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from medvl_sam2.datasets.manifest import CaseRecord, ImageFile, LabelFile, Split
from medvl_sam2.datasets.source import Finding, Problem, missing, nifti_files, read_table, relative, stem
from medvl_sam2.types import Modality

_SPLITS = {"train": Split.TRAIN, "val": Split.VALIDATION, "test": Split.TEST}


def patient(case: str) -> str:
    """The patient of a TotalSegmentator case, also where another set (M3D-Seg, M3D-RefSeg) uses the case."""
    return f"totalsegmentator/{case}"


def read(root: Path) -> Iterator[Finding]:
    """Cases in the order of ``meta.csv``; names of the classes are the file names."""
    rows = [row for _, row in read_table(root / "meta.csv", ("image_id", "split"))]
    masks = {row["image_id"]: nifti_files(root / row["image_id"] / "segmentations") for row in rows}
    classes = {stem(path) for paths in masks.values() for path in paths}
    for row in rows:
        case, files = row["image_id"], masks[row["image_id"]]
        image = root / case / "ct.nii.gz"
        reason = missing(image, root / case / "segmentations")
        if reason is None and row["split"] not in _SPLITS:
            reason = f"unknown split {row['split']!r} in meta.csv"
        if reason is None and not files:
            reason = "its segmentations folder is empty"
        if reason is not None:
            yield Problem(case, reason)
            continue
        whole = [path for path in files if not missing(path)]
        lacking = sorted(classes - {stem(path) for path in whole})
        if lacking:
            yield Problem(case, f"{len(lacking)} class files are missing: {', '.join(lacking)}", skipped=False)
        yield CaseRecord(
            id=f"totalsegmentator/{case}",
            source="totalsegmentator",
            patient=patient(case),
            split=_SPLITS[row["split"]],
            modality=Modality.CT,
            licence="CC-BY-4.0",
            image=ImageFile(relative(image, root)),
            labels=tuple(LabelFile(relative(path, root), {1: stem(path)}) for path in whole),
        )
