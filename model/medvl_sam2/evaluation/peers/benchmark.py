"""Train and score contenders one by one, keeping every score, and put them into one table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from medvl_sam2.config import from_plain
from medvl_sam2.evaluation import report
from medvl_sam2.evaluation.cases import EvaluationCase
from medvl_sam2.evaluation.protocol import Curve, Interactive, ScoredCurve, Setting, Step
from medvl_sam2.evaluation.runner import FullPredictor, Plan, Runner
from medvl_sam2.evaluation.tasks import MaskScore
from medvl_sam2.files import write_json_atomically


@dataclass(frozen=True)
class Trained:
    """A contender ready to be scored; ``seconds`` in optimiser steps, ``parameters`` of the network that answers.

    ``predictor`` is None for controls, which are scored as ``engines``; ``weights`` is a digest of those that answer.
    """

    predictor: FullPredictor | None
    seconds: float = 0.0
    steps: int = 0
    parameters: int = 0
    engines: tuple[Interactive, ...] = ()
    weights: str = ""


@dataclass(frozen=True)
class Contender:
    """``key`` names its folder, ``title`` its row, ``note`` what the row's reader must know.

    ``tasks`` it can do; ``train`` makes it ready in its folder, going on where it was stopped; ``skipped`` says why it
    cannot take part (then ``train`` is not called).
    """

    key: str
    title: str
    note: str
    tasks: tuple[str, ...]
    train: Callable[[Path], Trained]
    skipped: str = ""


@dataclass
class Scores:
    """Everything measured of one contender; plain facts beside the scores."""

    title: str
    note: str
    seconds: float = 0.0
    steps: int = 0
    parameters: int = 0
    skipped: str = ""
    curves: list[ScoredCurve] = field(default_factory=list)
    semantic: list[MaskScore] = field(default_factory=list)


def score(
    contender: Contender,
    out: Path,
    plan: Plan,
    cases: Callable[[], Iterable[EvaluationCase]],
    progress: Callable[[str], None] = lambda message: None,
) -> Scores:
    """Train a contender and run it over the cases with the runner every evaluation uses.

    Training goes on from ``out/<key>``; scores of a case that lie there, of these weights and this plan, are read back.
    """
    scores = Scores(contender.title, contender.note, skipped=contender.skipped)
    if contender.skipped:
        return scores
    folder = out / contender.key
    trained = contender.train(folder)
    scores.seconds, scores.steps, scores.parameters = trained.seconds, trained.steps, trained.parameters
    plan = replace(plan, tasks=tuple(task for task in plan.tasks if task in contender.tasks))
    stamp = f"{contender.title}, {plan}, weights {trained.weights}"
    for case in cases():
        path = folder / "scores" / f"{case.name}.json"
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if stored.get("stamp") != stamp:
            runner = Runner(plan, trained.predictor, trained.engines)
            runner.run(case, lambda message: progress(f"{contender.title}: {message}"))
            stored = {
                "stamp": stamp,
                "curves": [asdict(_renamed(curve, contender.title)) for curve in runner.curves],
                "semantic": [asdict(item) for item in runner.semantic],
            }
            write_json_atomically(path, stored)
        scores.curves += [_curve(item) for item in stored["curves"]]
        scores.semantic += [from_plain(MaskScore, item) for item in stored["semantic"]]
    return scores


def _renamed(scored: ScoredCurve, title: str) -> ScoredCurve:
    """The runner calls every predictor ``model``."""
    if scored.curve.engine != "model":
        return scored
    return replace(scored, curve=replace(scored.curve, engine=title))


def _curve(plain: dict[str, Any]) -> ScoredCurve:
    """A curve from its JSON values."""
    curve = plain["curve"]
    steps = tuple(Step(**step) for step in curve["steps"])
    return ScoredCurve(
        **plain | {"curve": Curve(curve["structure"], Setting(curve["setting"]), curve["engine"], steps)}
    )


def figures(entries: Sequence[Scores], ours: str, reference: str) -> dict[str, Any]:
    """All figures as JSON values: ``interactive`` with every contender as an engine, ``semantic`` by contender.

    ``margin`` of an interactive record is the contender titled ``ours`` minus the best other one, controls included.
    The contender titled ``reference``, which was trained for another time than the rest, is in no margin.
    """
    curves = [curve for entry in entries for curve in entry.curves]
    rivals = sorted({curve.curve.engine for curve in curves} - {ours, reference})
    semantic = [
        record | {"contender": entry.title}
        for entry in entries
        if entry.semantic
        for record in report.mask_figures(entry.semantic)
    ]
    facts = [
        {name: value for name, value in vars(entry).items() if name not in ("curves", "semantic")} for entry in entries
    ]
    result: dict[str, Any] = {"contenders": facts}
    if curves:
        result["interactive"] = report.interactive_figures(curves, ours, rivals)
    if semantic:
        result["semantic"] = semantic
    return result


HEADER = ("", "minutes", "steps", "M params", "1st click", "last", "box", "box, last", "s a click", "by name")


def rows(numbers: dict[str, Any], split: str) -> list[list[str]]:
    """One row a contender (and control) for the cases of one split; "-" where it does not do a task."""
    records = [record for record in numbers.get("interactive", []) if record["split"] == split]
    named = {r["contender"]: r["mean_of_structures"] for r in numbers.get("semantic", []) if r["split"] == split}
    facts = {fact["title"]: fact for fact in numbers["contenders"]}
    engines = dict.fromkeys([*facts, *(name for record in records for name in record["engines"])])
    scored = {name for record in records for name in record["engines"]} | set(named)
    lines = []
    for name in engines:
        fact = facts.get(name)
        if fact is not None and fact["skipped"]:
            lines.append([f"{name} (skipped)", *["-"] * (len(HEADER) - 1)])
        elif name in scored:
            trained = ["-"] * 3
            if fact is not None and fact["parameters"]:
                trained = [f"{fact['seconds'] / 60:.1f}", str(fact["steps"]), f"{fact['parameters'] / 1e6:.1f}"]
            lines.append([name, *trained, *_clicked(records, name), report.number(named.get(name))])
    return lines


def _clicked(records: Sequence[dict[str, Any]], engine: str) -> list[str]:
    """First and last Dice in both settings and the seconds of a later click."""
    cells, seconds = [], None
    for setting in (Setting.CLICKS, Setting.BOX):
        record = next((r for r in records if r["setting"] == setting.value and engine in r["engines"]), None)
        if record is None:
            cells += ["-", "-"]
            continue
        steps = [step["dice"]["mean"] for step in record["engines"][engine]["steps"].values()]
        cells += [report.number(steps[0]), report.number(steps[-1])]
        seconds = seconds or record["engines"][engine]["next_seconds_median"]
    return [*cells, report.number(seconds, 2)]


def text(numbers: dict[str, Any]) -> str:
    """The table of every split, what each row is, and the lead over the best other one."""
    splits = sorted({r["split"] for task in ("interactive", "semantic") for r in numbers.get(task, [])})
    parts = [f"Dice, {split} cases\n{report.table(HEADER, rows(numbers, split))}" for split in splits]
    for record in numbers.get("interactive", []):
        if record.get("margin"):
            margin = record["margin"]
            parts.append(
                f"{record['split']}, {record['setting']}, last prompt: {record['margin_of']} minus the best other one "
                f"of equal training ({record['best_control']}) "
                f"{margin['mean']:+.3f} [{margin['low']:+.3f}, {margin['high']:+.3f}]"
            )
    for fact in numbers["contenders"]:
        parts.append(f"{fact['title']}: {'skipped, ' + fact['skipped'] if fact['skipped'] else fact['note']}")
    return "\n\n".join(parts)
