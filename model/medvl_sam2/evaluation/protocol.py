"""The interactive loop over one object: prompt, mask, simulated correction, mask again.

Two settings:

* ``box``: a 3D box (in plane the box of the middle labelled slice, exact range of slices), then clicks;
* ``clicks``: clicks only, the first at the deepest point of the object.

Clicks follow :mod:`medvl_sam2.training.clicks`, in the canonical frame; prompts reach the engine in stored voxels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import numpy as np

from medvl_sam2.errors import DataError
from medvl_sam2.evaluation.metrics import CLICKS_IN_AUC, area_under_clicks, dice
from medvl_sam2.evaluation.surface import surface_dice
from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.training.clicks import Click, box_prompt, next_click
from medvl_sam2.types import Prompt, Segmentation, Volume


class Setting(StrEnum):
    """What the simulated annotator starts with."""

    BOX = "box"
    CLICKS = "clicks"


class Interactive(Protocol):
    """Anything that answers cumulative prompts: the predictor (through :class:`PredictorEngine`) or a control."""

    name: str

    def open(self, volume: Volume) -> Any:
        """A handle for one volume, shared by its objects."""

    def segment(self, opened: Any, prompt: Prompt, name: str = "object") -> np.ndarray:
        """Bool mask (I, J, K) on the stored grid; ``name`` tells apart objects that are worked on in turn."""


class PromptPredictor(Protocol):
    """The part of the predictor the loop uses."""

    def open(self, volume: Volume) -> Any:
        """A session on a volume."""

    def segment_prompt(self, session: Any, prompt: Prompt, name: str = "object") -> Segmentation:
        """Mask for a cumulative prompt."""


class PredictorEngine:
    """The predictor as an :class:`Interactive`."""

    def __init__(self, predictor: PromptPredictor, name: str = "model") -> None:
        self.predictor = predictor
        self.name = name

    def open(self, volume: Volume) -> Any:
        """A predictor session."""
        return self.predictor.open(volume)

    def segment(self, opened: Any, prompt: Prompt, name: str = "object") -> np.ndarray:
        """Bool mask (I, J, K)."""
        return self.predictor.segment_prompt(opened, prompt, name).mask > 0


HUMAN_CORE = 0.5
"""A human-like click lies anywhere at least this share of the error's greatest depth inside it."""


class Annotator:
    """Simulated annotator of one object: what it should be, and the prompts given so far.

    ``target`` bool (Z, Y, X) and ``box`` (2, 3) are canonical; ``transform`` makes stored voxels of them. With
    ``human`` a click is drawn from the deep half of the error instead of being put at its deepest voxel.
    """

    def __init__(
        self,
        target: np.ndarray,
        transform: CanonicalTransform,
        box: np.ndarray | None,
        human: np.random.Generator | None = None,
    ) -> None:
        self.target = target
        self.clicks: list[Click] = []
        self._transform = transform
        self._box = None if box is None else transform.inverse_box(box.astype(np.float64))
        self._human = human

    def correct(self, mask: np.ndarray | None) -> bool:
        """Click into the largest error of a canonical mask (None: empty); False where nothing is left to correct."""
        click = next_click(self.target, mask, self._human, 1.0 if self._human is None else HUMAN_CORE)
        if click is not None:
            self.clicks.append(click)
        return click is not None

    def prompt(self) -> Prompt:
        """Everything said so far, in stored voxels."""
        points = np.array([click.position for click in self.clicks], dtype=np.float64)
        labels = np.array([click.label for click in self.clicks], dtype=np.int64)
        return Prompt(self._transform.inverse_points(points), labels, self._box)


@dataclass(frozen=True)
class Step:
    """State after one prompt: ``clicks`` placed so far (0 after the box), scores, and seconds the engine took.

    ``seconds`` is None for a step without a new prompt (nothing left to correct): the scores then repeat.
    """

    clicks: int
    dice: float
    nsd: float | None
    seconds: float | None


@dataclass(frozen=True)
class Curve:
    """The loop on one object; ``steps`` begin with the box step in the box setting, else with the first click."""

    structure: str
    setting: Setting
    engine: str
    steps: tuple[Step, ...]

    def after(self, clicks: int) -> float:
        """Dice after a number of clicks (0: after the box)."""
        for step in self.steps:
            if step.clicks == clicks:
                return step.dice
        raise DataError(f"no step with {clicks} clicks in the {self.setting.value} setting; steps: {len(self.steps)}")

    @property
    def auc(self) -> float | None:
        """DSC_AUC over clicks 1..5 (at most 4), None with fewer clicks."""
        clicked = [step.dice for step in self.steps if step.clicks > 0]
        return area_under_clicks(clicked) if len(clicked) >= CLICKS_IN_AUC else None


Watch = Callable[[Prompt, np.ndarray, Step], None]
"""Called after each step with the stored-frame prompt, the stored-grid mask and the scores."""


def run_object(
    engine: Interactive,
    opened: Any,
    volume: Volume,
    truth: np.ndarray,
    structure: str,
    setting: Setting,
    clicks: int = 5,
    with_nsd: bool = False,
    watch: Watch | None = None,
) -> Curve:
    """Run the loop on one object: ``truth`` is bool (I, J, K) on the stored grid of ``volume``, not empty."""
    transform = CanonicalTransform(volume.geometry)
    target = np.ascontiguousarray(transform.forward_array(truth.astype(bool, copy=False)))
    if not target.any():
        raise DataError(f"structure {structure!r} is empty; choose structures that are present")
    annotator = Annotator(target, transform, box_prompt(target) if setting is Setting.BOX else None)
    steps: list[Step] = []
    mask = None
    for placed in range(0 if setting is Setting.BOX else 1, clicks + 1):
        if placed > 0 and not annotator.correct(mask):
            # Nothing to correct: further clicks cannot be placed, so the score stands.
            steps.append(Step(placed, steps[-1].dice, steps[-1].nsd, None))
            continue
        prompt = annotator.prompt()
        started = time.perf_counter()
        stored = np.asarray(engine.segment(opened, prompt))
        seconds = time.perf_counter() - started
        mask = np.ascontiguousarray(transform.forward_array(stored > 0))
        score = dice(target, mask)
        nsd = surface_dice(target, mask, transform.spacing) if with_nsd else None
        steps.append(Step(placed, 0.0 if score is None else score, nsd, seconds))
        if watch is not None:
            watch(prompt, stored, steps[-1])
    return Curve(structure, setting, engine.name, tuple(steps))


@dataclass(frozen=True)
class ScoredCurve:
    """A curve with where it comes from; ``patient`` is the unit of the bootstrap."""

    case: str
    patient: str
    split: str
    voxels: int
    curve: Curve
