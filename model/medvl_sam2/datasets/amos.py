"""AMOS22 (Ji et al. 2022): abdominal CT (ids to 500) and MR (above), 15 organs.

``imagesTr``, ``imagesVa``, ``imagesTs`` and ``labelsTr``, ``labelsVa`` with ``amos_XXXX.nii.gz``, and ``dataset.json``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from medvl_sam2.datasets.manifest import CaseRecord, ImageFile, LabelFile, Split
from medvl_sam2.datasets.source import (
    NO_LICENCE,
    Finding,
    Problem,
    missing,
    named_values,
    nifti_files,
    read_object,
    relative,
    stem,
)
from medvl_sam2.types import Modality

_SPLITS = {"Tr": Split.TRAIN, "Va": Split.VALIDATION, "Ts": Split.TEST}
_LAST_CT = 500


def patient(case: str) -> str:
    """The patient of an AMOS case, also where M3D-Seg uses the case."""
    return f"amos/{case}"


def read(root: Path) -> Iterator[Finding]:
    """Cases of the three parts; the test part has no labels."""
    table = read_object(root / "dataset.json", "labels")
    names = named_values(table["labels"])
    for part, split in _SPLITS.items():
        for image in nifti_files(root / f"images{part}"):
            case = stem(image)
            number = case.removeprefix("amos_")
            label = root / f"labels{part}" / image.name
            labelled = split is not Split.TEST or label.exists()
            reason = missing(image, label) if labelled else missing(image)
            if reason is None and not number.isdecimal():
                reason = "its name is not amos_ and a number, so CT or MR is unknown"
            if reason is not None:
                yield Problem(case, reason)
                continue
            yield CaseRecord(
                id=f"amos/{case}",
                source="amos",
                patient=patient(case),
                split=split,
                modality=Modality.CT if int(number) <= _LAST_CT else Modality.MR,
                licence=str(table.get("licence") or NO_LICENCE),
                image=ImageFile(relative(image, root)),
                labels=(LabelFile(relative(label, root), names),) if labelled else (),
            )
