"""The wordings the language model is trained on; the first of each list is the one the predictor uses."""

from __future__ import annotations

from collections.abc import Sequence

from medvl_sam2.modeling.tokenizer import SEG

REPORT_PROMPTS: tuple[str, ...] = (
    "Write the report of this scan.",
    "Describe the findings.",
    "What are the findings in this scan?",
    "Report the findings of this volume.",
    "Generate a radiology report.",
)

SEGMENT_PROMPTS: tuple[str, ...] = (
    "Please segment the {}.",
    "Segment the {}.",
    "Segment {}.",
    "Show me the {}.",
    "Where is the {}?",
    "{}",
)


def format_choices(question: str, choices: Sequence[str]) -> str:
    """Closed question as the model reads it: ``... Choices: A. yes B. no``; unchanged without choices.

    The reply is the text of the right choice. A letter would first have to be looked up: trained for the published
    ``B. no``, the tiny model named the region in 93 % of the open and 20 % of the closed questions.
    """
    if not choices:
        return question
    listed = " ".join(f"{chr(ord('A') + index)}. {choice}" for index, choice in enumerate(choices))
    return f"{question} Choices: {listed}"


def join_names(names: Sequence[str]) -> str:
    """``liver``, ``liver and spleen``, ``liver, spleen and pancreas``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def segment_prompt(names: Sequence[str], template: str = SEGMENT_PROMPTS[0]) -> str:
    """Request for one or several objects by their spoken names."""
    return template.format(join_names(names))


def segment_reply(names: Sequence[str], present: Sequence[bool]) -> str:
    """``liver [SEG], no spleen``: one ``[SEG]`` for every object that is there."""
    return ", ".join(f"{name} {SEG}" if there else f"no {name}" for name, there in zip(names, present, strict=True))
