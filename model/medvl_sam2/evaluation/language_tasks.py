"""The tasks that give text: closed and open questions, regions, reports, and embeddings for retrieval.

Each has a control that sees no image: the best constant answer or report.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from medvl_sam2.evaluation.boxes import box_of
from medvl_sam2.evaluation.cases import EvaluationCase
from medvl_sam2.evaluation.metrics import Counts, letter_occurs, match_counts, same_answer
from medvl_sam2.evaluation.tasks import draw_some
from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.synthesis.language import report_findings
from medvl_sam2.synthesis.records import Case
from medvl_sam2.types import Answer, Volume
from medvl_sam2.vocabulary import spoken


class LanguagePredictor(Protocol):
    """The part of the predictor these tasks use."""

    def open(self, volume: Volume) -> Any:
        """A session on a volume."""

    def answer(self, session: Any, question: str) -> Answer:
        """Answer to a question."""

    def report(self, session: Any) -> Answer:
        """A report."""


@runtime_checkable
class ImageTextEncoder(Protocol):
    """What a predictor offers whose checkpoint has an image-text model; without one retrieval is skipped."""

    @property
    def embeds(self) -> bool:
        """Whether there is an image-text model."""

    def embed_volume(self, volume: Any) -> np.ndarray:
        """Embedding (D,), norm 1, of a volume or of a session on one."""

    def embed_text(self, text: str) -> np.ndarray:
        """A report's embedding (D,), norm 1."""


@dataclass(frozen=True)
class EmbeddedPair:
    """A volume and its report as the model embeds them, both (D,)."""

    patient: str
    text: str
    volume_embedding: np.ndarray
    text_embedding: np.ndarray


def embedded_pair(encoder: ImageTextEncoder, case: EvaluationCase, session: Any = None) -> EmbeddedPair | None:
    """Embeddings of a generated case and its report; None for a real case (no report).

    ``session``: one that the predictor has open on the case's volume, if any.
    """
    if case.generated is None:
        return None
    text = case.generated.report
    seen = encoder.embed_volume(case.volume if session is None else session)
    return EmbeddedPair(case.patient, text, seen, encoder.embed_text(text))


@dataclass(frozen=True)
class AnswerScore:
    """One closed question: what was expected and said; ``choices`` counts the possible answers (chance is 1 in it)."""

    case: str
    patient: str
    kind: str
    question: str
    expected: str
    given: str
    choices: int

    @property
    def right(self) -> bool:
        """Whether the answer agrees; the letter or the text of the right choice alone counts too."""
        return same_answer(self.given, self.expected)

    @property
    def letter_right(self) -> bool:
        """The relatives' rule: the letter of the right choice occurs."""
        return letter_occurs(self.given, self.expected)


def closed_questions(predictor: LanguagePredictor, session: Any, case: EvaluationCase) -> list[AnswerScore]:
    """Answers to the closed questions (those with choices) of a generated case."""
    if case.generated is None:
        return []
    scores = []
    for qa in (qa for qa in case.generated.qa if qa.choices):
        given = predictor.answer(session, qa.prompt).text
        scores.append(AnswerScore(case.name, case.patient, qa.kind, qa.prompt, qa.answer, given, len(qa.choices)))
    return scores


@dataclass(frozen=True)
class WrittenAnswer:
    """An open question: what was expected and said."""

    case: str
    patient: str
    kind: str
    question: str
    expected: str
    given: str


def open_questions(predictor: LanguagePredictor, session: Any, case: EvaluationCase) -> list[WrittenAnswer]:
    """Answers to the open questions (those without choices) of a generated case."""
    if case.generated is None:
        return []
    return [
        WrittenAnswer(
            case.name, case.patient, qa.kind, qa.question, qa.answer, predictor.answer(session, qa.question).text
        )
        for qa in case.generated.qa
        if not qa.choices
    ]


def regions(predictor: LanguagePredictor, session: Any, case: EvaluationCase, limit: int = 0) -> list[WrittenAnswer]:
    """What lies in a box: the class name wanted for the box of every class of the case (at most ``limit``, 0: all).

    M3D's referring expression generation with class names; boxes are written as six fractions.
    """
    transform = CanonicalTransform(case.volume.geometry)
    answers = []
    for name, mask in draw_some(list(case.classes.items()), limit, case.name):
        question = f"What is in the region {box_of(transform.forward_array(mask))}?"
        given = predictor.answer(session, question).text
        answers.append(WrittenAnswer(case.name, case.patient, name, question, spoken(name), given))
    return answers


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
    patient: str
    expected: str
    given: str
    findings: frozenset[tuple[str, str]]
    counts: Counts


def true_findings(case: Case) -> frozenset[tuple[str, str]]:
    """Findings a report of a generated case must state: (organ class, kind), and (organ, "absent") after surgery."""
    return frozenset(
        {(finding.organ, finding.kind) for finding in case.findings} | {(name, "absent") for name in case.removed}
    )


def report(predictor: LanguagePredictor, session: Any, case: EvaluationCase) -> ReportScore | None:
    """Findings of the predictor's report against the generator's; None for a real case (no truth).

    Findings are a set: two cysts in one organ count once, as in the generator's own reader of reports.
    """
    if case.generated is None:
        return None
    given = predictor.report(session).text
    true = true_findings(case.generated)
    return ReportScore(
        case.name, case.patient, case.generated.report, given, true, match_counts(report_findings(given), true)
    )


def constant_report(scores: Sequence[ReportScore]) -> str:
    """The one of the true reports that reaches the best finding F1 when it is given for every case.

    Like the majority answer this control knows the evaluated set; among equals the most frequent report wins.
    """
    best, best_key = "", (-1.0, 0)
    for text, times in Counter(score.expected for score in scores).items():
        claimed = report_findings(text)
        total = sum((match_counts(claimed, score.findings) for score in scores), Counts())
        key = (total.f1 if total.f1 is not None else 0.0, times)
        if key > best_key:
            best, best_key = text, key
    return best


def constant_answers(answers: Sequence[WrittenAnswer], by_kind: bool) -> dict[str, str]:
    """The most frequent expected answer for each kind, of that kind or of all: a control that sees no image."""
    kinds = dict.fromkeys(answer.kind for answer in answers)
    expected = {kind: [a.expected for a in answers if a.kind == kind or not by_kind] for kind in kinds}
    return {kind: Counter(texts).most_common(1)[0][0] for kind, texts in expected.items()}
