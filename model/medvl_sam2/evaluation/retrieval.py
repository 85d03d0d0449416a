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

PAIRS = (100, 500, 1000, 2000)
"""Numbers of pairs the relatives report; recall falls as the number grows."""
DEPTHS = (1, 5, 10)


class Direction(StrEnum):
    """Who asks for whom."""

    IMAGE_TO_TEXT = "image to text"
    TEXT_TO_IMAGE = "text to image"


@dataclass(frozen=True)
class Recall:
    """Recall at ``depth`` over the first ``pairs``; ``equal_texts_right``: with equal texts interchangeable."""

    pairs: int
    direction: Direction
    depth: int
    recall: Interval
    equal_texts_right: Interval
    chance: float


def recalls(
    images: np.ndarray,
    texts: np.ndarray,
    wording: Sequence[str],
    patients: Sequence[Hashable],
    pairs: Sequence[int] = PAIRS,
) -> list[Recall]:
    """Recall of every direction and depth for each number of ``pairs`` there is data for, or for all there are.

    ``images`` and ``texts`` (N, D): row n of both is one pair; similarity is their product, so rows are given with
    norm 1. ``wording``: the N texts; ``patients``: units of the bootstrap.
    """
    count = len(wording)
    if images.shape != texts.shape or images.ndim != 2 or not len(images) == count == len(patients):
        raise DataError(
            f"images {images.shape}, texts {texts.shape}, {count} wordings, {len(patients)} patients; give one row "
            "and one name of each a pair"
        )
    if not (np.isfinite(images).all() and np.isfinite(texts).all()):
        raise DataError("embeddings hold values that are not finite; repair the encoder before scoring it")
    similarity = images.astype(np.float64) @ texts.astype(np.float64).T
    _, codes = np.unique(np.asarray(wording), return_inverse=True)
    equal = codes[:, None] == codes[None, :]
    found = []
    for size in [size for size in pairs if size <= count] or ([count] if count else []):
        for direction in Direction:
            part = similarity[:size, :size] if direction is Direction.IMAGE_TO_TEXT else similarity[:size, :size].T
            for depth in (depth for depth in DEPTHS if depth <= size):
                strict = bootstrap(hits(part, np.eye(size, dtype=bool), depth).tolist(), patients[:size])
                lenient = bootstrap(hits(part, equal[:size, :size], depth).tolist(), patients[:size])
                if strict is not None and lenient is not None:
                    found.append(Recall(size, direction, depth, strict, lenient, depth / size))
    return found


def hits(similarity: np.ndarray, right: np.ndarray, depth: int) -> np.ndarray:
    """Hit of each row in [0, 1]: is one of its ``right`` columns among the ``depth`` most similar?

    ``similarity`` (N, N), ``right`` bool (N, N) with at least one column a row. A right column that ties with wrong
    ones counts by the probability that a random order of the tie puts it, the first of its kind, within ``depth``.
    """
    best = np.where(right, similarity, -np.inf).max(axis=1, keepdims=True)
    before = (~right & (similarity > best)).sum(axis=1)
    wrong = (~right & (similarity == best)).sum(axis=1)
    tied = (right & (similarity == best)).sum(axis=1)
    places = np.maximum(depth - before, 0)
    return np.array([1.0 - _all_wrong(int(w), int(t), int(p)) for w, t, p in zip(wrong, tied, places, strict=True)])


def _all_wrong(wrong: int, right: int, places: int) -> float:
    """Probability that the first ``places`` of a shuffled tie hold only wrong ones."""
    if places > wrong:
        return 0.0
    return float(np.prod([(wrong - n) / (wrong + right - n) for n in range(places)]))
