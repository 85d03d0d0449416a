"""The challenge's loop over one case, in this process: a box step, then a click a class and step, for all classes.

One step answers every class from its own prompts; the answers become one label map, and the next clicks go into its
errors, class by class. Scores are those of ``CVPR25_iter_eval.py``: means over classes; NSD at 2 mm, 0 where the mean
Dice is at most 0.2.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from medvl_sam2.errors import DataError
from medvl_sam2.evaluation.challenge.case import ChallengeCase, painted
from medvl_sam2.evaluation.metrics import CLICKS_IN_AUC, area_under_clicks, overlap
from medvl_sam2.evaluation.protocol import Annotator, Interactive
from medvl_sam2.evaluation.surface import surface_dice
from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.training.clicks import Click

NSD_TOLERANCE_MM = 2.0
LEAST_DSC_FOR_NSD = 0.2


@dataclass(frozen=True)
class Scores:
    """Dice and surface Dice a class; ``nsd`` is None where the mean Dice is too low for it to be measured."""

    dsc: tuple[float, ...]
    nsd: tuple[float, ...] | None

    @property
    def mean_dsc(self) -> float:
        """Mean over classes."""
        return float(np.mean(self.dsc))

    @property
    def mean_nsd(self) -> float:
        """Mean over classes, 0 where it was not measured."""
        return 0.0 if self.nsd is None else float(np.mean(self.nsd))


@dataclass(frozen=True)
class CaseStep:
    """State after a step: clicks placed so far a class (0: the box), the scores, and seconds the engine took."""

    number: int
    scores: Scores
    seconds: float


@dataclass(frozen=True)
class CaseCurve:
    """The loop on one case; ``clicks[n]`` are those of class ``n``, canonical (z, y, x), in their order."""

    steps: tuple[CaseStep, ...]
    clicks: tuple[tuple[Click, ...], ...]

    @property
    def dsc_auc(self) -> float:
        """Area over the first five click steps, at most 4."""
        return area_under_clicks([step.scores.mean_dsc for step in self._clicked()])

    @property
    def nsd_auc(self) -> float:
        """The same of NSD."""
        return area_under_clicks([step.scores.mean_nsd for step in self._clicked()])

    @property
    def final(self) -> Scores:
        """Scores after the fifth click."""
        return self._clicked()[CLICKS_IN_AUC - 1].scores

    def _clicked(self) -> list[CaseStep]:
        return [step for step in self.steps if step.number > 0]


Watch = Callable[[int, np.ndarray], None]
"""Called after each step with its number of clicks and the label map (Z, Y, X)."""


def score(truth: np.ndarray, answer: np.ndarray, classes: int, spacing: tuple[float, float, float]) -> Scores:
    """Scores of an answer against a truth, label maps (Z, Y, X) of 1..``classes``; ``spacing`` in mm along the axes."""
    pairs = [(truth == value, answer == value) for value in range(1, classes + 1)]
    dsc = tuple(2.0 * counts.both / (counts.truth + counts.prediction) for counts in (overlap(*p) for p in pairs))
    if np.mean(dsc) <= LEAST_DSC_FOR_NSD:
        return Scores(dsc, None)
    values = [surface_dice(*pair, spacing, NSD_TOLERANCE_MM) for pair in pairs]
    return Scores(dsc, tuple(0.0 if value is None else value for value in values))


def run_case(
    engine: Interactive,
    case: ChallengeCase,
    clicks: int = CLICKS_IN_AUC,
    human: int | None = None,
    watch: Watch = lambda number, answer: None,
) -> CaseCurve:
    """Run the loop on one case.

    ``human`` seeds clicks that are drawn inside the error instead of being put at its deepest voxel. A class that is
    right keeps its answer; a step without any click repeats the scores.
    """
    if clicks < CLICKS_IN_AUC:
        raise DataError(f"{clicks} clicks; the protocol's areas need {CLICKS_IN_AUC} or more")
    transform = CanonicalTransform(case.volume.geometry)
    annotators = _annotators(case, transform, human)
    opened = engine.open(case.volume)
    masks: list[np.ndarray | None] = [None] * len(annotators)
    answer = np.zeros_like(case.labels)
    steps: list[CaseStep] = []
    for number in range(1 if case.boxes is None else 0, clicks + 1):
        seconds, asked = 0.0, False
        for index, annotator in enumerate(annotators):
            if number > 0 and not annotator.correct(answer == index + 1):
                continue
            asked = True
            started = time.perf_counter()
            found = engine.segment(opened, annotator.prompt(), f"{index + 1} {case.names[index]}")
            seconds += time.perf_counter() - started
            masks[index] = transform.forward_array(np.asarray(found) > 0)
        if asked:
            answer = painted(masks, transform.shape)
            scores = score(case.labels, answer, len(case.names), transform.spacing)
        steps.append(CaseStep(number, scores, seconds))
        watch(number, answer)
    return CaseCurve(tuple(steps), tuple(tuple(annotator.clicks) for annotator in annotators))


def _annotators(case: ChallengeCase, transform: CanonicalTransform, human: int | None) -> list[Annotator]:
    """One a class, each with a stream of its own, so that an engine changes nobody else's clicks."""
    boxes: Sequence[np.ndarray | None] = case.boxes or [None] * len(case.names)
    made = []
    for index, box in enumerate(boxes):
        rng = None if human is None else np.random.default_rng([human, index, *case.name.encode()])
        made.append(Annotator(np.ascontiguousarray(case.labels == index + 1), transform, box, rng))
    return made
