"""A MONAI Label store as records of a manifest: what people corrected, masks and texts, for the stages that read one.

A case is an image with a submitted label (tag ``final``), a stored text, or both. Patients are told apart as finetuning
does (:mod:`medvl_sam2.training.holdout`) and written as digests; its hold-out record, where one is given, decides the
sides, so that no stage trains on a patient that finetuning measures with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medvl_sam2.datasets.label_names import label_name
from medvl_sam2.datasets.manifest import CaseRecord, ImageFile, LabelFile, Split
from medvl_sam2.datasets.source import Finding, Problem, read_object
from medvl_sam2.datasets.stored_texts import stored_texts
from medvl_sam2.errors import DataError, MedVLError
from medvl_sam2.training.finetune_samples import label_names
from medvl_sam2.training.holdout import assign_patients, patient_key
from medvl_sam2.volume_io import read_mask, read_volume

SOURCE = "store"
_LICENCE = "the site's own data"


def read(folder: Path, holdout: Path | None = None) -> Iterator[Finding]:
    """Cases of the studies folder (or cache of a DICOMweb server) ``folder``; a broken one is a problem.

    ``holdout``: record of the patients held out (``holdout.json`` of the server's store); one of its own, in
    ``folder``, without it. Raises :class:`DataError` when ``folder`` is no store.
    """
    index = read_object(folder / "datastore_v2.json", "objects")
    known = folder / "patients.json"
    patients = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {}
    keys = {}
    for image, entry in sorted(index["objects"].items()):
        info = dict(entry["image"].get("info", {}))
        keys[image] = patient_key(image, info | ({"PatientID": patients[image]} if image in patients else {}))
    sides = assign_patients(holdout or folder / ".medvl-holdout.json", keys.values())
    for image, key in keys.items():
        try:
            record = _record(folder, index, image, key, Split.TRAIN if key in sides.train else Split.VALIDATION)
        except (MedVLError, OSError) as error:
            yield Problem(f"{SOURCE}/{image}", str(error))
        else:
            if record is not None:
                yield record


def _record(folder: Path, index: Mapping[str, Any], image: str, patient: str, side: Split) -> CaseRecord | None:
    """None for an image that nobody has worked on."""
    entry = index["objects"][image]
    file = Path(index.get("images_dir", ".")) / f"{image}{entry['image']['ext']}"
    final = entry.get("labels", {}).get("final")
    labels = () if final is None else _labels(folder, index, image, final)
    texts = stored_texts(folder, image)
    if not (labels or texts.report or texts.questions):
        return None
    return CaseRecord(
        id=f"{SOURCE}/{image}",
        source=SOURCE,
        patient=f"{SOURCE}/{hashlib.sha256(patient.encode()).hexdigest()[:16]}",
        split=side,
        modality=read_volume(folder / file).modality,
        licence=_LICENCE,
        image=ImageFile(file.as_posix()),
        labels=labels,
        report=texts.report,
        questions=texts.questions,
    )


def _labels(folder: Path, index: Mapping[str, Any], image: str, final: Mapping[str, Any]) -> tuple[LabelFile, ...]:
    file = Path(index.get("labels_dir", "labels")) / "final" / f"{image}{final['ext']}"
    values = np.unique(read_mask(folder / file)[0]).tolist()
    named = label_names(final.get("info", {}).get("label_info", []), values)
    names = {value: label_name(name) for value, name in named.items()}
    if not names or not all(names.values()):
        raise DataError(f"label of {image!r} has no structure with a name; submit it with named segments")
    return (LabelFile(file.as_posix(), names),)
