"""Question and reply pairs of a case for the language phase, and the tokenizer's corpus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from medvl_sam2.modeling.prompts import (
    REPORT_PROMPTS,
    SEGMENT_PROMPTS,
    format_choices,
    segment_prompt,
    segment_reply,
)
from medvl_sam2.modeling.tokenizer import SEG, Tokenizer
from medvl_sam2.synthesis.records import QA
from medvl_sam2.training.language_data import LanguageCase
from medvl_sam2.training.samples import Target
from medvl_sam2.vocabulary import CLASSES, spoken

REFERRING_TEMPLATES: tuple[str, ...] = ("Please segment {}.", "Segment {}.", "Show me {}.", "Find {}.", "{}")


_ORDERED_KINDS = ("presence", "visibility", "count", "size")


@dataclass(frozen=True)
class SegTarget:
    """What one ``[SEG]`` stands for: a vocabulary class or another name, and, for lesions, indices of the findings.

    ``mask``: the target in the case's labelled volume, where there is one; None also where the object is absent.
    """

    name: str
    findings: tuple[int, ...] = ()
    mask: Target | None = None


@dataclass(frozen=True)
class TextSample:
    """One exchange. ``targets``: one for every ``[SEG]`` of the reply.

    ``taught`` False: the reply is only read, for its ``[SEG]`` states; the language model is not to say it.
    """

    question: str
    reply: str
    group: str
    targets: tuple[SegTarget, ...] = field(default=())
    taught: bool = True


def question_sample(item: QA, rng: np.random.Generator) -> TextSample:
    """A question of the case; a closed one is answered with the text of the right choice, choices are shuffled.

    Natural orders (yes and no, counts, sizes) are mostly kept.
    """
    if not item.choices:
        return TextSample(item.question, item.answer, "open")
    answer = answer_text(item)
    if item.kind in _ORDERED_KINDS and rng.random() < 0.8:
        return TextSample(item.prompt, answer, "closed")
    choices = [item.choices[index] for index in rng.permutation(len(item.choices))]
    return TextSample(format_choices(item.question, choices), answer, "closed")


def answer_text(item: QA) -> str:
    """Answer of a closed question without its letter."""
    return item.answer.split(". ", 1)[1] if item.choices else item.answer


def report_sample(case: LanguageCase, rng: np.random.Generator) -> TextSample:
    """The report under one of its prompts."""
    report = case.reports[int(rng.integers(len(case.reports)))]
    return TextSample(str(rng.choice(np.array(REPORT_PROMPTS))), report, "report")


def class_sample(case: LanguageCase, rng: np.random.Generator) -> TextSample:
    """One to four classes by name; absent ones are answered without ``[SEG]``."""
    count = int(rng.choice([1, 1, 1, 2, 3, 4]))
    picked = [CLASSES[index] for index in rng.permutation(len(CLASSES))[:count]]
    present = [class_present(case, name) for name in picked]
    names = [spoken(name) for name in picked]
    template = str(rng.choice(np.array(SEGMENT_PROMPTS)))
    findings = tuple(range(len(case.findings)))
    targets = tuple(
        SegTarget(name, findings if name == "lesion" else ())
        for name, there in zip(picked, present, strict=True)
        if there
    )
    return TextSample(segment_prompt(names, template), segment_reply(names, present), "segment", targets)


def referring_sample(case: LanguageCase, index: int, rng: np.random.Generator) -> TextSample:
    """A referring sentence of the case; a phrase may be put into a request."""
    item = case.referring[index]
    question = item.text
    if item.text[:1].islower():
        question = str(rng.choice(np.array(REFERRING_TEMPLATES))).format(item.text.rstrip("."))
    return TextSample(question, f"{item.name} {SEG}", "refer", (SegTarget(item.target, item.lesions),))


def class_present(case: LanguageCase, name: str) -> bool:
    """Whether a class of the vocabulary is in the volume."""
    return bool(len(case.findings)) if name == "lesion" else case.present(name)


def draw_samples(case: LanguageCase, rng: np.random.Generator, questions: int, segments: int) -> list[TextSample]:
    """A mixed set for one packed sequence, in random order.

    The report; ``questions`` questions, balanced over kinds and, within a kind, over answers; ``segments`` requests by
    class and as many referring sentences, every second one about lesions where there are any.
    """
    samples = [report_sample(case, rng)]
    by_kind: dict[str, dict[str, list[QA]]] = {}
    for item in case.qa:
        answers = by_kind.setdefault(f"{item.kind}, {'closed' if item.choices else 'open'}", {})
        answers.setdefault(answer_text(item), []).append(item)
    kinds = sorted(by_kind)
    order = rng.permutation(len(kinds))
    for number in range(questions if kinds else 0):
        answers = by_kind[kinds[order[number % len(kinds)]]]
        items = answers[sorted(answers)[int(rng.integers(len(answers)))]]
        samples.append(question_sample(items[int(rng.integers(len(items)))], rng))
    lesions = [index for index, item in enumerate(case.referring) if item.lesions]
    organs = [index for index, item in enumerate(case.referring) if not item.lesions]
    for number in range(segments):
        samples.append(class_sample(case, rng))
        pool = lesions if lesions and (number % 2 or not organs) else organs
        if pool:
            samples.append(referring_sample(case, pool[int(rng.integers(len(pool)))], rng))
    return [samples[index] for index in rng.permutation(len(samples))]


def corpus_texts(cases: Iterable[LanguageCase]) -> Iterator[str]:
    """Everything the tokenizer should spell well, case by case, then the fixed wordings."""
    for case in cases:
        yield from case.reports
        for item in case.qa:
            yield item.prompt + "\n" + item.answer
        for sentence in case.referring:
            yield f"{sentence.text}\n{sentence.name}"
    for name in CLASSES:
        for template in SEGMENT_PROMPTS:
            yield segment_prompt([spoken(name)], template)
        yield f"no {spoken(name)}, {spoken(name)}"
    yield from REPORT_PROMPTS


def build_tokenizer(cases: Iterable[LanguageCase], vocab_size: int) -> Tokenizer:
    """Tokenizer of the texts of ``cases``."""
    return Tokenizer.train(corpus_texts(cases), vocab_size)
