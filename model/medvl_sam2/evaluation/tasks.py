"""The tasks without clicks: semantic, referring, closed questions, reports. Each beside a control without a model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from medvl_sam2.evaluation.cases import EvaluationCase
from medvl_sam2.evaluation.metrics import Counts, dice, match_counts, same_answer
from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.synthesis.language import report_findings
from medvl_sam2.synthesis.records import Case, Referring
from medvl_sam2.types import Answer, Segmentation, Volume
from medvl_sam2.vocabulary import CLASSES, spoken

ABSENT_RULE = (
    "a class that is asked for but absent scores 0 when anything is predicted, and is left out when nothing is; "
    "real cases are asked only for the classes their masks decide; an organ includes its lesions"
)
Item = TypeVar("Item")


class TextPredictor(Protocol):
    """The part of the predictor these tasks use."""

    def open(self, volume: Volume) -> Any:
        """A session on a volume."""

    def segment_classes(
        self, session: Any, classes: Sequence[str], progress: Callable[[float, str], None] | None = None
    ) -> Segmentation:
        """Label map of vocabulary classes, values in the order asked."""

    def segment_text(self, session: Any, text: str) -> Segmentation:
        """Mask for a sentence."""

    def answer(self, session: Any, question: str) -> Answer:
        """Answer to a question."""

    def report(self, session: Any) -> Answer:
        """A report."""


@dataclass(frozen=True)
class MaskScore:
    """Dice of one structure in one case; ``present``: whether the truth holds it (absent ones score 0 or vanish)."""

    case: str
    patient: str
    split: str
    structure: str
    dice: float
    present: bool
    prompt: str


def semantic(predictor: TextPredictor, session: Any, case: EvaluationCase) -> tuple[list[MaskScore], np.ndarray]:
    """Scores of every known class, and the organ label map (I, J, K) with values in vocabulary order for a picture.

    Lesions are asked in a call of their own: in one label map they would cut holes into organs that include them.
    """
    organs = [name for name in case.known if name != "lesion"]
    scores: list[MaskScore] = []
    picture = np.zeros(case.volume.geometry.shape, dtype=np.uint8)
    for asked in (organs, ["lesion"] if "lesion" in case.known else []):
        if not asked:
            continue
        result = predictor.segment_classes(session, asked)
        values = {name: value for value, name in enumerate(result.names, 1)}
        for name in asked:
            # A name the predictor leaves out was found nowhere.
            found = result.mask == values[name] if name in values else np.zeros(picture.shape, dtype=bool)
            if name != "lesion":
                picture[found] = CLASSES.index(name) + 1
            _score(scores, case, name, case.classes.get(name), found, name)
    return scores, picture


def referring(predictor: TextPredictor, session: Any, case: EvaluationCase, limit: int = 0) -> list[MaskScore]:
    """Scores of referring sentences.

    Generated cases ask their own sentences (at most ``limit`` drawn by the case's name, 0 for all); real cases ask for
    every class they hold ("segment the left kidney").
    """
    scores: list[MaskScore] = []
    if case.generated is None:
        for name, mask in case.classes.items():
            text = f"segment the {spoken(name)}"
            _score(scores, case, name, mask, predictor.segment_text(session, text).mask > 0, text)
        return scores
    stored = CanonicalTransform(case.volume.geometry).inverse_array
    for item in draw_some(case.generated.referring, limit, case.name):
        truth = stored(case.generated.target(item))
        _score(scores, case, _referred(item), truth, predictor.segment_text(session, item.text).mask > 0, item.text)
    return scores


def draw_some(items: Sequence[Item], limit: int, name: str) -> list[Item]:
    """At most ``limit`` of ``items`` in order (0: all).

    The draw depends on the case's ``name`` alone, so that two checkpoints are compared on the same choice.
    """
    if not 0 < limit < len(items):
        return list(items)
    rng = np.random.default_rng([ord(letter) for letter in name])
    return [items[index] for index in sorted(rng.choice(len(items), limit, replace=False).tolist())]


def _referred(item: Referring) -> str:
    """Row of the table a sentence belongs to: its class, ``lesion``, or ``several classes``."""
    if item.kind == "lesion":
        return "lesion"
    return CLASSES[item.values[0] - 1] if len(item.values) == 1 else "several classes"


def _score(
    scores: list[MaskScore], case: EvaluationCase, name: str, truth: np.ndarray | None, found: np.ndarray, prompt: str
) -> None:
    target = np.zeros(found.shape, dtype=bool) if truth is None else truth
    value = dice(target, found)
    if value is not None:
        scores.append(MaskScore(case.name, case.patient, case.split, name, value, bool(target.any()), prompt))


@dataclass(frozen=True)
class AnswerScore:
    """One closed question: what was expected and said; ``choices`` counts the possible answers (chance is 1 in it)."""

    case: str
    kind: str
    question: str
    expected: str
    given: str
    choices: int

    @property
    def right(self) -> bool:
        """Whether the answer agrees; the letter or the text of the right choice alone counts too."""
        return same_answer(self.given, self.expected)


def closed_questions(predictor: TextPredictor, session: Any, case: EvaluationCase) -> list[AnswerScore]:
    """Answers to the closed questions (those with choices) of a generated case."""
    if case.generated is None:
        return []
    return [
        AnswerScore(
            case.name, qa.kind, qa.prompt, qa.answer, predictor.answer(session, qa.prompt).text, len(qa.choices)
        )
        for qa in case.generated.qa
        if qa.choices
    ]


def majority_accuracy(scores: Iterable[AnswerScore]) -> dict[str, float]:
    """Accuracy a kind of question would reach by always giving its most frequent expected answer in these cases.

    Letters are shuffled from question to question, so the text of the answer is what is held constant. The control
    knows the evaluated set's own frequencies: no constant answer does better.
    """
    by_kind: dict[str, list[str]] = defaultdict(list)
    for score in scores:
        by_kind[score.kind].append(score.expected.lower().split(". ", 1)[-1])
    return {kind: Counter(answers).most_common(1)[0][1] / len(answers) for kind, answers in by_kind.items()}


@dataclass(frozen=True)
class ReportScore:
    """A report beside the truth: texts, true ``findings`` (organ class, kind), and the counts of the given text."""

    case: str
    expected: str
    given: str
    findings: frozenset[tuple[str, str]]
    counts: Counts


def true_findings(case: Case) -> frozenset[tuple[str, str]]:
    """Findings a report of a generated case must state: (organ class, kind), and (organ, "absent") after surgery."""
    return frozenset(
        {(finding.organ, finding.kind) for finding in case.findings} | {(name, "absent") for name in case.removed}
    )


def report(predictor: TextPredictor, session: Any, case: EvaluationCase) -> ReportScore | None:
    """Findings of the predictor's report against the generator's; None for a real case (no truth).

    Findings are a set: two cysts in one organ count once, as in the generator's own reader of reports.
    """
    if case.generated is None:
        return None
    given = predictor.report(session).text
    true = true_findings(case.generated)
    return ReportScore(case.name, case.generated.report, given, true, match_counts(report_findings(given), true))


def constant_report_control(scores: Sequence[ReportScore]) -> Counts:
    """Best counts any one of the true reports reaches when it is given for every case.

    Like the majority answer this control knows the evaluated set; among equals the most frequent report wins.
    """
    best, best_key = Counts(), (-1.0, 0)
    for text, times in Counter(score.expected for score in scores).items():
        claimed = report_findings(text)
        total = sum((match_counts(claimed, score.findings) for score in scores), Counts())
        key = (total.f1 if total.f1 is not None else 0.0, times)
        if key > best_key:
            best, best_key = total, key
    return best
