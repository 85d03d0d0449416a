"""Runs the chosen tasks case by case, keeps the scores, and turns them into figures and tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from medvl_sam2.errors import DataError
from medvl_sam2.evaluation import pictures, report, tasks
from medvl_sam2.evaluation.cases import EvaluationCase
from medvl_sam2.evaluation.metrics import Counts
from medvl_sam2.evaluation.protocol import (
    Interactive,
    PredictorEngine,
    PromptPredictor,
    ScoredCurve,
    Setting,
    Step,
    run_object,
)
from medvl_sam2.types import Prompt
from medvl_sam2.vocabulary import CLASSES

TASKS = ("interactive", "semantic", "referring", "vqa", "report")


class FullPredictor(PromptPredictor, tasks.TextPredictor, Protocol):
    """Everything the runner asks of a predictor."""


@dataclass(frozen=True)
class Plan:
    """What to run.

    ``objects_per_case`` and ``sentences_per_case`` limit the interactive objects and the referring sentences of a case
    to a fixed random choice (0: all). ``pictures`` is a folder for PNGs, or None.
    """

    tasks: tuple[str, ...] = TASKS
    settings: tuple[Setting, ...] = (Setting.BOX, Setting.CLICKS)
    clicks: int = 5
    with_nsd: bool = False
    objects_per_case: int = 0
    sentences_per_case: int = 0
    pictures: Path | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.tasks) - set(TASKS))
        if unknown or not self.tasks:
            raise DataError(f"tasks {list(self.tasks)} must be some of {', '.join(TASKS)}")
        if self.clicks < 1:
            raise DataError(f"{self.clicks} clicks; give at least one step")


Progress = Callable[[str], None]


class _Last:
    """Keeps the state after the last prompt of a loop."""

    def __init__(self) -> None:
        self.prompt: Prompt | None = None
        self.mask: np.ndarray | None = None
        self.step: Step | None = None

    def __call__(self, prompt: Prompt, mask: np.ndarray, step: Step) -> None:
        self.prompt, self.mask, self.step = prompt, mask, step


class Runner:
    """Collects scores of a predictor (None: controls only) and of the controls over evaluation cases."""

    def __init__(self, plan: Plan, predictor: FullPredictor | None, controls: Sequence[Interactive]) -> None:
        self.plan = plan
        self.predictor = predictor
        self.engines: list[Interactive] = [] if predictor is None else [PredictorEngine(predictor)]
        self.engines += controls
        self._controls = [control.name for control in controls]
        self.curves: list[ScoredCurve] = []
        self.semantic: list[tasks.MaskScore] = []
        self.referring: list[tasks.MaskScore] = []
        self.answers: list[tasks.AnswerScore] = []
        self.reports: list[tasks.ReportScore] = []
        self.left_out: dict[str, list[str]] = {}

    def run(self, case: EvaluationCase, progress: Progress = lambda message: None) -> None:
        """Run every task of the plan on one case; ``progress`` hears what is being done."""
        self.left_out[case.name] = list(case.left_out)
        if self.predictor is not None:
            self._text_tasks(self.predictor, case, progress)
        if "interactive" in self.plan.tasks:
            self._interactive(case, progress)

    def _text_tasks(self, predictor: FullPredictor, case: EvaluationCase, progress: Progress) -> None:
        session = predictor.open(case.volume)
        label_map = None
        if "semantic" in self.plan.tasks and case.known:
            progress(f"{case.name}: semantic")
            scores, label_map = tasks.semantic(predictor, session, case)
            self.semantic += scores
        if "referring" in self.plan.tasks:
            progress(f"{case.name}: referring")
            self.referring += tasks.referring(predictor, session, case, self.plan.sentences_per_case)
        if "vqa" in self.plan.tasks:
            progress(f"{case.name}: questions")
            self.answers += tasks.closed_questions(predictor, session, case)
        text = ""
        if "report" in self.plan.tasks:
            progress(f"{case.name}: report")
            score = tasks.report(predictor, session, case)
            if score is not None:
                self.reports.append(score)
                text = f"Report: {score.given}"
        if self.plan.pictures is not None and label_map is not None:
            path = self.plan.pictures / f"{case.name}_semantic.png"
            pictures.draw(path, case.volume, label_map, f"{case.name}: semantic", CLASSES, text=text)

    def _interactive(self, case: EvaluationCase, progress: Progress) -> None:
        objects = tasks.draw_some(case.objects, self.plan.objects_per_case, case.name)
        for engine in self.engines:
            opened = engine.open(case.volume)
            for number, (structure, truth) in enumerate(objects):
                for setting in self.plan.settings:
                    progress(f"{case.name}: {engine.name}, {structure}, {setting.value}")
                    last = _Last()
                    curve = run_object(
                        engine,
                        opened,
                        case.volume,
                        truth,
                        structure,
                        setting,
                        self.plan.clicks,
                        self.plan.with_nsd,
                        last,
                    )
                    self.curves.append(ScoredCurve(case.name, case.patient, case.split, int(truth.sum()), curve))
                    if isinstance(engine, PredictorEngine):
                        self._picture(case, truth, last, f"{number:02d}_{structure}_{setting.value}")

    def _picture(self, case: EvaluationCase, truth: np.ndarray, last: _Last, label: str) -> None:
        """PNG of the state after the last prompt, where pictures are wanted."""
        if self.plan.pictures is None or last.step is None or last.mask is None:
            return
        title = f"{case.name} {label}: Dice {last.step.dice:.3f} ({last.step.clicks} clicks)"
        path = self.plan.pictures / f"{case.name}_{label}.png"
        pictures.draw(path, case.volume, last.mask, title, truth=truth, prompt=last.prompt)

    def figures(self) -> dict[str, Any]:
        """All figures as plain JSON values."""
        result: dict[str, Any] = {"left_out_below_voxel_limit": self.left_out}
        if self.curves:
            result["interactive"] = report.interactive_figures(self.curves, "model", self._controls)
        if self.semantic:
            result["semantic"] = report.mask_figures(self.semantic)
        if self.referring:
            result["referring"] = report.mask_figures(self.referring)
        if self.answers:
            result["vqa"] = report.answer_figures(self.answers)
        if self.reports:
            counts = sum((score.counts for score in self.reports), Counts())
            control = tasks.constant_report_control(self.reports)
            result["report"] = {
                "finding_f1": counts.f1,
                "counts": {"hit": counts.hit, "extra": counts.extra, "missed": counts.missed},
                "constant_report_f1": control.f1,
                "cases": [{"case": s.case, "expected": s.expected, "given": s.given} for s in self.reports],
            }
        return result

    def text(self) -> str:
        """All tables."""
        figures = self.figures()
        parts = []
        if "interactive" in figures:
            parts.append(report.interactive_text(figures["interactive"]))
        for task in ("semantic", "referring"):
            if task in figures:
                parts.append(report.mask_text(task.capitalize(), figures[task]))
        if "vqa" in figures:
            parts.append(report.answer_text(figures["vqa"]))
        if "report" in figures:
            parts.append(report.report_text(figures["report"]))
        return "\n\n".join(parts)
