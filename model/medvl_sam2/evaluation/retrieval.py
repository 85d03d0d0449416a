"""Image-text retrieval: recall at 1, 5 and 10 in both directions over the first N pairs, from two embedding matrices.

The relatives (BAAI-DCAI/M3D ``Bench/eval/eval_itr.py``, mirthAI/Med3DVLM ``src/eval/eval_clip.py``) count a hit when
the paired item is among the k most similar; they print images asking for texts as "IR" and texts asking for images as
"TR". Two points are settled here that their script leaves to chance:

* equal similarities: a tie is worth its share, so that an encoder that sees nothing scores exactly chance;
* equal texts: two studies with the same report have no right order. Beside the relatives' rule the recall is given
  with every image of an equal text counting as right.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from medvl_sam2.errors import DataError
from medvl_sam2.evaluation.metrics import Interval, bootstrap
from medvl_sam2.training.recall import chance, equal_texts, hits

PAIRS = (100, 500, 1000, 2000)
"""Numbers of pairs the relatives report; recall falls as the number grows."""
DEPTHS = (1, 5, 10)


class Direction(StrEnum):
    """Who asks for whom."""

    IMAGE_TO_TEXT = "image to text"
    TEXT_TO_IMAGE = "text to image"


@dataclass(frozen=True)
class Recall:
    """Recall at ``depth`` over the first ``pairs``; ``equal_texts_right``: with equal texts interchangeable.

    Each stands beside what an encoder that sees nothing reaches.
    """

    pairs: int
    direction: Direction
    depth: int
    recall: Interval
    equal_texts_right: Interval
    chance: float
    chance_equal_texts: float


def recalls(
    images: np.ndarray,
    texts: np.ndarray,
    wording: Sequence[str],
    patients: Sequence[Hashable],
    pairs: Sequence[int] = PAIRS,
) -> list[Recall]:
    """Recall of every direction and depth for each number of ``pairs`` there is data for, or for all there are.

    ``images`` and ``texts`` (N, D): row n of both is one pair; similarity is their product, so rows are given with
    norm 1. ``wording``: the N texts; ``patients``: units of the bootstrap. Raises :class:`DataError` where the parts
    do not fit together or are not finite.
    """
    count = len(wording)
    if images.shape != texts.shape or images.ndim != 2 or not len(images) == count == len(patients):
        raise DataError(
            f"images {images.shape}, texts {texts.shape}, {count} wordings, {len(patients)} patients; give one row "
            "and one name of each a pair"
        )
    with np.errstate(invalid="ignore"):  # hits() refuses what is not finite
        similarity = images.astype(np.float64) @ texts.astype(np.float64).T
    equal = equal_texts(wording)
    found = []
    for size in [size for size in pairs if size <= count] or ([count] if count else []):
        for direction in Direction:
            part = similarity[:size, :size] if direction is Direction.IMAGE_TO_TEXT else similarity[:size, :size].T
            for depth in (depth for depth in DEPTHS if depth <= size):
                own, same = np.eye(size, dtype=bool), equal[:size, :size]
                strict = bootstrap(hits(part, own, depth).tolist(), patients[:size])
                lenient = bootstrap(hits(part, same, depth).tolist(), patients[:size])
                if strict is not None and lenient is not None:
                    found.append(Recall(size, direction, depth, strict, lenient, depth / size, chance(same, depth)))
    return found
