"""Which structures a text speaks of: organs with their exact side, and lesions with the organ they are said to lie in.

Plain patterns over the vocabulary, no model: what is not recognised is left out rather than guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from medvl_sam2.vocabulary import CLASSES, spoken

PAIRS = ("kidney", "lung")
"""Organs of two sides."""

_SYNONYMS = {
    "gall bladder": "gallbladder", "bladder": "urinary_bladder", "spine": "vertebrae", "vertebra": "vertebrae",
    "large bowel": "colon", "vena cava": "inferior_vena_cava",
}  # fmt: skip
_ADJECTIVES = {
    "hepatic": "liver", "splenic": "spleen", "pancreatic": "pancreas", "renal": "kidney", "pulmonary": "lung",
}  # fmt: skip
"""Only before a word for a lesion: the splenic vein is not the spleen."""
_LESION = r"(?:(?:hypodense|hyperdense)\s+)?(?:lesion|cyst|nodule|mass|tumou?r|metastas[ie]s|finding)(?:es|s)?"
_SINGLE = {spoken(name): name for name in CLASSES if name != "lesion" and not name.startswith(PAIRS)} | _SYNONYMS
_SIDES = r"right and left|left and right|both|bilateral|right|left"
_ORGAN = re.compile(
    rf"\b(?:(?:(?P<side>{_SIDES})\s+)?(?:(?P<pair>{'|'.join(PAIRS)})s?(?:\s+on\s+the\s+(?P<after>right|left))?"
    rf"|(?P<adjective>{'|'.join(_ADJECTIVES)})(?=\s+{_LESION}\b))"
    rf"|(?P<single>{'|'.join(sorted(map(re.escape, _SINGLE), key=len, reverse=True))}))\b",
    re.IGNORECASE,
)
_LESIONS = re.compile(rf"\b(?:(?P<extreme>largest|smallest|biggest)\s+)?(?P<kind>{_LESION})\b", re.IGNORECASE)
_PART = re.compile(r"((?:\w+\s+){1,2}of\s+(?:the\s+)?)$")
_DENIED = re.compile(r"\b(?:no|none|not|without|normal|free of|unremarkable|absent|removed|nothing)\b", re.IGNORECASE)
_ABSENT = re.compile(r"\b(?:absent|removed|not (?:seen|visible|present))\b", re.IGNORECASE)
_CLAUSE = re.compile(
    r";|\b(?:but|however|while|whereas)\b|\s(?=without\b)|(?:,|\band\b)\s+(?=(?:absent|no)\b)", re.IGNORECASE
)
"""What is denied in one clause is not denied in the next: "a cyst in the liver and absent spleen"."""
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])|\n+")
_CHOICES = re.compile(r"\bchoices:.*", re.IGNORECASE | re.DOTALL)
_LETTER = re.compile(r"^[A-H]\.\s+")
_THOUSANDS = r"[1-9]\d{0,2}(?:,\d{3})+(?!\d)"
"""Commas of an English report: 1,200 is twelve hundred, but 1,2 and 0,125 are decimal numbers."""
_NUMBER = rf"(?<!\d)(?:{_THOUSANDS}(?:\.\d+)?|\d+(?:[.,]\d+)?)"
_FACTOR = re.compile(rf"({_NUMBER})[\s-]*(cm|mm)?", re.IGNORECASE)
_SIZE = re.compile(
    rf"(?:{_NUMBER}(?:[\s-]*(?:cm|mm))?\s*(?:x|×|by|to|-|–)\s*)*{_NUMBER}[\s-]*(?:cm|mm)\b", re.IGNORECASE
)  # fmt: skip
_BEFORE = re.compile(r"[\s-]*(?:(?!(?:with|and|contains|has|shows)\b)[a-z-]+\s+){0,2}", re.IGNORECASE)
"""Between a size and the word for what has it: "2.5 cm round cyst"."""
_DISTANCE = re.compile(
    r"[\s-]*(?:(?:anterior|posterior|superior|inferior|cranial|caudal|medial|lateral)\s+)?"
    r"(?:from|to|above|below|away|apart|slices?|sections?|thick)\b(?!-)",
    re.IGNORECASE,
)
"""After a length that is no size: "15 mm from the gallbladder", "on 5 mm slices"."""
_DISTANCE_OF = re.compile(r"\b(?:slices?|sections?|thickness|distance|within)\s+(?:of\s+)?$", re.IGNORECASE)
"""Before one: "at a distance of 15 mm"."""
_BESIDE = re.compile(r"\b(?:from|to|above|below|near|beside|behind|touching)\s+(?:the\s+)?$", re.IGNORECASE)
"""Before an organ that is only a neighbour, where another one is named, too."""
_MANY = re.compile(r"\b(?:how many|all|both|every|several|two|three|four)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Mention:
    """A structure that is spoken of.

    ``organs``: class names, more than one where the text leaves the side open. ``lesion``: the words that mean a lesion
    in them ("largest cyst in the upper pole of the right kidney"), empty where the organs themselves are meant.
    ``size_mm``: the diameter that the lesion is said to have, the largest of several; None where none is stated.
    """

    organs: tuple[str, ...]
    lesion: str = ""
    several: bool = False
    absent: bool = False
    size_mm: float | None = None


def sentences(text: str) -> list[str]:
    """A text's sentences; the point in "2.5 cm" ends none."""
    return [part.strip() for part in _SENTENCE.split(text) if part.strip()]


def mentions(sentence: str) -> list[Mention]:
    """What one sentence of a report speaks of, each once: lesions first, then organs."""
    found = [mention for clause in _CLAUSE.split(sentence) for mention in _clause_mentions(clause)]
    return sorted(dict.fromkeys(found), key=lambda mention: not mention.lesion)


def answer_mentions(question: str, answer: str) -> list[Mention]:
    """What an answer speaks of, its question read along: "yes" means what was asked.

    The choices that a question offers are not what it is about. A side as an answer keeps that side of the lesion only.
    """
    asked, said = _CHOICES.sub("", question), _LETTER.sub("", answer.strip())
    own, context = mentions(said), mentions(asked)
    organs = [m for m in [*own, *context] if not m.lesion]
    if _ABSENT.search(asked):
        return [Mention(m.organs, absent=True) for m in organs]
    if _DENIED.match(said):
        return list(dict.fromkeys(organs))
    lesions = [m for m in own if m.lesion]
    if not any(m.organs for m in lesions):
        places, many = tuple(name for m in own for name in m.organs), _MANY.search(asked) is not None
        meant = [replace(m, organs=places or m.organs, several=many or m.several) for m in context if m.lesion]
        lesions = meant or lesions
    side = re.fullmatch(r"(?:on the )?(left|right)(?: side)?\.?", said, re.IGNORECASE)
    if side:
        sided = tuple(f"{pair}_{side[1].lower()}" for pair in PAIRS)
        lesions = [replace(m, organs=sided) for m in lesions]
    return list(dict.fromkeys([*lesions, *organs]))


def _clause_mentions(clause: str) -> Iterator[Mention]:
    organs = list(_ORGAN.finditer(clause))
    kinds = list(_LESIONS.finditer(clause))
    absent = _ABSENT.search(clause) is not None
    if kinds and not _DENIED.search(clause):
        for number, kind in enumerate(kinds):
            earlier = kinds[number - 1].end() if number else 0
            later = kinds[number + 1].start() if number + 1 < len(kinds) else len(clause)
            own = [o for o in organs if len(kinds) == 1 or kind.start() <= o.start() < later or _described(o, kind)]
            own = [o for o in own if not _BESIDE.search(clause[: o.start()])] or own
            size_mm = _size_mm(clause[earlier : kind.start()], clause[kind.end() : later], number + 1 < len(kinds))
            yield from (replace(said, size_mm=size_mm) for said in _lesion_mentions(clause, kind, own))
    for organ in organs:
        yield from (Mention((name,), absent=absent) for name in _names(organ))


def _described(organ: re.Match[str], kind: re.Match[str]) -> bool:
    """Whether an organ's adjective stands before this word for a lesion ("renal cyst")."""
    return bool(organ["adjective"]) and 0 <= kind.start() - organ.end() <= 1


def _lesion_mentions(clause: str, kind: re.Match[str], organs: list[re.Match[str]]) -> Iterator[Mention]:
    words = f"{kind['extreme'] or ''} {kind['kind']}".strip().lower()
    several = not kind["extreme"] and words.endswith(("s", "metastases")) and not words.endswith(("mass", "metastasis"))
    if not organs:
        yield Mention((), words, several)
    for organ in organs:
        part = _PART.search(clause[: organ.start()])
        names = _names(organ)
        organ_words = " and ".join(spoken(name) for name in names)
        yield Mention(names, f"{words} in the {part[1].lower() if part else ''}{organ_words}", several or _both(organ))


def _size_mm(before: str, after: str, followed: bool) -> float | None:
    """The size of the lesion between two pieces of text; ``followed`` by another, whose own size may stand there."""
    sizes = [size[0] for size in _sizes(before) if _BEFORE.fullmatch(before[size.end() :])]
    sizes += [size[0] for size in _sizes(after) if not (followed and _BEFORE.fullmatch(after[size.end() :]))]
    return _largest_mm(sizes[0]) if sizes else None


def _sizes(text: str) -> Iterator[re.Match[str]]:
    for size in _SIZE.finditer(text):
        if not (_DISTANCE.match(text, size.end()) or _DISTANCE_OF.search(text[: size.start()])):
            yield size


def _largest_mm(size: str) -> float:
    """The largest number of "1.2 x 1.7 cm"; one without a unit has that of the next."""
    largest, scale = 0.0, 1.0
    for number, unit in reversed(_FACTOR.findall(size)):
        scale = {"cm": 10.0, "mm": 1.0}.get(unit.lower(), scale)
        plain = number.replace(",", "" if re.match(_THOUSANDS, number) else ".")
        largest = max(largest, scale * float(plain))
    return largest


def _both(organ: re.Match[str]) -> bool:
    return (organ["side"] or "").lower() not in ("", "left", "right")


def _names(organ: re.Match[str]) -> tuple[str, ...]:
    """Classes that a match means: both of a pair unless one side is named."""
    if organ["single"]:
        return (_SINGLE[organ["single"].lower()],)
    stem = _ADJECTIVES[organ["adjective"].lower()] if organ["adjective"] else organ["pair"].lower()
    if stem not in PAIRS:
        return (stem,)
    side = (organ["side"] or organ["after"] or "").lower()
    return (f"{stem}_{side}",) if side in ("left", "right") else (f"{stem}_right", f"{stem}_left")
