"""Real volumes with masks: which may be trained on, which stay unseen, and how their folders are read.

The unit of a split is the patient. Two listed volumes of one patient carry the same ``patient``; the tables below keep
the two lists apart by patient and a test holds them to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medvl_sam2.errors import DataError
from medvl_sam2.geometry import resample_to
from medvl_sam2.types import Modality, Volume
from medvl_sam2.vocabulary import CLASSES, merge_class
from medvl_sam2.volume_io import read_mask, read_volume

MODEL_OUTPUT = "output of another model, not manual"
MANUAL = "manual or semi-automatic"

_LESION_NAMES = ("tumour", "lesion", "nodule", "gtv")
_EVERY_ORGAN = frozenset(CLASSES) - {"lesion"}


@dataclass(frozen=True)
class MaskFile:
    """One mask file of a case: ``names`` maps its values to structure names (None: take ``labels.json``)."""

    path: str
    names: Mapping[int, str] | None = None


@dataclass(frozen=True)
class RealSource:
    """Where a case lies below the data folder and what its labels mean.

    ``known``: vocabulary classes whose absence from the masks means absence from the image; ``partial``: structure
    names that cover only part of their vocabulary class (one labelled vertebra of many), never used as that class.
    """

    name: str
    folder: str
    image: str
    masks: tuple[MaskFile, ...]
    patient: str
    label_origin: str
    modality: Modality | None = None
    known: frozenset[str] = frozenset()
    partial: frozenset[str] = frozenset()


@dataclass(frozen=True)
class RealCase:
    """A volume with named bool masks (I, J, K) on its stored grid, as they are labelled (not merged to classes)."""

    source: RealSource
    volume: Volume
    masks: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The case's name."""
        return self.source.name

    def classes(self) -> dict[str, np.ndarray]:
        """Masks merged to the vocabulary, complete classes only: lobes to lungs, single vertebrae to ``vertebrae``."""
        merged: dict[str, np.ndarray] = {}
        for name, mask in self.masks.items():
            target = vocabulary_class(name)
            if target is None or name in self.source.partial:
                continue
            merged[target] = mask if target not in merged else merged[target] | mask
        return merged

    def known_classes(self) -> list[str]:
        """Vocabulary classes decided in this case, in vocabulary order: present ones, and ones known to be absent."""
        known = self.source.known | set(self.classes())
        return [name for name in CLASSES if name in known]


def structure_name(label: str) -> str:
    """A label as a snake-case name: ``GTV_Mass (soft tissue sarcoma)`` becomes ``GTV_Mass``."""
    plain = re.sub(r"\(.*?\)|>=.*", "", label)
    return re.sub(r"[^A-Za-z0-9]+", "_", re.sub(r"^\d+\s+", "", plain.strip())).strip("_")


def vocabulary_class(name: str) -> str | None:
    """Vocabulary class of a structure name, or None. Tumours, nodules and target volumes are ``lesion``."""
    if any(word in name.lower().split("_") for word in _LESION_NAMES):
        return "lesion"
    merged = merge_class({"spine": "vertebrae"}.get(name, name))
    return merged if merged in CLASSES else None


def load_case(data: Path, source: RealSource) -> RealCase:
    """Read one case below the folder ``data``; masks are placed on the image's grid by their affines.

    Raises :class:`DataError` when a file is missing or when no mask has a voxel inside the image.
    """
    folder = Path(data) / source.folder
    image = folder / source.image
    if not image.exists():
        raise DataError(f"case {source.name!r} lacks {image}; point --real at the folder with the real volumes")
    volume = read_volume(image)
    if source.modality is not None and source.modality is not volume.modality:
        volume = Volume(volume.array, volume.geometry, source.modality, volume.source)
    masks: dict[str, np.ndarray] = {}
    for entry in source.masks:
        for name, mask in _read_masks(folder, entry, volume).items():
            masks[name] = masks[name] | mask if name in masks else mask
    if not masks:
        raise DataError(f"case {source.name!r} has no mask with a voxel inside the image; check {folder}")
    return RealCase(source, volume, masks)


def load_cases(data: Path, sources: Sequence[RealSource]) -> Iterator[RealCase]:
    """Cases of ``sources`` that exist below ``data``, one by one; none at all raises :class:`DataError`."""
    present = [source for source in sources if (Path(data) / source.folder).is_dir()]
    if not present:
        names = ", ".join(source.folder for source in sources)
        raise DataError(f"{data} holds none of the real cases ({names}); give the folder that contains them")
    for source in present:
        yield load_case(data, source)


def _read_masks(folder: Path, entry: MaskFile, volume: Volume) -> dict[str, np.ndarray]:
    """Non-empty masks of one file, by structure name, on the image's grid."""
    path = folder / entry.path
    if not path.exists():
        raise DataError(f"mask {path} is missing; restore it or take the case out of the list")
    labels, geometry = read_mask(path)
    if not geometry.matches(volume.geometry):
        labels = resample_to(labels, geometry, volume.geometry, nearest=True)
    names = entry.names
    if names is None:
        table = json.loads((folder / "labels.json").read_text())
        names = {int(value): label for value, label in table.items() if value.isdigit()}
    present = set(np.unique(labels).tolist())
    return {structure_name(label): labels == value for value, label in names.items() if value in present}


def _single(path: str, name: str) -> MaskFile:
    return MaskFile(path, {1: name})


_AORTIC_MASKS = (
    "aorta",
    "aorta_true_lumen",
    "aorta_false_lumen",
    "brachiocephalic_trunk",
    "celiac_trunk",
    "common_carotid_artery_left",
    "subclavian_artery_left",
    "superior_mesenteric_artery",
    "vertebrae_T12",
)
_THORAX_PATIENT = "ts-thorax"
_STS_PATIENT = "sts-001"


def _hippocampus(number: str) -> RealSource:
    return RealSource(
        f"msd_hippocampus_{number}",
        "msd_hippocampus_001_003_004_006",
        f"{number}_mr.nii.gz",
        (MaskFile(f"{number}_seg.nii.gz"),),
        f"hippocampus-{number}",
        MANUAL,
        Modality.MR,
    )


def _deeplesion(name: str, patient: str) -> RealSource:
    return RealSource(
        f"deeplesion_{name}",
        f"deeplesion_{name}",
        "ct_windowed.nii.gz",
        (_single("seg_lesion.nii.gz", "lesion"),),
        f"deeplesion-{patient}",
        "model-assisted from RECIST marks",
        Modality.OTHER,  # 8-bit windowed, not Hounsfield units
    )


TRAINABLE_REAL: tuple[RealSource, ...] = (
    RealSource(
        "ts_ct_wholeabdomen_3mm",
        "ts_ct_wholeabdomen_3mm",
        "ct.nii.gz",
        (MaskFile("seg_total_fast.nii.gz"),),
        "ts-abdomen",
        MODEL_OUTPUT,
        Modality.CT,
        known=_EVERY_ORGAN,
    ),
    RealSource(
        "ts_ct_aortic_dissection_1p5mm",
        "ts_ct_aortic_dissection_1p5mm",
        "ct.nii.gz",
        tuple(_single(f"masks/{name}.nii.gz", name) for name in _AORTIC_MASKS),
        _THORAX_PATIENT,
        MODEL_OUTPUT,
        Modality.CT,
        partial=frozenset({"vertebrae_T12"}),
    ),
    RealSource(
        "ts_ct_pulmonary_1p5mm",
        "ts_ct_pulmonary_1p5mm",
        "ct.nii.gz",
        (_single("masks/pulmonary_artery.nii.gz", "pulmonary_artery"),),
        _THORAX_PATIENT,
        MODEL_OUTPUT,
        Modality.CT,
    ),
    RealSource(
        "ts_mr_abdomen_slab_3mm",
        "ts_mr_abdomen_slab_3mm",
        "mr.nii.gz",
        (MaskFile("seg_total_mr.nii.gz"),),
        "ts-mr",
        MODEL_OUTPUT,
        Modality.MR,
        known=_EVERY_ORGAN,
    ),
    *(_hippocampus(number) for number in ("001", "003", "004", "006")),
    RealSource(
        "tptbox_ct_L3_patch",
        "tptbox_ct_L3_patch",
        "ct.nii.gz",
        (
            MaskFile("seg_vertebra_instances.nii.gz", {21: "vertebrae_L2", 22: "vertebrae_L3", 23: "vertebrae_L4"}),
            MaskFile("seg_subregions.nii.gz"),
        ),
        "tptbox",
        "not stated",
        Modality.CT,
    ),
    RealSource(
        "pyradiomics_brain1",
        "pyradiomics_brain1",
        "mr.nrrd",
        (_single("seg_tumour.nrrd", "tumour"),),
        "pyradiomics-brain1",
        "not stated",
        Modality.MR,
    ),
    _deeplesion("000001_02_01_008-023", "000001"),
    _deeplesion("000002_03_01_035-047", "000002"),
    _deeplesion("000009_03_01_036-048", "000009"),
)
"""Real cases that may be trained on. ``ts_ct_abdomen_slab_3mm`` is left out: the whole abdomen contains its voxels."""

UNSEEN_REAL: tuple[RealSource, ...] = (
    RealSource(
        "ts_ct_dicom20",
        "ts_ct_dicom20",
        "dicom",
        (MaskFile("seg_total_fast.nii.gz"),),
        "ts-dicom20",
        MODEL_OUTPUT,
        Modality.CT,
        known=_EVERY_ORGAN,
    ),
    RealSource(
        "msd_spleen2_crop",
        "msd_spleen2_crop",
        "ct.nii.gz",
        (_single("seg_spleen.nii.gz", "spleen"),),
        "msd-spleen2",
        MANUAL,
        Modality.CT,
    ),
    RealSource(
        "lidc_0001_nodule",
        "lidc_0001_nodule",
        "dicom.zip",
        (_single("seg_2of4.nii.gz", "lung nodule"),),
        "lidc-0001",
        "two of four radiologists",
        Modality.CT,
    ),
    RealSource(
        "sts001_ct_gtv",
        "sts001_ct_gtv",
        "ct.nii.gz",
        (_single("seg_gtv.nii.gz", "GTV_Mass"),),
        _STS_PATIENT,
        MANUAL,
        Modality.CT,
    ),
    RealSource(
        "sts001_mr_t1_gtv",
        "sts001_mr_t1_gtv",
        "mr_t1.nii.gz",
        (_single("seg_gtv.nii.gz", "GTV_Mass"),),
        _STS_PATIENT,
        MANUAL,
        Modality.MR,
    ),
    RealSource(
        "dcmqi_ct3_dicomseg",
        "dcmqi_ct3_dicomseg",
        "dicom",
        (
            _single("liver_seg.nrrd", "liver"),
            MaskFile("spine_seg.nrrd", {2: "spine"}),
            MaskFile("heart_seg.nrrd", {3: "heart"}),
        ),
        "dcmqi-ct3",
        MANUAL,
        Modality.CT,
    ),
)
"""Real cases that are only ever evaluated on."""
