"""All tables of an evaluation as plain text, from its figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medvl_sam2.evaluation import language_report, report


def overview(figures: Mapping[str, Any]) -> str:
    """Every table the figures of a run hold, and what was skipped."""
    parts = []
    if "interactive" in figures:
        parts.append(report.interactive_text(figures["interactive"]))
    parts += [
        report.mask_text(task.capitalize(), figures[task]) for task in ("semantic", "referring") if task in figures
    ]
    if "vqa" in figures:
        parts.append(language_report.answer_text(figures["vqa"]))
    if "open_vqa" in figures:
        parts.append(language_report.written_text("Open questions", figures["open_vqa"]))
    if "region" in figures:
        parts.append(language_report.written_text("Regions named from their box", figures["region"]))
    if "report" in figures:
        parts.append(language_report.report_text(figures["report"]))
    if "retrieval" in figures:
        parts.append(language_report.retrieval_text(figures["retrieval"]))
    if figures.get("skipped"):
        parts.append("Skipped\n" + "\n".join(f"{what}: {reason}" for what, reason in figures["skipped"].items()))
    return "\n\n".join(parts)
