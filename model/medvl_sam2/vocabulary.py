"""The shipped class vocabulary: TotalSegmentator names in label order, plus ``lesion``.

Label values are contiguous 1..N without a background entry, as both OHIF and Slicer need.
"""

from __future__ import annotations

CLASSES: tuple[str, ...] = (
    "spleen",
    "kidney_right",
    "kidney_left",
    "gallbladder",
    "liver",
    "stomach",
    "pancreas",
    "lung_right",
    "lung_left",
    "heart",
    "aorta",
    "inferior_vena_cava",
    "vertebrae",
    "spinal_cord",
    "colon",
    "urinary_bladder",
    "lesion",
)
"""``CLASSES[n - 1]`` is mask value ``n``."""

_MERGED_PREFIXES: tuple[tuple[str, str], ...] = (
    ("vertebrae_", "vertebrae"),
    ("lung_upper_lobe_left", "lung_left"),
    ("lung_lower_lobe_left", "lung_left"),
    ("lung_upper_lobe_right", "lung_right"),
    ("lung_middle_lobe_right", "lung_right"),
    ("lung_lower_lobe_right", "lung_right"),
    ("heart_", "heart"),
)


def class_value(name: str) -> int | None:
    """Mask value 1..N of a class name, or None when the vocabulary lacks it."""
    return CLASSES.index(name) + 1 if name in CLASSES else None


def merge_class(name: str) -> str:
    """Map a TotalSegmentator name to the vocabulary (lobes to lungs, single vertebrae to ``vertebrae``)."""
    for prefix, merged in _MERGED_PREFIXES:
        if name.startswith(prefix):
            return merged
    return name


def spoken(name: str) -> str:
    """Class name as a person says it: ``kidney_right`` becomes ``right kidney``."""
    words = name.split("_")
    if words[-1] in ("left", "right"):
        words = [words[-1], *words[:-1]]
    return " ".join(words)
