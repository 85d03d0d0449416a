"""Runs the chosen tasks case by case, keeps the scores, and turns them into figures and tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from medvl_sam2.errors import DataError
from medvl_sam2.evaluation import language_report, language_tasks, pictures, report, tasks
from medvl_sam2.evaluation.cases import EvaluationCase
from medvl_sam2.evaluation.protocol import (
    Interactive,
    PredictorEngine,
    PromptPredictor,
    ScoredCurve,
    Setting,
    Step,
    run_object,
)
from medvl_sam2.evaluation.text_scores import TextScorer
from medvl_sam2.types import Prompt
from medvl_sam2.vocabulary import CLASSES

MASK_TASKS = ("interactive", "semantic", "referring")
TEXT_TASKS = ("vqa", "open_vqa", "report", "retrieval")
TASKS = (*MASK_TASKS, *TEXT_TASKS)
"""What runs unless chosen otherwise."""
EXTRA_TASKS = ("region",)
"""Run only on request: no shipped weights are trained for them."""
NO_HEAD = "the checkpoint has no image-text model (folder alignment)"


class FullPredictor(PromptPredictor, tasks.MaskPredictor, language_tasks.LanguagePredictor, Protocol):
    """Everything the runner asks of a predictor."""


@dataclass(frozen=True)
class Plan:
    """What to run.

    ``with_nsd`` adds surface Dice at 2 mm (slower). ``objects_per_case`` and ``sentences_per_case`` limit the
    interactive objects and the referring sentences of a case to a fixed random choice (0: all). ``pictures`` is a
    folder for PNGs, or None.
    """

    tasks: tuple[str, ...] = TASKS
    settings: tuple[Setting, ...] = (Setting.BOX, Setting.CLICKS)
    clicks: int = 5
    with_nsd: bool = False
    objects_per_case: int = 0
    sentences_per_case: int = 0
    pictures: Path | None = None

    def __post_init__(self) -> None:
        known = (*TASKS, *EXTRA_TASKS)
        unknown = sorted(set(self.tasks) - set(known))
        if unknown or not self.tasks:
            raise DataError(f"tasks {list(self.tasks)} must be some of {', '.join(known)}")
        if self.clicks < 1:
            raise DataError(f"{self.clicks} clicks; give at least one step")


@dataclass(frozen=True)
class DrawnPicture:
    """A picture written to ``path``; ``score`` is the Dice it shows, None for a label map."""

    path: Path
    title: str
    score: float | None


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

    def __init__(
        self,
        plan: Plan,
        predictor: FullPredictor | None,
        controls: Sequence[Interactive],
        scorer: TextScorer | None = None,
    ) -> None:
        self.plan = plan
        self.predictor = predictor
        self.scorer = scorer or TextScorer()
        self.engines: list[Interactive] = [] if predictor is None else [PredictorEngine(predictor)]
        self.engines += controls
        self._controls = [control.name for control in controls]
        self.curves: list[ScoredCurve] = []
        self.semantic: list[tasks.MaskScore] = []
        self.referring: list[tasks.MaskScore] = []
        self.answers: list[language_tasks.AnswerScore] = []
        self.open_answers: list[language_tasks.WrittenAnswer] = []
        self.regions: list[language_tasks.WrittenAnswer] = []
        self.reports: list[language_tasks.ReportScore] = []
        self.pairs: list[language_tasks.EmbeddedPair] = []
        self.pictures: list[DrawnPicture] = []
        self.left_out: dict[str, list[str]] = {}

    def run(self, case: EvaluationCase, progress: Progress = lambda message: None) -> None:
        """Run every task of the plan on one case; ``progress`` hears what is being done."""
        self.left_out[case.name] = list(case.left_out)
        if self.predictor is not None:
            session = self.predictor.open(case.volume)
            label_map = self._mask_tasks(self.predictor, session, case, progress)
            text = self._text_tasks(self.predictor, session, case, progress)
            if self.plan.pictures is not None and label_map is not None:
                path = self.plan.pictures / f"{case.name}_semantic.png"
                pictures.draw(path, case.volume, label_map, f"{case.name}: semantic", CLASSES, text=text)
                self.pictures.append(DrawnPicture(path, f"{case.name}: semantic", None))
        if "interactive" in self.plan.tasks:
            self._interactive(case, progress)

    def run_text(self, case: EvaluationCase, progress: Progress = lambda message: None) -> None:
        """Run only the text tasks of the plan on one case: they are cheap, so there can be many more of them."""
        if self.predictor is not None:
            self._text_tasks(self.predictor, self.predictor.open(case.volume), case, progress)

    @property
    def retrieves(self) -> bool:
        """Whether the plan asks for retrieval and the model can do it."""
        return "retrieval" in self.plan.tasks and _encoder(self.predictor) is not None

    def run_retrieval(self, case: EvaluationCase, session: Any = None) -> None:
        """Add a case to the pool that volumes and reports are looked for in, if the plan and the model have that.

        ``session``: one that is open on the case's volume, if any.
        """
        encoder = _encoder(self.predictor)
        if encoder is not None and "retrieval" in self.plan.tasks:
            pair = language_tasks.embedded_pair(encoder, case, session)
            self.pairs += [] if pair is None else [pair]

    def _mask_tasks(
        self, predictor: FullPredictor, session: Any, case: EvaluationCase, progress: Progress
    ) -> np.ndarray | None:
        """Semantic and referring; the semantic label map for a picture."""
        label_map = None
        if "semantic" in self.plan.tasks and case.known:
            progress(f"{case.name}: semantic")
            scores, label_map = tasks.semantic(predictor, session, case, self.plan.with_nsd)
            self.semantic += scores
        if "referring" in self.plan.tasks:
            progress(f"{case.name}: referring")
            limit = self.plan.sentences_per_case
            self.referring += tasks.referring(predictor, session, case, limit, self.plan.with_nsd)
        return label_map

    def _text_tasks(self, predictor: FullPredictor, session: Any, case: EvaluationCase, progress: Progress) -> str:
        """Questions, regions, report and embeddings; the report as a picture's caption."""
        progress(f"{case.name}: text")
        if "vqa" in self.plan.tasks:
            self.answers += language_tasks.closed_questions(predictor, session, case)
        if "open_vqa" in self.plan.tasks:
            self.open_answers += language_tasks.open_questions(predictor, session, case)
        if "region" in self.plan.tasks:
            limit = self.plan.sentences_per_case
            self.regions += language_tasks.regions(predictor, session, case, limit)
        self.run_retrieval(case, session)
        score = language_tasks.report(predictor, session, case) if "report" in self.plan.tasks else None
        if score is None:
            return ""
        self.reports.append(score)
        return f"Report: {score.given}"

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
        self.pictures.append(DrawnPicture(path, title, last.step.dice))

    def figures(self) -> dict[str, Any]:
        """All figures as plain JSON values; texts are scored here."""
        result: dict[str, Any] = {"left_out_below_voxel_limit": self.left_out, "skipped": self._skipped()}
        if self.curves:
            result["interactive"] = report.interactive_figures(self.curves, "model", self._controls)
        if self.semantic:
            result["semantic"] = report.mask_figures(self.semantic)
        if self.referring:
            result["referring"] = report.mask_figures(self.referring)
        if self.answers:
            result["vqa"] = language_report.answer_figures(self.answers)
        if self.open_answers:
            result["open_vqa"] = language_report.written_figures(self.open_answers, self.scorer, True)
        if self.regions:
            result["region"] = language_report.written_figures(self.regions, self.scorer, False)
        if self.reports:
            result["report"] = language_report.report_figures(self.reports, self.scorer)
        if self.pairs:
            result["retrieval"] = language_report.retrieval_figures(self.pairs)
        return result

    def _skipped(self) -> dict[str, str]:
        """What of the plan was left out, with the reason."""
        skipped: dict[str, str] = {}
        if self.open_answers or self.regions or self.reports:
            skipped |= self.scorer.skipped
        if "retrieval" in self.plan.tasks and not self.retrieves:
            skipped["retrieval"] = NO_HEAD if self.predictor is not None else "no model was loaded"
        return skipped


def _encoder(predictor: object) -> language_tasks.ImageTextEncoder | None:
    """The predictor, if it has an image-text model."""
    return predictor if isinstance(predictor, language_tasks.ImageTextEncoder) and predictor.embeds else None
