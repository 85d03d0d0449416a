"""Text scores by hand, METEOR's two variants, and what is said when data or a package is missing."""

from __future__ import annotations

from pathlib import Path

import nltk
import pytest

from medvl_sam2.errors import DataError
from medvl_sam2.evaluation.text_scores import Meteor, TextScorer, load_bertscore


@pytest.fixture
def scorer() -> TextScorer:
    return TextScorer()


@pytest.fixture
def no_nltk_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [])


def test_bleu_by_hand(scorer: TextScorer) -> None:
    # Five of six words are right; no penalty, as the text is as long as its reference.
    score = scorer("the liver has a small cyst", "the liver has a large cyst")
    assert score.bleu_1 == pytest.approx(5 / 6)
    # Orders 1 to 4: 5/6, 3/5, 2/4, 1/3.
    assert score.bleu_4 == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    # Half as long: all words are right, penalty exp(1 - 6 / 3).
    assert scorer("the liver has", "the liver has a large cyst").bleu_1 == pytest.approx(0.36787944)
    # A word said twice is right once.
    assert scorer("cyst cyst", "a cyst").bleu_1 == pytest.approx(1 / 2)


def test_bleu_4_of_a_short_answer_is_nought_even_when_right(scorer: TextScorer) -> None:
    score = scorer("right kidney", "right kidney")
    assert (score.bleu_1, score.bleu_4) == (1.0, 0.0)


def test_rouge_by_hand(scorer: TextScorer) -> None:
    score = scorer("a cyst in the liver", "the liver holds a cyst")
    assert score.rouge_1 == pytest.approx(2 * (4 / 5) * (4 / 5) / (8 / 5))
    # Longest common subsequence: two words.
    assert score.rouge_l == pytest.approx(2 / 5)


@pytest.mark.usefixtures("no_nltk_data")
def test_meteor_without_data_matches_exact_words_and_stems() -> None:
    meteor = Meteor()
    assert meteor.variant == "exact and stem matching only, sentences split without the Punkt model"
    # m = 3 of 3 and 4 words: F = 10PR/(R+9P) = 10*1*.75/(.75+9); one chunk: penalty .5*(1/3)^3.
    expected = 10 * 0.75 / 9.75 * (1 - 0.5 / 27)
    assert meteor("the liver enlarged", "the liver enlarged today") == pytest.approx(expected)
    assert meteor("lesions", "lesion") == pytest.approx(0.5)  # a stem; one word is one chunk: half the score is lost
    assert meteor("tumour", "neoplasm") == 0.0


@pytest.mark.usefixtures("no_nltk_data")
def test_full_stops_between_sentences_are_words_of_their_own() -> None:
    assert Meteor().tokens("No cyst. The liver is normal.") == [
        "No", "cyst", ".", "The", "liver", "is", "normal", ".",
    ]  # fmt: skip


def test_meteor_with_wordnet_where_its_data_is_present() -> None:
    meteor = Meteor()
    if not meteor.has_synonyms:
        pytest.skip("nltk finds no WordNet data on this machine (NLTK_DATA)")
    assert "WordNet" in meteor.variant
    assert meteor("picture", "image") > 0


def test_texts_are_stripped_and_empty_ones_refused(scorer: TextScorer) -> None:
    assert scorer("  cyst \n", "cyst") == scorer("cyst", "cyst")
    nothing = scorer("", "a cyst")
    assert {nothing.bleu_1, nothing.bleu_4, nothing.rouge_1, nothing.rouge_l, nothing.meteor} == {0.0}
    with pytest.raises(DataError, match="empty reference"):
        scorer("cyst", "  ")


def test_bertscore_is_used_when_given_and_named_when_not(tmp_path: Path, scorer: TextScorer) -> None:
    assert scorer("cyst", "cyst").bert_f1 is None
    assert "BERTScore" in scorer.skipped
    judged = TextScorer(lambda given, expected: float(given == expected))
    assert judged("cyst", "cyst").bert_f1 == 1.0
    assert judged.skipped == {}
    with pytest.raises(DataError, match=r"no config\.json"):
        load_bertscore(tmp_path)


def test_bertscore_package_is_named_when_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bert_score", None)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="bert-score is not installed"):
        load_bertscore(tmp_path)
