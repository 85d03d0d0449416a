"""Structures of the vocabulary as DICOM codes (SNOMED CT), and segments' names back to the vocabulary."""

from __future__ import annotations

import re
from typing import NamedTuple

from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from lib.dicom_objects import LONG_STRING
from medvl_sam2.vocabulary import CLASSES, merge_class, spoken

_LEFT = codes.SCT.Left
_RIGHT = codes.SCT.Right
_NAMELESS = re.compile(r"(segment([ _]*\d+)?|unknown|label[ _]*\d*|\d*)", re.IGNORECASE)


class StructureCode(NamedTuple):
    """Category (CID 7150) and type of a segmented structure, and its side where it is one of a pair."""

    category: Code
    kind: Code
    side: Code | None = None


_ORGANS: dict[str, tuple[Code, Code | None]] = {
    "spleen": (codes.SCT.Spleen, None),
    "kidney_right": (codes.SCT.Kidney, _RIGHT),
    "kidney_left": (codes.SCT.Kidney, _LEFT),
    "gallbladder": (codes.SCT.Gallbladder, None),
    "liver": (codes.SCT.Liver, None),
    "stomach": (codes.SCT.Stomach, None),
    "pancreas": (codes.SCT.Pancreas, None),
    "lung_right": (codes.SCT.Lung, _RIGHT),
    "lung_left": (codes.SCT.Lung, _LEFT),
    "heart": (codes.SCT.Heart, None),
    "aorta": (codes.SCT.Aorta, None),
    "inferior_vena_cava": (codes.SCT.InferiorVenaCava, None),
    "vertebrae": (codes.SCT.Vertebra, None),
    "spinal_cord": (codes.SCT.SpinalCord, None),
    "colon": (codes.SCT.Colon, None),
    "urinary_bladder": (codes.SCT.Bladder, None),
}
_CODES = {
    **{name: StructureCode(codes.cid7150.AnatomicalStructure, *organ) for name, organ in _ORGANS.items()},
    "lesion": StructureCode(codes.cid7150.MorphologicallyAbnormalStructure, codes.SCT.Lesion),
}
_GENERAL = StructureCode(codes.cid7150.Tissue, codes.SCT.Tissue)
_SPOKEN = {spoken(name): name for name in CLASSES}


def structure_code(name: str) -> StructureCode:
    """Codes of a structure; a name outside the vocabulary is "Tissue", as 3D Slicer codes a new segment."""
    return _CODES.get(structure_name(name), _GENERAL)


def structure_name(label: str) -> str:
    """A label as the vocabulary spells it (``Right kidney`` is ``kidney_right``), any other one as it is."""
    plain = " ".join(label.strip().lower().replace("_", " ").split())
    name = merge_class(plain.replace(" ", "_"))
    if name in CLASSES:
        return name
    return _SPOKEN.get(plain, label.strip())


def segment_name(segment: Dataset) -> str:
    """Name of a segment of a DICOM SEG: by its label, or by its codes where the label says nothing.

    A label cut to the 64 characters of DICOM continues in the segment's description.
    """
    label = str(segment.get("SegmentLabel") or "").strip()
    whole = str(segment.get("SegmentDescription") or "").strip()
    if len(label) == LONG_STRING and whole.startswith(label):
        label = whole
    if not _NAMELESS.fullmatch(label):
        return structure_name(label)
    return _name_by_codes(segment) or label or f"segment {segment.SegmentNumber}"


def _name_by_codes(segment: Dataset) -> str | None:
    kinds = segment.get("SegmentedPropertyTypeCodeSequence")
    if not kinds:
        return None
    modifiers = kinds[0].get("SegmentedPropertyTypeModifierCodeSequence") or []
    sides = {_as_code(item) for item in modifiers}
    for name, code in _CODES.items():
        if _as_code(kinds[0]) == code.kind and (code.side is None or code.side in sides):
            return name
    return None


def _as_code(item: Dataset) -> Code:
    """A code that compares equal across the old and the present SNOMED designators."""
    return Code(str(item.get("CodeValue", "")), str(item.get("CodingSchemeDesignator", "")), "")
