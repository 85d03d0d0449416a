"""The tasks without clicks that give masks: classes by name, and structures referred to by a sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from medvl_sam2.evaluation.boxes import BoxScore, box_of, score_box
from medvl_sam2.evaluation.cases import EvaluationCase
from medvl_sam2.evaluation.metrics import Overlap, overlap
from medvl_sam2.evaluation.relatives import totalsegmentator_surface_dice
from medvl_sam2.evaluation.surface import surface_dice
from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.synthesis.records import Referring
from medvl_sam2.types import Segmentation, Volume
from medvl_sam2.vocabulary import CLASSES, spoken

ABSENT_RULE = (
    "a class that is asked for but absent scores 0 when anything is predicted, and is left out when nothing is; "
    "real cases are asked only for the classes their masks decide; an organ includes its lesions"
)
Item = TypeVar("Item")


class MaskPredictor(Protocol):
    """The part of the predictor these tasks use."""

    def open(self, volume: Volume) -> Any:
        """A session on a volume."""

    def segment_classes(
        self, session: Any, classes: Sequence[str], progress: Callable[[float, str], None] | None = None
    ) -> Segmentation:
        """Label map of vocabulary classes, values in the order asked."""

    def segment_text(self, session: Any, text: str) -> Segmentation:
        """Mask for a sentence."""


@dataclass(frozen=True)
class Surfaces:
    """Surface Dice of one structure: ``nsd_2mm`` ours, ``totalsegmentator_3mm`` theirs (NaN where it is absent)."""

    nsd_2mm: float
    totalsegmentator_3mm: float


@dataclass(frozen=True)
class MaskScore:
    """Scores of one structure in one case; one that is neither there nor predicted has none.

    ``surfaces`` where they were asked for; ``box`` (referring sentences whose structure is there): the box of the
    predicted mask against that of the truth, M3D's referring comprehension.
    """

    case: str
    patient: str
    split: str
    structure: str
    dice: float
    overlap: Overlap
    prompt: str
    surfaces: Surfaces | None = None
    box: BoxScore | None = None

    @property
    def present(self) -> bool:
        """Whether the truth holds the structure; an absent one that is predicted scores 0."""
        return self.overlap.truth > 0


def semantic(
    predictor: MaskPredictor, session: Any, case: EvaluationCase, with_nsd: bool = False
) -> tuple[list[MaskScore], np.ndarray]:
    """Scores of every known class, and the organ label map (I, J, K) with values in vocabulary order for a picture.

    ``with_nsd`` adds surface Dice.
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
            scores += _score(case, name, case.classes.get(name), found, name, with_nsd)
    return scores, picture


def referring(
    predictor: MaskPredictor, session: Any, case: EvaluationCase, limit: int = 0, with_nsd: bool = False
) -> list[MaskScore]:
    """Scores of referring sentences, boxes among them; ``with_nsd`` adds surface Dice.

    Generated cases ask their own sentences (at most ``limit`` drawn by the case's name, 0 for all); real cases ask for
    every class they hold ("segment the left kidney").
    """
    scores: list[MaskScore] = []
    if case.generated is None:
        for name, mask in case.classes.items():
            text = f"segment the {spoken(name)}"
            found = predictor.segment_text(session, text).mask > 0
            scores += _score(case, name, mask, found, text, with_nsd, with_box=True)
        return scores
    stored = CanonicalTransform(case.volume.geometry).inverse_array
    for item in draw_some(case.generated.referring, limit, case.name):
        truth = stored(case.generated.target(item))
        found = predictor.segment_text(session, item.text).mask > 0
        scores += _score(case, _referred(item), truth, found, item.text, with_nsd, with_box=True)
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
    case: EvaluationCase,
    name: str,
    truth: np.ndarray | None,
    found: np.ndarray,
    prompt: str,
    with_nsd: bool,
    with_box: bool = False,
) -> list[MaskScore]:
    """The score as a list of one, or none where nothing is there and nothing was found."""
    target = np.zeros(found.shape, dtype=bool) if truth is None else truth
    counts = overlap(target, found)
    value = counts.dice
    if value is None:
        return []
    surfaces = _surfaces(case, target, found) if with_nsd else None
    box = _box(case, target, found) if with_box and counts.truth else None
    return [MaskScore(case.name, case.patient, case.split, name, value, counts, prompt, surfaces, box)]


def _surfaces(case: EvaluationCase, truth: np.ndarray, found: np.ndarray) -> Surfaces:
    """Surface Dice of two masks of which one at least is not empty; distances are the same in the stored frame."""
    spacing = case.volume.geometry.spacing
    nsd = surface_dice(truth, found, spacing)
    return Surfaces(0.0 if nsd is None else nsd, totalsegmentator_surface_dice(truth, found, spacing))


def _box(case: EvaluationCase, truth: np.ndarray, found: np.ndarray) -> BoxScore | None:
    """Boxes in the canonical frame; None for an empty truth."""
    forward = CanonicalTransform(case.volume.geometry).forward_array
    target = forward(truth)
    wanted = box_of(target)
    z, y, x = target.shape
    return None if wanted is None else score_box(wanted, box_of(forward(found)), (z, y, x))
