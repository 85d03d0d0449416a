"""Report and referring sentences written from the ground truth, and the parser that reads findings back.

The wording is small and steady on purpose: the language model has a few million parameters. Everything said here is
true of the voxels; a structure that is hardly in view is not mentioned.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from medvl_sam2.synthesis.findings import KINDS
from medvl_sam2.synthesis.questions import Facts, write_questions
from medvl_sam2.synthesis.records import QA, Finding, Referring
from medvl_sam2.vocabulary import CLASSES, spoken

REPORTED: tuple[str, ...] = (
    "liver", "gallbladder", "spleen", "pancreas", "kidney_right", "kidney_left", "lung_right", "lung_left",
    "urinary_bladder",
)  # fmt: skip
"""Organs a report speaks of, in its order."""

_LEAST_MM3 = {"gallbladder": 4e3, "pancreas": 12e3, "urinary_bladder": 15e3, "lung_right": 150e3, "lung_left": 150e3}
_LEAST_VOXELS = 60

PARAPHRASES: dict[str, tuple[str, ...]] = {
    "spleen": ("the organ on the left behind the stomach", "the lymphatic organ in the left upper abdomen"),
    "kidney_right": ("the kidney on the right side", "the right renal organ", "the kidney below the liver"),
    "kidney_left": ("the kidney on the left side", "the left renal organ", "the kidney below the spleen"),
    "gallbladder": ("the organ storing bile", "the small bag of bile below the liver"),
    "liver": ("the large organ in the right upper abdomen", "the organ making bile"),
    "stomach": ("the organ where food is digested first", "the hollow organ in the left upper abdomen"),
    "pancreas": ("the gland making insulin", "the gland behind the stomach"),
    "lung_right": ("the lung on the right side", "the right organ of breathing"),
    "lung_left": ("the lung on the left side", "the left organ of breathing"),
    "heart": ("the organ pumping blood", "the muscle between the lungs"),
    "aorta": ("the largest artery", "the main artery of the body"),
    "inferior_vena_cava": ("the largest vein of the abdomen", "the vein right of the aorta"),
    "vertebrae": ("the spine", "the bones of the back"),
    "spinal_cord": ("the nerve cord in the spine", "the cord in the spinal canal"),
    "colon": ("the large bowel", "the large intestine"),
    "urinary_bladder": ("the organ storing urine", "the bladder in the pelvis"),
}
"""Other ways to ask for a class; the first meaning of each is unique in the vocabulary."""

_REQUESTS = ("segment {}", "please segment {}", "show {}", "where is {}?", "outline {}", "find {}")
_PLURAL_REQUESTS = ("segment {}", "please segment {}", "show {}", "where are {}?", "outline {}", "find {}")


def write_texts(
    rng: np.random.Generator,
    organs: np.ndarray,
    lesions: np.ndarray,
    spacing: tuple[float, float, float],
    phase: str,
    region: str,
    removed: tuple[str, ...],
    findings: tuple[Finding, ...],
) -> tuple[str, tuple[QA, ...], tuple[Referring, ...]]:
    """Report, questions and referring sentences of one study from its ground truth arrays (Z, Y, X)."""
    counts = np.bincount(organs.ravel(), minlength=len(CLASSES) + 1)
    voxel = float(np.prod(spacing))
    visible = tuple(name for n, name in enumerate(CLASSES, 1) if counts[n] >= _LEAST_VOXELS)
    shown = tuple(n for n in visible if counts[CLASSES.index(n) + 1] * voxel >= _LEAST_MM3.get(n, 25e3))
    report = write_report(rng, phase, region, shown, removed, findings)
    present = tuple(name for n, name in enumerate(CLASSES, 1) if counts[n] > 0)
    facts = Facts(phase, region, shown, present, removed, findings)
    return report, write_questions(rng, facts), write_referring(rng, visible, findings)


def listed(items: Sequence[str]) -> str:
    """``a``, ``a and b`` or ``a, b and c``."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def spoken_size(diameter_mm: float) -> str:
    """Diameter in cm, rounded to half a centimetre: ``2.5 cm``."""
    return f"{max(0.5, round(diameter_mm / 5) * 0.5):.1f} cm"


def finding_phrase(finding: Finding) -> str:
    """``cyst in the right kidney``."""
    return f"{finding.kind} in the {spoken(finding.organ)}"


def write_report(
    rng: np.random.Generator,
    phase: str,
    region: str,
    shown: Sequence[str],
    removed: Sequence[str],
    findings: Sequence[Finding],
) -> str:
    """A short report: technique, findings largest first, removed organs, normal organs, impression."""
    form = int(rng.integers(3))
    sentences = [(f"CT of the {region}, {phase} phase.", f"{phase.capitalize()} CT of the {region}.",
                  f"CT of the {region} in the {phase} phase.")[form]]  # fmt: skip
    for f in sorted(findings, key=lambda f: -f.diameter_mm):
        size = spoken_size(f.diameter_mm)
        sentences.append(
            (f"There is a {size} {f.kind} in the {f.location}.", f"A {f.kind} of {size} lies in the {f.location}.",
             f"The {f.location} contains a {f.kind} of {size}.")[int(rng.integers(3))]
        )  # fmt: skip
    for name in removed:
        sentences.append(f"The {spoken(name)} is absent.")
    ill = {f.organ for f in findings} | set(removed)
    normal = [spoken(name) for name in REPORTED if name in shown and name not in ill]
    if normal:
        verb = "is" if len(normal) == 1 else "are"
        sentences.append((f"The {listed(normal)} {verb} normal.", f"No lesion in the {listed(normal)}.")[form % 2])
    marks = [finding_phrase(f) for f in sorted(findings, key=lambda f: -f.diameter_mm)]
    marks = list(dict.fromkeys(marks)) + [f"absent {spoken(name)}" for name in removed]
    sentences.append(f"Impression: {listed(marks) if marks else 'no focal lesion'}.")
    return " ".join(sentences)


_ORGAN_PATTERN = re.compile(
    "|".join(re.escape(spoken(name)) for name in sorted(CLASSES[:-1], key=len, reverse=True)), re.IGNORECASE
)
_KIND_PATTERN = re.compile("|".join(re.escape(k) for k in sorted(KINDS, key=len, reverse=True)), re.IGNORECASE)
_BY_SPOKEN = {spoken(name): name for name in CLASSES}


def report_findings(text: str) -> set[tuple[str, str]]:
    """Read the findings back from a report: pairs (class name, kind), kind ``"absent"`` for a removed organ.

    Tolerant of word order and of broken sentences. The impression only counts when the body says nothing, so a
    report cannot earn a finding twice. A report without findings gives the empty set.
    """
    body, _, impression = text.partition("Impression:")
    return _read(body) or _read(impression)


def _read(text: str) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for sentence in re.split(r"\.(?!\d)|;|\n", text):
        if re.search(r"\bno (?:focal )?(?:lesion|cyst|nodule)|\bnormal\b|\bwithout\b", sentence, re.IGNORECASE):
            continue
        kinds = [(m.start(), m.group().lower()) for m in _KIND_PATTERN.finditer(sentence)]
        kinds += [(m.start(), "absent") for m in re.finditer(r"\babsent\b|\bremoved\b|\bnot seen\b", sentence, re.I)]
        organs = [(m.start(), _BY_SPOKEN[m.group().lower()]) for m in _ORGAN_PATTERN.finditer(sentence)]
        kinds.sort()
        if len(kinds) == 1:
            found |= {(name, kinds[0][1]) for _, name in organs}
            continue
        # "cyst in the liver and nodule in the left lung": an organ belongs to the last kind before it.
        for position, name in organs:
            before = [kind for start, kind in kinds if start < position]
            if before:
                found.add((name, before[-1]))
    return found


def write_referring(
    rng: np.random.Generator, visible: Sequence[str], findings: Sequence[Finding]
) -> tuple[Referring, ...]:
    """Every visible class by name, by paraphrase and as a request; lesions by organ, place, kind, size, and all."""
    out: list[Referring] = []
    for name in visible:
        value = (CLASSES.index(name) + 1,)
        forms = [f"the {spoken(name)}", *PARAPHRASES[name]]
        plural = name == "vertebrae"
        request = (_PLURAL_REQUESTS if plural else _REQUESTS)[rng.integers(6)]
        other = _REQUESTS[0].format(forms[1 + int(rng.integers(len(forms) - 1))])
        texts = [spoken(name), *forms, request.format(forms[0]), other]
        out += [Referring(text, "class", value, spoken(name)) for text in texts]
    for phrase, ids in _lesion_phrases(findings).items():
        plural = phrase.startswith("all") or len(ids) > 1
        request = (_PLURAL_REQUESTS if plural else _REQUESTS)[rng.integers(6)]
        out += [Referring(text, "lesion", ids, "lesion") for text in (phrase, request.format(phrase))]
    return tuple(out)


def _lesion_phrases(findings: Sequence[Finding]) -> dict[str, tuple[int, ...]]:
    """Phrases and the lesion ids they mean. A phrase in the singular always means exactly one lesion."""
    phrases: dict[str, tuple[int, ...]] = {}
    if not findings:
        return phrases
    everything = tuple(f.value for f in findings)
    phrases["all lesions"] = everything
    if len(findings) == 1:
        phrases["the lesion"] = everything
    _add_extremes(phrases, "", findings)
    places = [(f"in the {spoken(f.organ)}", [g for g in findings if g.organ == f.organ]) for f in findings]
    places += [(f"in the {f.location}", [g for g in findings if g.location == f.location]) for f in findings]
    for place, group in places:
        ids = tuple(g.value for g in group)
        phrases[f"the lesion {place}" if len(group) == 1 else f"the lesions {place}"] = ids
        _add_extremes(phrases, f" {place}", group)
        for kind in {g.kind for g in group}:
            same = tuple(g.value for g in group if g.kind == kind)
            if len(same) == 1:
                phrases[f"the {kind} {place}"] = same
    return dict(sorted(phrases.items()))


def _add_extremes(phrases: dict[str, tuple[int, ...]], place: str, group: Sequence[Finding]) -> None:
    """Largest and smallest lesion of a group, only when the difference can be seen."""
    order = sorted(group, key=lambda f: f.diameter_mm)
    if len(order) > 1 and order[-1].diameter_mm > 1.15 * order[-2].diameter_mm:
        phrases[f"the largest lesion{place}"] = (order[-1].value,)
    if len(order) > 1 and order[1].diameter_mm > 1.15 * order[0].diameter_mm:
        phrases[f"the smallest lesion{place}"] = (order[0].value,)
