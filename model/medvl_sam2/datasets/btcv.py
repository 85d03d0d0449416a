"""BTCV, "Beyond the Cranial Vault" abdomen (Synapse syn3193805): 30 labelled CT, 20 without labels, 13 organs.

``RawData/Training/img/img0001.nii.gz`` with ``RawData/Training/label/label0001.nii.gz``, and ``RawData/Testing/img``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from medvl_sam2.datasets.manifest import CaseRecord, ImageFile, LabelFile, Split
from medvl_sam2.datasets.source import (
    NO_LICENCE,
    Finding,
    Problem,
    hashed_split,
    inner,
    missing,
    nifti_files,
    relative,
    stem,
)
from medvl_sam2.types import Modality

ORGANS = (
    "spleen",
    "kidney_right",
    "kidney_left",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior_vena_cava",
    "portal_vein_and_splenic_vein",
    "pancreas",
    "adrenal_gland_right",
    "adrenal_gland_left",
)
"""``ORGANS[n - 1]`` is label value ``n``."""


def patient(case: str) -> str:
    """The patient of a BTCV case such as ``img0001``, also where M3D-Seg uses the case; its number decides."""
    number = "".join(filter(str.isdigit, case))
    return f"btcv/img{int(number):04d}" if number else f"btcv/{case}"


def read(root: Path) -> Iterator[Finding]:
    """Training cases, split by a hash of the patient, then the unlabelled ones as test."""
    names = dict(enumerate(ORGANS, start=1))
    base = inner(root, "RawData")
    for part in ("Training", "Testing"):
        for image in nifti_files(base / part / "img"):
            case = stem(image)
            label = base / part / "label" / image.name.replace("img", "label", 1)
            reason = missing(image, label) if part == "Training" else missing(image)
            if reason is not None:
                yield Problem(case, reason)
                continue
            yield CaseRecord(
                id=f"btcv/{case}",
                source="btcv",
                patient=patient(case),
                split=hashed_split(patient(case)) if part == "Training" else Split.TEST,
                modality=Modality.CT,
                licence=NO_LICENCE,
                image=ImageFile(relative(image, root)),
                labels=(LabelFile(relative(label, root), names),) if part == "Training" else (),
            )
