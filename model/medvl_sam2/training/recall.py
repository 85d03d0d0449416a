"""When a search among volumes or reports counts as a hit; the one rule of training and evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medvl_sam2.errors import DataError


def equal_texts(wording: Sequence[str]) -> np.ndarray:
    """Which texts are word for word the same: bool (N, N)."""
    _, codes = np.unique(np.asarray(wording), return_inverse=True)
    same: np.ndarray = codes[:, None] == codes[None, :]
    return same


def hits(similarity: np.ndarray, right: np.ndarray, depth: int) -> np.ndarray:
    """Hit of each row in [0, 1]: is one of its ``right`` columns among the ``depth`` most similar?

    ``similarity`` (N, N), ``right`` bool (N, N) with at least one column a row. A right column that ties with wrong
    ones counts by the probability that a random order of the tie puts it, the first of its kind, within ``depth``.
    Raises :class:`DataError` for a similarity that is not finite: nothing compares as larger than NaN, so every row
    would be a hit.
    """
    if not np.isfinite(similarity).all():
        raise DataError("similarities hold values that are not finite; repair the encoder before scoring it")
    best = np.where(right, similarity, -np.inf).max(axis=1, keepdims=True)
    before = (~right & (similarity > best)).sum(axis=1)
    wrong = (~right & (similarity == best)).sum(axis=1)
    tied = (right & (similarity == best)).sum(axis=1)
    places = np.maximum(depth - before, 0)
    return np.array([1.0 - _all_wrong(int(w), int(t), int(p)) for w, t, p in zip(wrong, tied, places, strict=True)])


def chance(right: np.ndarray, depth: int) -> float:
    """Mean hit of an encoder that sees nothing, where every column of a row is equally similar."""
    return float(hits(np.zeros(right.shape), right, depth).mean())


def _all_wrong(wrong: int, right: int, places: int) -> float:
    """Probability that the first ``places`` of a shuffled tie hold only wrong ones."""
    if places > wrong:
        return 0.0
    return float(np.prod([(wrong - n) / (wrong + right - n) for n in range(places)]))
