"""Tables and JSON figures of the text tasks. Pure functions: scores in, text and plain dictionaries out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from medvl_sam2.evaluation.language_tasks import (
    AnswerScore,
    EmbeddedPair,
    ReportScore,
    WrittenAnswer,
    constant_answers,
    constant_report,
    majority_accuracy,
)
from medvl_sam2.evaluation.metrics import (
    Counts,
    Interval,
    bootstrap,
    bootstrap_mean_of_kinds,
    bootstrap_ratio,
    match_counts,
)
from medvl_sam2.evaluation.report import bounds, interval_figures, number, table, with_bounds
from medvl_sam2.evaluation.retrieval import PAIRS, recalls
from medvl_sam2.evaluation.text_scores import TextScorer
from medvl_sam2.synthesis.language import report_findings

SCORE_NAMES = {
    "bleu_1": "BLEU-1",
    "bleu_4": "BLEU-4",
    "rouge_1": "ROUGE-1",
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR",
    "bert_f1": "BERTScore",
}
"""Heading of each field of a text score."""


def answer_figures(scores: Sequence[AnswerScore]) -> dict[str, Any]:
    """Closed question accuracy by kind, beside the best constant answer of each kind and chance.

    ``letter``: the relatives' rule, their mean of kinds included.
    """
    by_kind: dict[str, list[AnswerScore]] = defaultdict(list)
    for score in scores:
        by_kind[score.kind].append(score)
    majority = majority_accuracy(scores)
    kinds = {kind: _answers_of_kind(items, majority[kind]) for kind, items in sorted(by_kind.items())}
    groups, names = [s.patient for s in scores], [s.kind for s in scores]
    strict, letter = [float(s.right) for s in scores], [float(s.letter_right) for s in scores]
    return {
        "accuracy": interval_figures(bootstrap(strict, groups)),
        "mean_of_kinds": interval_figures(bootstrap_mean_of_kinds(strict, names, groups)),
        "letter": {
            "accuracy": interval_figures(bootstrap(letter, groups)),
            "mean_of_kinds": interval_figures(bootstrap_mean_of_kinds(letter, names, groups)),
        },
        "majority": float(np.mean([majority[s.kind] for s in scores])) if scores else None,
        "chance": float(np.mean([1 / s.choices for s in scores])) if scores else None,
        "kinds": kinds,
        "wrong": [
            {"case": s.case, "question": s.question, "expected": s.expected, "given": s.given}
            for s in scores
            if not s.right
        ],
    }


def _answers_of_kind(items: Sequence[AnswerScore], majority: float) -> dict[str, Any]:
    return {
        "accuracy": float(np.mean([s.right for s in items])),
        "interval": interval_figures(bootstrap([float(s.right) for s in items], [s.patient for s in items])),
        "letter": float(np.mean([s.letter_right for s in items])),
        "majority": majority,
        "chance": float(np.mean([1 / s.choices for s in items])),
        "count": len(items),
    }


def answer_text(figures: Mapping[str, Any]) -> str:
    """The table of :func:`answer_figures`."""
    rows = [
        [
            kind,
            f"{cell['accuracy']:.3f}",
            bounds(cell["interval"]),
            f"{cell['letter']:.3f}",
            f"{cell['majority']:.3f}",
            f"{cell['chance']:.3f}",
            str(cell["count"]),
        ]
        for kind, cell in figures["kinds"].items()
    ]
    letter = figures["letter"]
    for name, overall, theirs in (
        ("all", figures["accuracy"], letter["accuracy"]),
        ("mean of kinds", figures["mean_of_kinds"], letter["mean_of_kinds"]),
    ):
        if overall:
            whole = name == "all"
            rows.append(
                [
                    name,
                    f"{overall['mean']:.3f}",
                    bounds(overall),
                    f"{theirs['mean']:.3f}",
                    number(figures["majority"]) if whole else "-",
                    number(figures["chance"]) if whole else "-",
                    str(overall["count"]),
                ]
            )
    return (
        "Closed questions, generated cases (letter: the relatives' rule; controls: best constant answer a kind, "
        "chance)\n" + table(["kind", "accuracy", "95% CI", "letter", "constant", "chance", "n"], rows)
    )


def text_figures(
    pairs: Iterable[tuple[str, str]], patients: Sequence[str], scorer: TextScorer
) -> dict[str, dict[str, float | int] | None]:
    """Mean of every text score over (given, expected) pairs with its interval; None for a score left out."""
    scores = [asdict(scorer(given, expected)) for given, expected in pairs]
    figures = {}
    for name in SCORE_NAMES:
        values = [score[name] for score in scores if score[name] is not None]
        figures[name] = interval_figures(bootstrap(values, patients)) if values else None
    return figures


def written_figures(answers: Sequence[WrittenAnswer], scorer: TextScorer, constant_by_kind: bool) -> dict[str, Any]:
    """Text scores of written answers, all and by kind, beside the most frequent expected answer.

    That answer is one for each kind where the question tells its kind (``constant_by_kind``), else one for all.
    """
    by_kind: dict[str, list[WrittenAnswer]] = defaultdict(list)
    for answer in answers:
        by_kind[answer.kind].append(answer)
    constant = constant_answers(answers, constant_by_kind)
    patients = [a.patient for a in answers]
    return {
        "scores": text_figures([(a.given, a.expected) for a in answers], patients, scorer),
        "constant": text_figures([(constant[a.kind], a.expected) for a in answers], patients, scorer),
        "kinds": {
            kind: text_figures([(a.given, a.expected) for a in items], [a.patient for a in items], scorer)
            for kind, items in sorted(by_kind.items())
        },
        "meteor": scorer.meteor.variant,
        "skipped": scorer.skipped,
        "cases": [{"case": a.case, "question": a.question, "expected": a.expected, "given": a.given} for a in answers],
    }


def written_text(title: str, figures: Mapping[str, Any]) -> str:
    """The table of :func:`written_figures`."""
    rows = [*figures["kinds"].items(), ("all", figures["scores"]), ("constant answers", figures["constant"])]
    return f"{title}, generated cases (METEOR: {figures['meteor']})\n" + _score_table("kind", rows)


def _score_table(head: str, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """One line a row: its name, the mean of every score that was computed, and the number of texts."""
    rows = list(rows)
    names = [name for name in SCORE_NAMES if any(scores[name] for _, scores in rows)]
    return table(
        [head, *[SCORE_NAMES[name] for name in names], "n"],
        [
            [title, *[with_bounds(scores[name]) for name in names], str(scores["bleu_1"]["count"])]
            for title, scores in rows
        ],
    )


def report_figures(scores: Sequence[ReportScore], scorer: TextScorer) -> dict[str, Any]:
    """Finding F1 and text scores of reports, beside the best constant report."""
    patients = [score.patient for score in scores]
    counts = [score.counts for score in scores]
    total = sum(counts, Counts())
    constant = constant_report(scores)
    claimed = report_findings(constant)
    control = [match_counts(claimed, score.findings) for score in scores]
    return {
        "finding_f1": total.f1,
        "finding_f1_interval": interval_figures(_f1(counts, patients)),
        "counts": {"hit": total.hit, "extra": total.extra, "missed": total.missed},
        "constant_report_f1": sum(control, Counts()).f1,
        "constant_report_f1_interval": interval_figures(_f1(control, patients)),
        "text_scores": text_figures([(s.given, s.expected) for s in scores], patients, scorer),
        "constant_text_scores": text_figures([(constant, s.expected) for s in scores], patients, scorer),
        "meteor": scorer.meteor.variant,
        "skipped": scorer.skipped,
        "cases": [{"case": s.case, "expected": s.expected, "given": s.given} for s in scores],
    }


def _f1(counts: Sequence[Counts], patients: Sequence[str]) -> Interval | None:
    """Micro F1 with its interval; patients are drawn and their counts added up."""
    return bootstrap_ratio([2.0 * c.hit for c in counts], [2.0 * c.hit + c.extra + c.missed for c in counts], patients)


def report_text(figures: Mapping[str, Any]) -> str:
    """Findings in one line, then the text scores."""
    counts = figures["counts"]
    rows = [("model", figures["text_scores"]), ("best constant report", figures["constant_text_scores"])]
    return (
        f"Report findings (organ and kind), generated cases: F1 {with_bounds(figures['finding_f1_interval'])} "
        f"(right {counts['hit']}, invented {counts['extra']}, missed {counts['missed']}); "
        f"best constant report {with_bounds(figures['constant_report_f1_interval'])}\n"
        f"Report wording (METEOR: {figures['meteor']})\n" + _score_table("report", rows)
    )


def retrieval_figures(pairs: Sequence[EmbeddedPair]) -> list[dict[str, Any]]:
    """Recall of volumes and reports for each other, in the relatives' numbers of pairs and in all."""
    sizes = [*(size for size in PAIRS if size < len(pairs)), len(pairs)]
    found = recalls(
        np.stack([pair.volume_embedding for pair in pairs]),
        np.stack([pair.text_embedding for pair in pairs]),
        [pair.text for pair in pairs],
        [pair.patient for pair in pairs],
        sizes,
    )
    return [
        {
            "pairs": recall.pairs,
            "direction": recall.direction.value,
            "depth": recall.depth,
            "recall": interval_figures(recall.recall),
            "equal_texts_right": interval_figures(recall.equal_texts_right),
            "chance": recall.chance,
            "chance_equal_texts": recall.chance_equal_texts,
        }
        for recall in found
    ]


def retrieval_text(figures: Sequence[Mapping[str, Any]]) -> str:
    """The table of :func:`retrieval_figures`."""
    rows = [
        [
            f"{record['direction']}, {record['pairs']} pairs",
            f"R@{record['depth']}",
            with_bounds(record["recall"]),
            with_bounds(record["equal_texts_right"]),
            f"{record['chance']:.3f}",
            f"{record['chance_equal_texts']:.3f}",
        ]
        for record in figures
    ]
    return "Image-text retrieval, generated cases\n" + table(
        ["direction", "depth", "recall", "equal texts count as right", "chance", "chance, equal texts"], rows
    )
