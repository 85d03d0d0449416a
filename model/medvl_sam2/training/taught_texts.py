"""What is asked of a case of a manifest, by kind of task: reports, questions, structures by name, sentences."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, fields, replace

import numpy as np

from medvl_sam2.config import LanguageConfig
from medvl_sam2.datasets.manifest import CaseRecord, Question
from medvl_sam2.errors import ConfigError
from medvl_sam2.modeling.prompts import (
    REPORT_PROMPTS,
    SEGMENT_PROMPTS,
    format_choices,
    segment_prompt,
    segment_reply,
)
from medvl_sam2.modeling.tokenizer import SEG, Tokenizer
from medvl_sam2.training.corpus import SegTarget, TextSample
from medvl_sam2.training.real_cases import vocabulary_class
from medvl_sam2.training.taught_cases import TaughtCase, TaughtReference
from medvl_sam2.vocabulary import spoken

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_MOST_NAMES = 4

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shares:
    """How often each kind of task is drawn; a case is asked only for what it has."""

    report: float = 2.0
    vqa: float = 3.0
    semantic: float = 3.0
    referring: float = 1.0
    interactive: float = 3.0

    def __post_init__(self) -> None:
        if min(self.values.values()) < 0 or sum(self.values.values()) <= 0:
            raise ConfigError(f"shares {self.values} must not be negative, and one must be above 0")

    @property
    def values(self) -> dict[str, float]:
        """Share by kind."""
        return {field.name: float(getattr(self, field.name)) for field in fields(self)}


def kinds_of(case: TaughtCase) -> list[str]:
    """Kinds of task that a case gives."""
    offers = {
        "report": case.report is not None,
        "vqa": bool(case.questions),
        "semantic": bool(case.names),
        "referring": bool(case.references),
        "interactive": case.volume is not None,
    }
    return [kind for kind, there in offers.items() if there]


def draw_tasks(case: TaughtCase, shares: Shares, count: int, rng: np.random.Generator) -> list[str]:
    """``count`` kinds of task by their shares; none where the case has no kind with a share."""
    kinds = kinds_of(case)
    weights = np.array([shares.values[kind] for kind in kinds])
    if not weights.sum() > 0:
        return []
    return [str(kind) for kind in rng.choice(kinds, size=count, p=weights / weights.sum())]


def task_samples(
    kind: str, case: TaughtCase, tokenizer: Tokenizer, longest: int, rng: np.random.Generator
) -> list[TextSample]:
    """The exchanges of one task, none of a task of clicks; a report longer than ``longest`` tokens ends at a sentence.

    A structure that is not there is refused (``no spleen``) and also read as if it had been searched, as the predictor
    searches a class whatever is said: that exchange is not taught.
    """
    if kind == "interactive":
        return []
    if kind == "report" and case.report is not None:
        text = _fitting(_plain(case.report), tokenizer, longest)
        return [TextSample(_one(REPORT_PROMPTS, rng), text, kind)]
    if kind == "vqa":
        return [_question(case.questions[int(rng.integers(len(case.questions)))], rng)]
    if kind == "referring":
        return [_reference(case.references[int(rng.integers(len(case.references)))])]
    return _by_name(case, rng)


def askable(case: TaughtCase, tokenizer: Tokenizer, config: LanguageConfig) -> TaughtCase:
    """The case without questions and sentences that are too long to be asked; what is left out stands in the log."""
    longest = config.max_length // 2

    def short(text: str) -> bool:
        text = " ".join(text.split()) + config.prompt_end
        fits = len(text) <= 16 * longest and len(tokenizer.encode(text)) <= longest
        if not fits:
            logger.warning("case %s: a question of more than %d tokens is left out: %.60s", case.id, longest, text)
        return fits

    questions = tuple(q for q in case.questions if short(format_choices(q.text, q.choices)))
    return replace(case, questions=questions, references=tuple(r for r in case.references if short(r.text)))


def corpus_of(record: CaseRecord) -> list[str]:
    """What the tokenizer should spell well."""
    names = [spoken(name) for name in record.label_names]
    texts = [segment_prompt([name], template) for name in names for template in SEGMENT_PROMPTS]
    texts += [segment_reply(names, [False] * len(names)), *REPORT_PROMPTS]
    texts += [record.report] if record.report else []
    texts += [f"{format_choices(q.text, q.choices)}\n{q.answer}" for q in record.questions]
    return texts + [f"{item.text}\n{item.answer}" for item in record.references]


def _question(item: Question, rng: np.random.Generator) -> TextSample:
    """A closed question is answered with the text of the right choice; choices are shuffled."""
    choices = [item.choices[n] for n in rng.permutation(len(item.choices))]
    return TextSample(format_choices(item.text, choices), _plain(item.answer), "vqa")


def _reference(item: TaughtReference) -> TextSample:
    targets = tuple(SegTarget(vocabulary_class(mask.name) or mask.name, mask=mask) for mask in item.masks)
    return TextSample(item.text, item.answer, "referring", targets)


def _by_name(case: TaughtCase, rng: np.random.Generator) -> list[TextSample]:
    """One to four structures, mostly such as are there."""
    masks = {} if case.volume is None else {target.name: target for target in case.volume.targets}
    present = [name for name in case.names if name in masks]
    absent = [name for name in case.names if name not in masks]
    count = min(len(case.names), int(rng.choice([1, 1, 1, 2, 3, _MOST_NAMES])))
    picked: list[str] = []
    while len(picked) < count:
        pool = present if present and (not absent or rng.random() < 0.7) else absent
        picked.append(pool.pop(int(rng.integers(len(pool)))))
    words = [spoken(name) for name in picked]
    template = _one(SEGMENT_PROMPTS, rng)
    there = [name in masks for name in picked]
    targets = tuple(SegTarget(vocabulary_class(n) or n, mask=masks[n]) for n in picked if n in masks)
    samples = [TextSample(segment_prompt(words, template), segment_reply(words, there), "semantic", targets)]
    for name, word in zip(picked, words, strict=True):
        if name not in masks:
            searched = (SegTarget(vocabulary_class(name) or name),)
            question = segment_prompt([word], template)
            samples.append(TextSample(question, segment_reply([word], [True]), "semantic", searched, taught=False))
    return samples


def _fitting(text: str, tokenizer: Tokenizer, longest: int) -> str:
    """As many whole sentences from the start as fit, at least one."""
    sentences = _SENTENCE_END.split(text)
    while len(sentences) > 1 and len(tokenizer.encode(" ".join(sentences))) > longest:
        sentences.pop()
    return " ".join(sentences)


def _plain(text: str) -> str:
    """A text that asks for no mask."""
    return " ".join(text.replace(SEG, " ").split())


def _one(texts: tuple[str, ...], rng: np.random.Generator) -> str:
    return texts[int(rng.integers(len(texts)))]
