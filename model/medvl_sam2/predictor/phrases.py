"""From what an annotator types to what the language model was trained to read."""

from __future__ import annotations

import re

from medvl_sam2.errors import PromptError
from medvl_sam2.modeling.prompts import REPORT_PROMPTS, format_choices, segment_prompt
from medvl_sam2.vocabulary import CLASSES, spoken

REPORT_REQUEST = REPORT_PROMPTS[0]
"""The wording that asks for a report."""

MAX_CHARACTERS = 2_000
"""Longer prompts are refused: nobody refers to one object in more words, and a paste error would stall everyone."""

_REQUEST = re.compile(r"^(please\s+)?(segment|outline|find|show|where|mark|label|delineate|contour)\b", re.IGNORECASE)
_VERB = "is|are|was|were|does|do|did|has|have|can"
_YES_OR_NO = re.compile(rf"^({_VERB})\b(?!.*\bor\b)", re.IGNORECASE)
_QUESTION = re.compile(
    rf"^({_VERB}|((in|on|at|of|from|to) )?(which|what|whose)|where|how|when|who|why)\b", re.IGNORECASE
)
_CHOICES = re.compile(r"\s+choices:\s*", re.IGNORECASE)
_ORGAN = "(?:" + "|".join(re.escape(spoken(name)) for name in CLASSES if name != "lesion") + ")"
_INSIDE = re.compile(
    r"\b(?:in|inside|within)\s+(?:the\s+)?(?:(?:\w+\s+){1,3}of\s+(?:the\s+)?)?"
    rf"({_ORGAN}(?:\s*(?:,|\band\b|\bor\b)\s*(?:and\s+)?(?:the\s+)?{_ORGAN})*)$"
)
"""A place at the end of a phrase, in whole: whatever else is said of the organ may name a neighbour."""
_FILLER = re.compile(
    r"^(please\s+)?((segment|outline|find|show me|show|mark|label|delineate|contour|where (is|are))\s+)?"
    r"((the|a|an|all)\s+)?",
    re.IGNORECASE,
)


def checked(text: str, what: str) -> str:
    """Collapsed text; raises :class:`PromptError` when it is empty or longer than :data:`MAX_CHARACTERS`."""
    if len(text) > MAX_CHARACTERS:
        raise PromptError(f"the {what} has {len(text)} characters; at most {MAX_CHARACTERS} are read: shorten it")
    plain = " ".join(text.split())
    if not plain:
        raise PromptError(f"the {what} is empty; type some words")
    return plain


def spoken_request(text: str) -> str:
    """A request as it is, a bare phrase turned into one; class names in snake case are spoken."""
    plain = checked(text, "prompt")
    if plain in CLASSES:
        plain = spoken(plain)
    if _REQUEST.match(plain):
        return plain
    return segment_prompt([re.sub(r"^the\s+", "", plain.rstrip("."), flags=re.IGNORECASE)])


def trained_question(text: str) -> str:
    """A question, however it was typed, as the model was trained to read it: capital first, small letters, an end mark.

    One to be answered yes or no has these choices named; choices that stand in it stay as they are.
    """
    words, *choices = _CHOICES.split(" ".join(text.split()), maxsplit=1)
    if words.isupper() or words.istitle():  # all one typed in capitals; "CT" in other words stays
        words = words.lower()
    words = words[:1].upper() + words[1:]
    bare = words.rstrip(" ?!.,;:")
    if _QUESTION.match(words):
        words = f"{bare}?"
    elif bare == words:  # the end mark alone changed what a report said
        words = f"{bare}."
    if choices:
        return f"{words} Choices: {choices[0]}"
    return format_choices(words, ("yes", "no")) if _YES_OR_NO.match(words) else words


def asks_for_several(text: str) -> bool:
    """Whether a phrase means several objects ("all lesions", "the cysts in the liver"), so that every part counts."""
    return re.search(r"\b(all|both|every|lesions|cysts|nodules|metastases|tumou?rs)\b", text, re.IGNORECASE) is not None


def organs_within(text: str) -> tuple[str, ...]:
    """The organ classes that something is said to lie in ("the cyst in the upper pole of the right kidney").

    Empty unless the phrase ends with a place of that form and nothing but vocabulary organs: of "the liver and kidneys"
    or "the lung touching the heart" nothing is concluded.
    """
    place = _INSIDE.search(" ".join(text.lower().split()).strip(" .?!"))
    if place is None:
        return ()
    return tuple(name for name in CLASSES if re.search(rf"\b{re.escape(spoken(name))}\b", place[1]))


def vocabulary_matches(text: str) -> tuple[str, ...]:
    """The classes whose plain names the text is ("the right kidney", "liver and spleen"); empty when it says more."""
    bare = _FILLER.sub("", " ".join(text.lower().split())).strip(" .?!")
    parts = [re.sub(r"^(the|a|an)\s+", "", part.strip()) for part in re.split(r",\s*(?:and\s+)?|\s+and\s+", bare)]
    found = [next((n for n in CLASSES if part in (n, spoken(n), n.replace("_", " "))), None) for part in parts]
    names = tuple(name for name in found if name is not None)
    return tuple(dict.fromkeys(names)) if len(names) == len(parts) else ()


def short_name(text: str) -> str:
    """A segment name of at most 40 characters from free text."""
    bare = _FILLER.sub("", " ".join(text.split())).strip(" .?!") or "object"
    name = re.sub(r"[^0-9A-Za-z]+", "_", bare).strip("_").lower()
    return name[:40].rstrip("_") or "object"
