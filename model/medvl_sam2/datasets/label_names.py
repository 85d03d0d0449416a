"""One name a structure: TotalSegmentator's where it has one, else the source's words in snake case.

A side is only ever moved within the name (``right kidney`` to ``kidney_right``), never exchanged or guessed.
"""

from __future__ import annotations

import re

_WORDS = {
    "tumor": "tumour",
    "tumors": "tumour",
    "tumours": "tumour",
    "cancer": "tumour",
    "kyst": "cyst",
    "kyste": "cyst",
}
_ALIASES = {
    "atrium": "heart_atrium",
    "bladder": "urinary_bladder",
    "colon_tumour_primaries": "colon_tumour",
    "gall_bladder": "gallbladder",
    "oesophagus": "esophagus",
    "postcava": "inferior_vena_cava",
    "prostate_uterus": "prostate_or_uterus",
    "small_intestin": "small_bowel",
    "small_intestine": "small_bowel",
    "suprarenal_gland": "adrenal_gland",
    "suprarenal_tumour": "adrenal_tumour",
    "thyroid": "thyroid_gland",
}
_SIDES = ("left", "right")
_VERTEBRA = re.compile(r"(?:cervical_spine|thoracic_spine|lumbar_spine|vertebrae|vertebra)_([ctls]\d{1,2})")


def label_name(text: str) -> str:
    """A source's label as a structure name.

    ``Right Kidney``: ``kidney_right``; ``vertebrae C1``: ``vertebrae_C1``; ``postcava``: ``inferior_vena_cava``;
    ``kidney tumor``: ``kidney_tumour``; an empty or unspeakable label: an empty name.
    """
    words = [_WORDS.get(word, word) for word in re.findall(r"[a-z0-9]+", text.lower())]
    side = ""
    if len(words) > 1 and words[0] in _SIDES:
        side = words.pop(0)
    elif len(words) > 1 and words[-1] in _SIDES:
        side = words.pop()
    name = "_".join(words)
    name = _ALIASES.get(name, name)
    vertebra = _VERTEBRA.fullmatch(name)
    if vertebra:
        name = f"vertebrae_{vertebra.group(1).upper()}"
    return f"{name}_{side}" if side else name


def opposite_side(name: str) -> str | None:
    """The same structure on the other side: ``rib_left_1`` to ``rib_right_1``; None for a name without one side."""
    words = name.split("_")
    sided = [n for n, word in enumerate(words) if word in _SIDES]
    if len(sided) != 1:
        return None
    words[sided[0]] = _SIDES[1 - _SIDES.index(words[sided[0]])]
    return "_".join(words)
