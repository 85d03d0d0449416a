"""One self-contained HTML page of an evaluation: every table with intervals and controls, and pictures inlined.

The page needs no network and no other file. Layout and style are in ``report.html`` beside this module; here figures
become what the template draws.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from medvl_sam2.evaluation.benchmark import COVERAGE
from medvl_sam2.evaluation.language_report import SCORE_NAMES
from medvl_sam2.evaluation.runner import DrawnPicture

WORST, BEST = 6, 2
"""Interactive pictures shown: those with the least Dice, which teach most, and a few of the best."""
EXAMPLES = 6
"""Texts shown a task."""
_SETTINGS = {"box": "3D box, then clicks", "clicks": "clicks only"}
_SCORES = {
    "m3d_dice": "M3D Dice (of the mask, own grid)",
    "medsam2_dice": "MedSAM2 Dice",
    "totalsegmentator_dice": "TotalSegmentator Dice",
    "totalsegmentator_surface_dice_3mm": "TotalSegmentator surface Dice, 3 mm",
}


@dataclass(frozen=True)
class About:
    """What was measured: ``title``, facts by name (checkpoint, cases, seconds), and the command's options."""

    title: str
    facts: Mapping[str, str]
    options: Mapping[str, str]


@dataclass(frozen=True)
class Card:
    """A headline figure: an interval and what it stands beside."""

    name: str
    interval: Mapping[str, float]
    beside: str


@dataclass(frozen=True)
class InlinePicture:
    """A PNG as a data URL."""

    title: str
    url: str


def html_report(about: About, figures: Mapping[str, Any], pictures: Sequence[DrawnPicture] = ()) -> str:
    """The page. ``figures`` are those of :meth:`medvl_sam2.evaluation.runner.Runner.figures`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        about=about,
        figures=figures,
        cards=headlines(figures),
        lines=[click_lines(record) for record in figures.get("interactive", [])],
        settings=_SETTINGS,
        score_names=SCORE_NAMES,
        relative_names=_SCORES,
        coverage=COVERAGE,
        examples=EXAMPLES,
        pictures=[_inline(picture) for picture in chosen_pictures(pictures)],
    )


def headlines(figures: Mapping[str, Any]) -> list[Card]:
    """One card a task and split that was run."""
    cards = []
    for record in figures.get("interactive", []):
        engine = record["engines"].get("model")
        if engine:
            last = list(engine["steps"])[-1]
            control = record["engines"].get(record.get("best_control"))
            beside = f"{record['best_control']} {control['steps'][last]['dice']['mean']:.3f}" if control else ""
            name = f"Dice after {last} clicks ({_SETTINGS[record['setting']]}), {record['split']}"
            cards.append(Card(name, engine["steps"][last]["dice"], beside))
    for task in ("semantic", "referring"):
        for record in figures.get(task, []):
            name = f"{task.capitalize()} Dice, {record['split']}"
            cards.append(Card(name, record["mean"], f"mean of {len(record['structures'])} structures "
                                                    f"{record['mean_of_structures']:.3f}"))  # fmt: skip
    if "vqa" in figures:
        vqa = figures["vqa"]
        cards.append(Card("Closed questions", vqa["accuracy"], f"best constant answers {vqa['majority']:.3f}"))
    if "report" in figures and figures["report"]["finding_f1_interval"]:
        report, control = figures["report"], figures["report"]["constant_report_f1"]
        beside = "" if control is None else f"best constant report {control:.3f}"
        cards.append(Card("Report finding F1", report["finding_f1_interval"], beside))
    cards += [
        Card(f"R@1 of {record['pairs']}, {record['direction']}", record["recall"], f"chance {record['chance']:.3f}")
        for record in figures.get("retrieval", [])
        if record["depth"] == 1
    ]
    return cards


def click_lines(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Dice over prompts as SVG polylines in a frame of 360 x 160, from 0 at the bottom to 1 at the top."""
    lines = []
    for name, engine in record["engines"].items():
        means = [step["dice"]["mean"] for step in engine["steps"].values()]
        gap = 360 / max(len(means) - 1, 1)
        lines.append(
            {"name": name, "points": " ".join(f"{n * gap:.1f},{160 * (1 - m):.1f}" for n, m in enumerate(means))}
        )
    return lines


def chosen_pictures(pictures: Sequence[DrawnPicture]) -> list[DrawnPicture]:
    """Every label map, then the interactive pictures with the least and the most Dice."""
    maps = [picture for picture in pictures if picture.score is None]
    scored = sorted((p for p in pictures if p.score is not None), key=lambda p: p.score or 0.0)
    if len(scored) <= WORST + BEST:
        return [*maps, *scored]
    return [*maps, *scored[:WORST], *scored[-BEST:]]


def _inline(picture: DrawnPicture) -> InlinePicture:
    return InlinePicture(picture.title, "data:image/png;base64," + base64.b64encode(picture.path.read_bytes()).decode())
