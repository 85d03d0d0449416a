"""Corrected labels from files: a MONAI Label datastore folder, or images with a ``labels`` folder beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medvl_sam2.errors import DataError, MedVLError, VolumeError
from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.training.finetune_records import FinetuneSample
from medvl_sam2.training.holdout import patient_key
from medvl_sam2.training.measure import LabelledCase
from medvl_sam2.training.samples import LabelledVolume, from_masks
from medvl_sam2.types import Modality
from medvl_sam2.volume_io import read_mask, read_volume

_IMAGE_SUFFIXES = (".nii.gz", ".nii", ".nrrd")
_DATASTORE_FILE = "datastore_v2.json"


@dataclass(frozen=True, eq=False)
class LoadedSample:
    """A sample in memory. ``case.masks`` are stored-grid bool arrays of the structures that have a voxel."""

    sample: FinetuneSample
    case: LabelledCase

    def volume(self) -> LabelledVolume:
        """The canonical volume training draws from; only the labelled structures are known in it."""
        transform = CanonicalTransform(self.case.volume.geometry)
        kind = np.int16 if self.case.volume.modality is Modality.CT else np.float32
        masks = {n: np.ascontiguousarray(transform.forward_array(m)) for n, m in self.case.masks.items()}
        image = np.ascontiguousarray(transform.forward_array(self.case.volume.array)).astype(kind)
        return from_masks(image, transform.spacing, self.case.volume.modality, masks, self.sample.patient)


def load_samples(samples: Sequence[FinetuneSample]) -> tuple[list[LoadedSample], list[str]]:
    """Read samples; one that cannot be used is left out, with its reason in the second list.

    Raises:
        DataError: not one sample can be used.
    """
    loaded: list[LoadedSample] = []
    skipped: list[str] = []
    for sample in samples:
        try:
            loaded.append(_load(sample))
        except MedVLError as error:
            skipped.append(f"{sample.id}: {error}")
    if not loaded:
        reasons = "; ".join(skipped) or "there is none"
        raise DataError(f"no submitted label can be trained on ({reasons}); submit a label first")
    return loaded, skipped


def label_names(label_info: Sequence[Mapping[str, Any]], values: Sequence[int]) -> dict[int, str]:
    """Structure name of every mask value in use, from what a client sent with its label.

    An entry may state its mask ``value``. 3D Slicer does not: it numbers the saved mask by position in ``label_info``
    while ``idx`` counts all segments, saved or not. The first of value, position and ``idx`` that explains all decides.

    Raises:
        DataError: neither explains a value.
    """
    used = sorted({int(value) for value in values} - {0})
    names = [str(entry.get("name", "")).strip() for entry in label_info]
    by_position = {number: name for number, name in enumerate(names, start=1) if name}
    by_value, by_idx = (
        {int(e[key]): n for e, n in zip(label_info, names, strict=True) if n and str(e.get(key, "")).isdigit()}
        for key in ("value", "idx")
    )
    for table in (by_value, by_position, by_idx):
        if set(used) <= set(table):
            return {value: table[value] for value in used}
    unnamed = sorted(set(used) - set(by_position))
    raise DataError(f"mask value {unnamed[0]} has no name in label_info {names}; submit the label with named segments")


def samples_from_folder(folder: Path) -> list[FinetuneSample]:
    """Samples of a MONAI Label studies folder, or of images with ``labels/<same name>`` and ``labels/labels.json``.

    ``labels.json`` maps mask values to names, for all images, or by image id. ``patients.json``, if there is one, maps
    image ids to patients.

    Raises:
        DataError: there is no labelled image, or names are missing.
    """
    folder = Path(folder)
    known = folder / "patients.json"
    patients: dict[str, Any] = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {}
    index = folder / _DATASTORE_FILE
    found = _from_datastore(folder, index, patients) if index.exists() else _from_plain_folder(folder, patients)
    if not found:
        raise DataError(f"{folder} holds no labelled image; put images there and their masks into {folder / 'labels'}")
    return found


def _from_datastore(folder: Path, index: Path, patients: Mapping[str, Any]) -> list[FinetuneSample]:
    data = json.loads(index.read_text(encoding="utf-8"))
    found = []
    for image_id, record in sorted(data.get("objects", {}).items()):
        label = record.get("labels", {}).get("final")
        if label is None:
            continue
        image = folder / data.get("images_dir", ".") / f"{image_id}{record['image']['ext']}"
        mask = folder / data.get("labels_dir", "labels") / "final" / f"{image_id}{label['ext']}"
        if not image.exists() or not mask.exists():
            continue
        values = np.unique(read_mask(mask)[0]).tolist()
        names = label_names(label.get("info", {}).get("label_info", []), values)
        info = dict(record["image"].get("info", {}))
        if image_id in patients:
            info["PatientID"] = patients[image_id]
        found.append(FinetuneSample(image, mask, names, patient_key(image_id, info), image_id))
    return found


def _from_plain_folder(folder: Path, patients: Mapping[str, Any]) -> list[FinetuneSample]:
    table_path = folder / "labels" / "labels.json"
    if not table_path.exists():
        raise DataError(f"{table_path} is missing; write the names by mask value there, as {{'1': 'liver'}}")
    table = json.loads(table_path.read_text(encoding="utf-8"))
    found = []
    for image in sorted(path for path in folder.iterdir() if path.name.endswith(_IMAGE_SUFFIXES)):
        image_id = image.name[: -len(next(s for s in _IMAGE_SUFFIXES if image.name.endswith(s)))]
        mask = next((m for m in (folder / "labels" / f"{image_id}{s}" for s in _IMAGE_SUFFIXES) if m.exists()), None)
        if mask is None:
            continue
        entry = table.get(image_id, table)
        names = {int(value): str(name) for value, name in entry.items() if str(value).isdigit()}
        info = {"PatientID": patients[image_id]} if image_id in patients else None
        found.append(FinetuneSample(image, mask, names, patient_key(image_id, info), image_id))
    return found


def _load(sample: FinetuneSample) -> LoadedSample:
    volume = read_volume(sample.image)
    labels, grid = read_mask(sample.label)
    if not grid.matches(volume.geometry, tolerance_mm=0.5 * min(volume.geometry.spacing)):
        if grid.shape == volume.geometry.shape:
            raise VolumeError("label and image lie apart in space; export the label on the image's grid")
        labels, _ = read_mask(sample.label, volume.geometry)
    masks: dict[str, np.ndarray] = {}
    for value in sorted({int(v) for v in np.unique(labels)} - {0}):
        if value not in sample.names:
            raise DataError(f"mask value {value} has no name; submit the label with named segments")
        name = sample.names[value]
        masks[name] = masks[name] | (labels == value) if name in masks else labels == value
    if not masks:
        raise DataError("the label is empty; submit a label with at least one voxel")
    return LoadedSample(sample, LabelledCase(sample.id, volume, masks))
