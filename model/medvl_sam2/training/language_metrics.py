"""Scores of the language model on held-out generated cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from medvl_sam2.modeling.prompts import REPORT_PROMPTS
from medvl_sam2.modeling.vision_language import VisionLanguage
from medvl_sam2.synthesis.language import report_findings
from medvl_sam2.training.corpus import answer_text
from medvl_sam2.training.language_batches import stack_views
from medvl_sam2.training.language_data import LanguageCase

_CLOSED_TOKENS = 24
_OPEN_TOKENS = 48
_REPORT_TOKENS = 224


@dataclass(frozen=True)
class LanguageScores:
    """Shares in [0, 1].

    ``closed``: right replies over all closed questions, ``closed_by_kind`` the same per kind; ``open_exact``: open
    replies equal to the reference; ``report_f1``: micro F1 of the findings read back from the reports.
    """

    closed: float
    closed_by_kind: dict[str, float]
    closed_count: int
    open_exact: float
    open_by_kind: dict[str, float]
    report_f1: float
    report_precision: float
    report_recall: float


def closed_correct(reply: str, choices: Sequence[str], answer: str) -> bool:
    """True when the reply names the letter of ``answer``, or is its text alone."""
    reply = reply.strip()
    letter = chr(ord("A") + list(choices).index(answer))
    if len(reply) > 1 and reply[0].isalpha() and reply[1] == ".":
        return reply[0].upper() == letter
    return reply.lower() == answer.lower()


def closed_accuracy(
    model: VisionLanguage, cases: Sequence[LanguageCase], progress: bool = True
) -> dict[str, list[bool]]:
    """Right or wrong of every closed question, by kind, in the order of the cases."""
    results: dict[str, list[bool]] = {}
    for case in tqdm(cases, desc="closed questions", disable=not progress, mininterval=5):
        items = [item for item in case.qa if item.choices]
        replies = _replies(model, case, [item.prompt for item in items], _CLOSED_TOKENS)
        for item, reply in zip(items, replies, strict=True):
            results.setdefault(item.kind, []).append(closed_correct(reply, item.choices, answer_text(item)))
    return results


def report_counts(model: VisionLanguage, cases: Sequence[LanguageCase], progress: bool = True) -> tuple[int, int, int]:
    """Findings told and true, told in all, true in all, over the reports of the cases."""
    hit = told = true = 0
    for case in tqdm(cases, desc="reports", disable=not progress, mininterval=5):
        said = set(report_findings(_replies(model, case, [REPORT_PROMPTS[0]], _REPORT_TOKENS)[0]))
        known = set(report_findings(case.reports[0]))
        hit, told, true = hit + len(said & known), told + len(said), true + len(known)
    return hit, told, true


def language_scores(model: VisionLanguage, cases: Sequence[LanguageCase], progress: bool = True) -> LanguageScores:
    """Closed and open questions and report findings of unseen cases; greedy decoding."""
    closed = closed_accuracy(model, cases, progress)
    opened: dict[str, list[bool]] = {}
    for case in tqdm(cases, desc="open questions", disable=not progress, mininterval=5):
        items = [item for item in case.qa if not item.choices]
        replies = _replies(model, case, [item.prompt for item in items], _OPEN_TOKENS)
        for item, reply in zip(items, replies, strict=True):
            opened.setdefault(item.kind, []).append(reply.strip().lower() == item.answer.strip().lower())
    hit, told, true = report_counts(model, cases, progress)
    precision, recall = hit / max(1, told), hit / max(1, true)
    return LanguageScores(
        closed=_share([right for kind in closed.values() for right in kind]),
        closed_by_kind={kind: _share(rights) for kind, rights in sorted(closed.items())},
        closed_count=sum(len(kind) for kind in closed.values()),
        open_exact=_share([right for kind in opened.values() for right in kind]),
        open_by_kind={kind: _share(rights) for kind, rights in sorted(opened.items())},
        report_f1=2 * precision * recall / max(1e-9, precision + recall),
        report_precision=precision,
        report_recall=recall,
    )


@torch.no_grad()
def _replies(model: VisionLanguage, case: LanguageCase, prompts: Sequence[str], tokens: int) -> list[str]:
    views, extents = stack_views([case], None)
    return model.generate(model.encode_image(views, extents), prompts, tokens)


def _share(rights: Sequence[bool]) -> float:
    return sum(rights) / len(rights) if rights else float("nan")
