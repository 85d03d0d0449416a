"""Question-answer pairs derived from the facts of a generated study, closed (with choices) and open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medvl_sam2.synthesis.findings import KINDS, LESION_ORGANS
from medvl_sam2.synthesis.organs import REMOVABLE
from medvl_sam2.synthesis.records import QA, Finding
from medvl_sam2.synthesis.tissues import PHASES
from medvl_sam2.synthesis.view import REGIONS
from medvl_sam2.vocabulary import spoken

QUESTION_KINDS: tuple[str, ...] = (
    "presence", "visibility", "location", "side", "kind", "phase", "absent organ", "region", "size", "count",
)  # fmt: skip
SIZE_BINS: tuple[tuple[str, float, float], ...] = (
    ("less than 2 cm", 0, 20), ("2 to 3 cm", 20, 30), ("more than 3 cm", 30, 1e3),
)  # fmt: skip
_SIZE_MARGIN_MM = 1.5
_COUNTS = ("none", "one", "two", "three")
_ASKED_VISIBLE = ("liver", "gallbladder", "spleen", "pancreas", "kidney_right", "kidney_left", "heart",
                  "urinary_bladder", "lung_left", "stomach")  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What is true of a study. ``shown``: classes well in view; ``present``: classes with any voxel at all."""

    phase: str
    region: str
    shown: tuple[str, ...]
    present: tuple[str, ...]
    removed: tuple[str, ...]
    findings: tuple[Finding, ...]


def write_questions(rng: np.random.Generator, facts: Facts) -> tuple[QA, ...]:
    """All questions of one study. Yes and no are balanced over a population of studies."""
    out = [
        _closed(rng, "Which contrast phase is this?", facts.phase, PHASES, "phase"),
        _closed(rng, "Which body region is covered?", facts.region, REGIONS, "region"),
        QA("Which contrast phase is this?", (), facts.phase, "phase"),
        QA("Which body region is covered?", (), facts.region, "region"),
    ]
    out += _presence(rng, facts)
    out += _visibility(rng, facts)
    out += _absent(rng, facts)
    if len(facts.findings) < len(_COUNTS):
        number = _COUNTS[len(facts.findings)]
        out.append(_closed(rng, "How many lesions are there?", number, _COUNTS, "count", shuffle=False))
        out.append(QA("How many lesions are there?", (), number, "count"))
    if facts.findings:
        out += _lesion_questions(rng, facts)
    return tuple(out)


def _closed(
    rng: np.random.Generator, question: str, answer: str, pool: Sequence[str], kind: str, shuffle: bool = True
) -> QA:
    """A closed question with at most four choices drawn from ``pool``, the answer among them."""
    others = [text for text in dict.fromkeys(pool) if text != answer]
    if shuffle:
        others = [others[n] for n in rng.permutation(len(others))][:3]
        choices = [answer, *others]
        choices = [choices[n] for n in rng.permutation(len(choices))]
    else:
        choices = list(pool)
    return QA(question, tuple(choices), f"{'ABCDEFGH'[choices.index(answer)]}. {answer}", kind)


def _yes_no(question: str, answer: bool, kind: str) -> QA:
    return QA(question, ("yes", "no"), "A. yes" if answer else "B. no", kind)


def _presence(rng: np.random.Generator, facts: Facts) -> list[QA]:
    """Is there a lesion in ...? Yes for every organ with one, and about as many of the healthy organs."""
    ill = list(dict.fromkeys(f.organ for f in facts.findings))
    healthy = [n for n in LESION_ORGANS if n in facts.shown and n not in ill]
    out = [_yes_no(f"Is there a lesion in the {spoken(name)}?", True, "presence") for name in ill]
    for index in rng.permutation(len(healthy))[:1]:
        out.append(_yes_no(f"Is there a lesion in the {spoken(healthy[index])}?", False, "presence"))
    return out


def _visibility(rng: np.random.Generator, facts: Facts) -> list[QA]:
    """One organ that is in the image and one that is not."""
    out = []
    seen = [n for n in _ASKED_VISIBLE if n in facts.shown]
    unseen = [n for n in _ASKED_VISIBLE if n not in facts.present]
    if seen and unseen:
        for pool, answer in ((seen, True), (unseen, False)):
            name = pool[int(rng.integers(len(pool)))]
            out.append(_yes_no(f"Is the {spoken(name)} visible?", answer, "visibility"))
    return out


def _absent(rng: np.random.Generator, facts: Facts) -> list[QA]:
    """Which organ was removed? Also asked, less often, where nothing is missing."""
    pool = [spoken(name) for name in REMOVABLE]
    if facts.removed:
        name = spoken(facts.removed[0])
        return [_closed(rng, "Which organ is absent?", name, [*pool, "none"], "absent organ"),
                QA("Which organ is absent?", (), name, "absent organ")]  # fmt: skip
    if all(name in facts.shown for name in REMOVABLE) and rng.random() < 0.4:
        return [_closed(rng, "Which organ is absent?", "none", [*pool, "none"], "absent organ"),
                QA("Which organ is absent?", (), "none", "absent organ")]  # fmt: skip
    return []


def _lesion_questions(rng: np.random.Generator, facts: Facts) -> list[QA]:
    """Place, side, kind and size of the only lesion, or of the largest when it clearly is the largest."""
    order = sorted(facts.findings, key=lambda f: -f.diameter_mm)
    if len(order) > 1 and order[0].diameter_mm < 1.15 * order[1].diameter_mm:
        return []
    target = order[0]
    subject = "the lesion" if len(order) == 1 else "the largest lesion"
    organ = spoken(target.organ)
    out = [
        _closed(rng, f"Which organ contains {subject}?", organ, [spoken(name) for name in LESION_ORGANS], "location"),
        QA(f"Which organ contains {subject}?", (), organ, "location"),
        _closed(rng, f"What kind is {subject}?", target.kind, KINDS, "kind"),
        QA(f"What kind is {subject}?", (), target.kind, "kind"),
    ]
    if target.organ.endswith(("_left", "_right")):
        side = target.organ.rsplit("_", 1)[1]
        out.append(_closed(rng, f"On which side is {subject}?", side, ("left", "right"), "side"))
    for text, low, high in SIZE_BINS:
        if low + (_SIZE_MARGIN_MM if low else 0) <= target.diameter_mm < high - _SIZE_MARGIN_MM:
            names = [name for name, _, _ in SIZE_BINS]
            out.append(_closed(rng, f"How large is {subject}?", text, names, "size", shuffle=False))
    return out
