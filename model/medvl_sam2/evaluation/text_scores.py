"""Scores of generated text against one reference: BLEU, ROUGE, METEOR and BERTScore, each from its own library.

The relatives (BAAI-DCAI/M3D, mirthAI/Med3DVLM ``eval_caption.py``, ``eval_vqa.py``) score every sample with the
``evaluate`` package and average: BLEU with order 1, ROUGE-1, METEOR, BERTScore F1. That package fetches its modules
from a hub at run time, so the libraries below it are called directly:

* BLEU: sacrebleu, tokenizer 13a, no smoothing (``evaluate`` carries the same tokenizer and formula). A text of fewer
  than four tokens has no 4-gram, so its BLEU-4 is 0 even when right: read BLEU-4 for reports, not for short answers.
* ROUGE-1 and ROUGE-L: rouge-score, F measure, no stemming.
* METEOR: nltk. The published measure needs WordNet's synonyms and the Punkt sentence model, data that nltk downloads
  and this project does not. Where nltk finds them (environment variable ``NLTK_DATA``) they are used; without them the
  same code runs with exact and stem matching only and an untrained sentence splitter. :class:`Meteor` says which, and
  figures carry it: the two are not to be compared.
* BERTScore: the bert-score package with a local model folder; left out where either is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nltk
from nltk.corpus import wordnet
from nltk.tokenize import NLTKWordTokenizer, word_tokenize
from nltk.tokenize.punkt import PunktSentenceTokenizer
from nltk.translate.meteor_score import single_meteor_score
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from medvl_sam2.errors import DataError

BERTSCORE_LAYERS = 17
"""Layer of roberta-large whose states the BERTScore of English texts compares (the package's own choice)."""


@dataclass(frozen=True)
class TextScore:
    """Scores of one text in [0, 1]; ``bert_f1`` None where BERTScore is left out (it may lie outside [0, 1])."""

    bleu_1: float
    bleu_4: float
    rouge_1: float
    rouge_l: float
    meteor: float
    bert_f1: float | None = None


class _NoSynonyms:
    """Stands for WordNet where its data is missing: no word has a synonym."""

    def synsets(self, word: str) -> list[Any]:
        return []


class Meteor:
    """METEOR by nltk with as much of its data as this machine holds."""

    def __init__(self) -> None:
        self.has_synonyms = _found("corpora/wordnet") or _found("corpora/wordnet.zip")
        self.has_sentences = _found("tokenizers/punkt_tab/english")
        self._synonyms = _loaded_wordnet() if self.has_synonyms else _NoSynonyms()
        self._words = NLTKWordTokenizer()
        self._sentences = PunktSentenceTokenizer()

    @property
    def variant(self) -> str:
        """What is matched, for the label of the figure."""
        matching = "exact, stem and WordNet synonym" if self.has_synonyms else "exact and stem matching only"
        return matching + ("" if self.has_sentences else ", sentences split without the Punkt model")

    def tokens(self, text: str) -> list[str]:
        """Words and punctuation."""
        if self.has_sentences:
            return word_tokenize(text)
        return [word for sentence in self._sentences.tokenize(text) for word in self._words.tokenize(sentence)]

    def __call__(self, given: str, expected: str) -> float:
        """Score of ``given`` against ``expected``."""
        return float(single_meteor_score(self.tokens(expected), self.tokens(given), wordnet=self._synonyms))


def _loaded_wordnet() -> Any:
    """Nltk's WordNet, read now, so that torn data is told before the first score."""
    try:
        wordnet.ensure_loaded()
    except OSError as error:
        raise DataError(f"nltk's WordNet data is incomplete ({error}); repair or remove it") from error
    return wordnet


def _found(resource: str) -> bool:
    """Whether nltk finds a data resource on this machine."""
    try:
        nltk.data.find(resource)
    except LookupError:
        return False
    return True


BertScore = Callable[[str, str], float]
"""F1 of (given, expected)."""


def load_bertscore(folder: Path, layers: int = BERTSCORE_LAYERS) -> BertScore:
    """BERTScore F1 with the encoder in a local ``folder`` (transformers layout); nothing is downloaded.

    Raises:
        DataError: the folder or the package is missing.
    """
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder} holds no config.json; give the folder of a local copy of roberta-large")
    try:
        import bert_score
    except ModuleNotFoundError as error:
        raise DataError("the package bert-score is not installed; install it or leave BERTScore out") from error
    scorer = bert_score.BERTScorer(model_type=str(folder), num_layers=layers, lang="en")

    def score(given: str, expected: str) -> float:
        return float(scorer.score([given], [expected])[2][0])

    return score


class TextScorer:
    """All scores of one text; loads what it needs at the first use."""

    def __init__(self, bertscore: BertScore | None = None) -> None:
        self._bertscore = bertscore
        self._bleu = {
            order: BLEU(max_ngram_order=order, smooth_method="none", effective_order=False) for order in (1, 4)
        }
        self._rouge = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)

    @cached_property
    def meteor(self) -> Meteor:
        """METEOR as this machine can compute it."""
        return Meteor()

    @property
    def skipped(self) -> dict[str, str]:
        """Scores left out, with the reason."""
        reason = "no model folder given; BERTScore needs bert-score and a local copy of roberta-large"
        return {} if self._bertscore else {"BERTScore": reason}

    def __call__(self, given: str, expected: str) -> TextScore:
        """Score ``given`` against ``expected``, outer white space removed."""
        given, expected = given.strip(), expected.strip()
        if not expected:
            raise DataError("an empty reference has no score; leave the case out")
        rouge = self._rouge.score(expected, given)
        return TextScore(
            bleu_1=self._bleu_score(given, expected, 1),
            bleu_4=self._bleu_score(given, expected, 4),
            rouge_1=float(rouge["rouge1"].fmeasure),
            rouge_l=float(rouge["rougeL"].fmeasure),
            meteor=self.meteor(given, expected),
            bert_f1=None if self._bertscore is None else self._bertscore(given, expected),
        )

    def _bleu_score(self, given: str, expected: str, order: int) -> float:
        # Of one pair the corpus score is the sentence's; sentence_score would warn about effective order.
        return min(self._bleu[order].corpus_score([given], [[expected]]).score / 100, 1.0)
