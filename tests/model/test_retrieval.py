"""Recall by hand, ties, equal texts, and properties on random embeddings."""

from __future__ import annotations

import numpy as np
import pytest

from medvl_sam2.errors import DataError
from medvl_sam2.evaluation.retrieval import Direction, Recall, recalls
from medvl_sam2.training.recall import hits


def names(count: int) -> list[str]:
    return [f"text {n}" for n in range(count)]


def found(values: list[Recall], pairs: int, direction: Direction, depth: int) -> Recall:
    (value,) = [v for v in values if (v.pairs, v.direction, v.depth) == (pairs, direction, depth)]
    return value


def test_hits_by_hand() -> None:
    similarity = np.array([[0.9, 0.1, 0.3], [0.8, 0.5, 0.1], [0.9, 0.7, 0.2]])
    right = np.eye(3, dtype=bool)
    assert hits(similarity, right, 1).tolist() == [1, 0, 0]
    assert hits(similarity, right, 2).tolist() == [1, 1, 0]
    assert hits(similarity, right, 3).tolist() == [1, 1, 1]
    # The other direction asks columns: images 0 and 2 are as good for text 0, image 2 is best for text 1.
    assert hits(similarity.T, right, 1).tolist() == [0.5, 0, 0]
    assert hits(similarity.T, right, 2).tolist() == [1, 1, 1]


def test_ties_are_worth_their_share() -> None:
    same = np.ones((4, 4))
    assert hits(same, np.eye(4, dtype=bool), 1).tolist() == pytest.approx([0.25] * 4)
    assert hits(same, np.eye(4, dtype=bool), 3).tolist() == pytest.approx([0.75] * 4)
    # Two right ones in a tie of four: both places wrong with probability 2/4 * 1/3.
    right = np.array([[True, True, False, False]] * 4)
    assert hits(same, right, 2).tolist() == pytest.approx([1 - 2 / 4 * 1 / 3] * 4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_similarity_that_is_no_number_is_no_hit(value: float) -> None:
    with pytest.raises(DataError, match="not finite"):
        hits(np.full((3, 3), value), np.eye(3, dtype=bool), 1)


def test_an_encoder_that_sees_nothing_scores_chance() -> None:
    blind = np.ones((20, 3))
    for value in recalls(blind, blind, names(20), names(20)):
        assert value.recall.mean == pytest.approx(value.chance)
        assert value.chance == value.depth / 20


def test_first_pairs_are_scored_in_both_directions() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(120, 8))
    texts = images + rng.normal(scale=0.8, size=images.shape)
    values = recalls(images, texts, names(120), names(120), pairs=(50, 100, 500))
    assert {v.pairs for v in values} == {50, 100}
    assert {v.depth for v in values} == {1, 5, 10}
    for direction in Direction:
        similarity = images[:50] @ texts[:50].T if direction is Direction.IMAGE_TO_TEXT else texts[:50] @ images[:50].T
        for depth in (1, 5, 10):
            order = np.argsort(-similarity, axis=1)[:, :depth]
            expected = np.mean([n in order[n] for n in range(50)])
            assert found(values, 50, direction, depth).recall.mean == pytest.approx(expected)
        assert (
            found(values, 100, direction, 1).recall.mean
            <= found(values, 100, direction, 5).recall.mean
            <= found(values, 100, direction, 10).recall.mean
        )
    assert {v.pairs for v in recalls(images, texts, names(120), names(120), pairs=(500,))} == {120}


def test_equal_texts_are_interchangeable_only_where_it_says_so() -> None:
    # Two pairs share their text, so their text embeddings are one; the images differ.
    images = np.array([[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0]])
    texts = np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    values = recalls(images, texts, ["normal", "normal", "a cyst"], names(3))
    to_text = found(values, 3, Direction.IMAGE_TO_TEXT, 1)
    assert to_text.recall.mean == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert to_text.equal_texts_right.mean == 1.0
    to_image = found(values, 3, Direction.TEXT_TO_IMAGE, 1)
    assert to_image.recall.mean == pytest.approx(2 / 3)
    assert to_image.equal_texts_right.mean == 1.0
    assert to_text.chance == pytest.approx(1 / 3)
    assert to_text.chance_equal_texts == pytest.approx((2 + 2 + 1) / 9)  # who sees nothing also gains by equal texts


def test_impossible_embeddings_are_refused() -> None:
    good = np.ones((3, 2))
    with pytest.raises(DataError, match="one row"):
        recalls(good, good[:2], names(3), names(3))
    with pytest.raises(DataError, match="not finite"):
        recalls(good, np.full((3, 2), np.nan), names(3), names(3))
