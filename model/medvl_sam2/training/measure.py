"""Compares models the way they are used: the same boxes and clicks, the same class names, the served predictor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from medvl_sam2.errors import Cancelled
from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.modeling.compute import Precision
from medvl_sam2.training.clicks import box_prompt, next_click
from medvl_sam2.types import Prompt, Segmentation, Volume

SAME_PLACE = 0.5
"""Dice from which a prediction and a label count as the same place."""


class ServedPredictor(Protocol):
    """The part of the predictor that is measured."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names :meth:`segment_classes` takes."""

    @property
    def device(self) -> str:
        """Where it computes, as torch names it."""

    @property
    def precision(self) -> Precision:
        """Number format of slices."""

    def open(self, volume: Volume) -> Any:
        """A session on a volume."""

    def segment_prompt(self, session: Any, prompt: Prompt, name: str = "object") -> Segmentation:
        """Mask for a cumulative prompt."""

    def segment_classes(self, session: Any, classes: Sequence[str] = ()) -> Segmentation:
        """Masks of named classes."""


@dataclass(frozen=True, eq=False)
class LabelledCase:
    """A volume and the bool masks (I, J, K) of its structures on the stored grid, by name."""

    name: str
    volume: Volume
    masks: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Score:
    """Dice of one structure; ``kind`` is ``interactive`` (mean over the box and every click) or ``text``."""

    case: str
    structure: str
    kind: str
    dice: float


@dataclass(frozen=True)
class Naming:
    """What a model calls labelled places: ``wrong`` holds (case, label, model's name) of ``placed`` recognised ones."""

    placed: int
    wrong: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Measurement:
    """Scores of one model on one set of cases."""

    scores: tuple[Score, ...]
    naming: Naming

    def mean(self, kind: str) -> float | None:
        """Mean Dice of a kind, None when nothing of it was measured."""
        values = [score.dice for score in self.scores if score.kind == kind]
        return float(np.mean(values)) if values else None

    @property
    def overall(self) -> float:
        """Mean of the kinds that were measured: clicking and naming weigh the same."""
        means = [value for value in (self.mean("interactive"), self.mean("text")) if value is not None]
        return float(np.mean(means)) if means else 0.0


def measure(
    predictor: ServedPredictor,
    cases: Sequence[LabelledCase],
    clicks: int,
    objects: int,
    min_voxels: int,
    should_stop: Callable[[], bool],
) -> Measurement:
    """Box and ``clicks`` corrective clicks on at most ``objects`` structures, and every labelled class by its name.

    Raises:
        Cancelled: ``should_stop`` said so between two structures.
    """
    scores: list[Score] = []
    placed = 0
    wrong: list[tuple[str, str, str]] = []
    chosen = choose_objects(cases, objects, min_voxels)
    for case in cases:
        session = predictor.open(case.volume)
        for name in chosen[case.name]:
            _check(should_stop)
            scores.append(Score(case.name, name, "interactive", _click_through(predictor, session, case, name, clicks)))
        named = [name for name in case.masks if name in predictor.classes]
        if named:
            _check(should_stop)
            masks = _masks_by_class(predictor, session)
            for name in named:
                scores.append(Score(case.name, name, "text", dice(case.masks[name], masks[name])))
                if name == "lesion":
                    continue  # lies in an organ, whose name is right there as well
                overlap = {other: dice(case.masks[name], mask) for other, mask in masks.items() if other != "lesion"}
                called = max(overlap, key=lambda other: overlap[other])
                if overlap[called] >= SAME_PLACE:
                    placed += 1
                    if called != name:
                        wrong.append((case.name, name, called))
    return Measurement(tuple(scores), Naming(placed, tuple(wrong)))


def choose_objects(cases: Sequence[LabelledCase], objects: int, min_voxels: int) -> dict[str, tuple[str, ...]]:
    """Structures to click at by case name: larger ones first, case after case in turn, the same for every model."""
    waiting = {
        case.name: sorted(
            (name for name, mask in case.masks.items() if int(mask.sum()) >= min_voxels),
            key=lambda name, masks=case.masks: (-int(masks[name].sum()), name),  # type: ignore[misc]
        )
        for case in cases
    }
    chosen: dict[str, list[str]] = {case.name: [] for case in cases}
    left = objects
    while left > 0 and any(waiting.values()):
        for case, names in waiting.items():
            if names and left > 0:
                chosen[case].append(names.pop(0))
                left -= 1
    return {case: tuple(names) for case, names in chosen.items()}


def dice(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Dice of two bool arrays; 1 when both are empty."""
    total = int(truth.sum()) + int(prediction.sum())
    return 1.0 if total == 0 else 2.0 * int((truth & prediction).sum()) / total


def _click_through(predictor: ServedPredictor, session: Any, case: LabelledCase, name: str, clicks: int) -> float:
    transform = CanonicalTransform(case.volume.geometry)
    truth = np.ascontiguousarray(transform.forward_array(case.masks[name]))
    box = transform.inverse_box(box_prompt(truth).astype(np.float64))
    points: list[np.ndarray] = []
    labels: list[int] = []
    values: list[float] = []
    for placed in range(clicks + 1):
        prompt = Prompt(np.array(points).reshape(-1, 3), np.array(labels, dtype=np.int64), box)
        stored = predictor.segment_prompt(session, prompt, f"measure {name}").mask > 0
        mask = np.ascontiguousarray(transform.forward_array(stored))
        values.append(dice(truth, mask))
        click = next_click(truth, mask) if placed < clicks else None
        if click is None:
            # Nothing left to correct: the score stands for the clicks that cannot be placed.
            values += [values[-1]] * (clicks - placed)
            break
        points.append(transform.inverse_points(np.array([click.position], dtype=np.float64))[0])
        labels.append(click.label)
    return float(np.mean(values))


def _masks_by_class(predictor: ServedPredictor, session: Any) -> dict[str, np.ndarray]:
    segmentation = predictor.segment_classes(session, predictor.classes)
    return {name: segmentation.mask == value for value, name in enumerate(segmentation.names, start=1)}


def _check(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise Cancelled("stopped while models were compared; start again to resume")
