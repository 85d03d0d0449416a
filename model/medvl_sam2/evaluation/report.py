"""Tables and JSON figures from scores. Pure functions: scores in, text and plain dictionaries out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from medvl_sam2.evaluation.metrics import Interval, bootstrap
from medvl_sam2.evaluation.protocol import ScoredCurve, Setting
from medvl_sam2.evaluation.tasks import ABSENT_RULE, AnswerScore, MaskScore, majority_accuracy


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Plain text table: first column left, the others right aligned."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = []
    for line in lines:
        cells = [
            cell.ljust(w) if n == 0 else cell.rjust(w) for n, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def _interval(interval: Interval | None) -> dict[str, float | int] | None:
    if interval is None:
        return None
    return {"mean": interval.mean, "low": interval.low, "high": interval.high, "count": interval.count}


def interactive_figures(curves: Sequence[ScoredCurve], model: str, controls: Sequence[str]) -> list[dict[str, Any]]:
    """One record a split and setting: every engine after every step, structures, and model minus best control.

    The best control is the one with the higher mean after the last click on the same objects. ``margin`` is the mean of
    the paired differences with a bootstrap over patients.
    """
    figures = []
    for split, setting in sorted({(item.split, item.curve.setting.value) for item in curves}):
        chosen = [item for item in curves if (item.split, item.curve.setting.value) == (split, setting)]
        by_engine: dict[str, list[ScoredCurve]] = defaultdict(list)
        for item in chosen:
            by_engine[item.curve.engine].append(item)
        record: dict[str, Any] = {
            "split": split,
            "setting": setting,
            "objects": max(len(items) for items in by_engine.values()),
            "engines": {name: _engine(items) for name, items in by_engine.items()},
            "structures": _structures(chosen),
            "curves": [_curve(item) for item in chosen],
        }
        rivals = {name: _last_mean(by_engine[name]) for name in controls if name in by_engine}
        if rivals:
            best = max(rivals, key=lambda name: rivals[name])
            record["best_control"] = best
            if model in by_engine:
                record["margin"] = _interval(_margin(by_engine[model], by_engine[best]))
        figures.append(record)
    return figures


def _last_mean(items: Sequence[ScoredCurve]) -> float:
    return float(np.mean([item.curve.steps[-1].dice for item in items]))


def _engine(items: Sequence[ScoredCurve]) -> dict[str, Any]:
    """Dice (and NSD) after each step, area, and seconds a click of one engine."""
    groups = [item.patient for item in items]
    steps: dict[str, Any] = {}
    for index, step in enumerate(items[0].curve.steps):
        entry: dict[str, Any] = {"dice": _interval(bootstrap([i.curve.steps[index].dice for i in items], groups))}
        surfaces = [(i.curve.steps[index].nsd, i.patient) for i in items]
        if all(value is not None for value, _ in surfaces):
            entry["nsd_2mm"] = _interval(bootstrap([v for v, _ in surfaces if v is not None], groups))
        steps[str(step.clicks)] = entry
    areas = [(item.curve.auc, item.patient) for item in items if item.curve.auc is not None]
    seconds = [[step.seconds for step in item.curve.steps if step.seconds is not None] for item in items]
    first = [times[0] for times in seconds if times]
    later = [time for times in seconds for time in times[1:]]
    return {
        "steps": steps,
        "dsc_auc": _interval(bootstrap([a for a, _ in areas if a is not None], [p for _, p in areas])),
        "first_seconds_median": float(np.median(first)) if first else None,
        "next_seconds_median": float(np.median(later)) if later else None,
    }


def _structures(items: Sequence[ScoredCurve]) -> dict[str, dict[str, dict[str, float | int]]]:
    """Structure -> engine -> first and last Dice and the number of objects."""
    collected: dict[str, dict[str, list[ScoredCurve]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        collected[item.curve.structure][item.curve.engine].append(item)
    return {
        structure: {
            engine: {
                "first": float(np.mean([s.curve.steps[0].dice for s in scored])),
                "last": _last_mean(scored),
                "count": len(scored),
            }
            for engine, scored in engines.items()
        }
        for structure, engines in sorted(collected.items())
    }


def _curve(item: ScoredCurve) -> dict[str, Any]:
    return {
        "case": item.case,
        "structure": item.curve.structure,
        "engine": item.curve.engine,
        "voxels": item.voxels,
        "dice": [step.dice for step in item.curve.steps],
        "nsd_2mm": [step.nsd for step in item.curve.steps],
        "seconds": [step.seconds for step in item.curve.steps],
    }


def _margin(model: Sequence[ScoredCurve], control: Sequence[ScoredCurve]) -> Interval | None:
    """Paired difference of the last Dice; both lists hold the same objects in the same order."""
    pairs = list(zip(model, control, strict=True))
    return bootstrap([a.curve.steps[-1].dice - b.curve.steps[-1].dice for a, b in pairs], [a.patient for a, _ in pairs])


def interactive_text(figures: Sequence[Mapping[str, Any]]) -> str:
    """The interactive tables of :func:`interactive_figures`."""
    parts = []
    for record in figures:
        engines = record["engines"]
        steps = list(next(iter(engines.values()))["steps"])
        label = {"0": "box"}
        head = [
            "Dice after",
            *[label.get(step, f"+{step}") for step in steps],
            "95% CI last",
            "DSC_AUC",
            "s first",
            "s next",
        ]
        rows = []
        for name, engine in engines.items():
            last = engine["steps"][steps[-1]]["dice"]
            rows.append(
                [
                    name,
                    *[f"{engine['steps'][step]['dice']['mean']:.3f}" for step in steps],
                    f"[{last['low']:.3f}, {last['high']:.3f}]",
                    _number(engine["dsc_auc"]["mean"] if engine["dsc_auc"] else None),
                    _number(engine["first_seconds_median"], 2),
                    _number(engine["next_seconds_median"], 2),
                ]
            )
        parts.append(
            f"Interactive, {record['split']} cases, {_SETTING_TEXT[record['setting']]} ({record['objects']} objects)\n"
            + table(head, rows)
        )
        if record.get("margin"):
            margin = record["margin"]
            parts.append(
                f"model minus best control ({record['best_control']}) after the last click: "
                f"{margin['mean']:+.3f} [{margin['low']:+.3f}, {margin['high']:+.3f}]"
            )
        names = list(engines)
        parts.append(
            table(
                ["structure (first -> last)", "n", *names],
                [
                    [
                        structure,
                        str(max(int(cell["count"]) for cell in cells.values())),
                        *[
                            f"{cells[name]['first']:.2f} -> {cells[name]['last']:.2f}" if name in cells else "-"
                            for name in names
                        ],
                    ]
                    for structure, cells in record["structures"].items()
                ],
            )
        )
    return "\n\n".join(parts)


_SETTING_TEXT = {Setting.BOX.value: "3D box, then clicks", Setting.CLICKS.value: "clicks only"}


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def mask_figures(scores: Sequence[MaskScore]) -> list[dict[str, Any]]:
    """Semantic or referring scores: one record a split with the mean by the rule, of present ones, and structures."""
    figures = []
    for split in sorted({score.split for score in scores}):
        chosen = [score for score in scores if score.split == split]
        present = [score for score in chosen if score.present]
        by_name: dict[str, list[MaskScore]] = defaultdict(list)
        for score in chosen:
            by_name[score.structure].append(score)
        figures.append(
            {
                "split": split,
                "rule": ABSENT_RULE,
                "mean": _interval(bootstrap([s.dice for s in chosen], [s.patient for s in chosen])),
                "mean_present": _interval(bootstrap([s.dice for s in present], [s.patient for s in present])),
                "mean_of_structures": float(np.mean([np.mean([s.dice for s in items]) for items in by_name.values()])),
                "structures": {
                    name: {
                        "dice": float(np.mean([s.dice for s in items])),
                        "present": sum(s.present for s in items),
                        "wrongly_predicted": sum(not s.present for s in items),
                    }
                    for name, items in sorted(by_name.items())
                },
                "scores": [
                    {"case": s.case, "structure": s.structure, "dice": s.dice, "present": s.present, "prompt": s.prompt}
                    for s in chosen
                ],
            }
        )
    return figures


def mask_text(title: str, figures: Sequence[Mapping[str, Any]]) -> str:
    """The tables of :func:`mask_figures`."""
    parts = []
    for record in figures:
        rows = [
            [name, f"{cell['dice']:.3f}", str(cell["present"]), str(cell["wrongly_predicted"])]
            for name, cell in record["structures"].items()
        ]
        mean, present = record["mean"], record["mean_present"]
        tail = f"mean {mean['mean']:.3f} [{mean['low']:.3f}, {mean['high']:.3f}]"
        tail += f"; mean of structures {record['mean_of_structures']:.3f}"
        if present:
            tail += f"; present only {present['mean']:.3f} [{present['low']:.3f}, {present['high']:.3f}]"
        parts.append(
            f"{title}, {record['split']} cases (rule: {record['rule']})\n"
            + table(["structure", "Dice", "present", "absent but predicted"], rows)
            + f"\n{tail}"
        )
    return "\n\n".join(parts)


def answer_figures(scores: Sequence[AnswerScore]) -> dict[str, Any]:
    """Closed question accuracy by kind, beside the best constant answer of each kind and chance."""
    by_kind: dict[str, list[AnswerScore]] = defaultdict(list)
    for score in scores:
        by_kind[score.kind].append(score)
    majority = majority_accuracy(scores)
    kinds = {
        kind: {
            "accuracy": float(np.mean([s.right for s in items])),
            "majority": majority[kind],
            "chance": float(np.mean([1 / s.choices for s in items])),
            "count": len(items),
        }
        for kind, items in sorted(by_kind.items())
    }
    total = sum(cell["count"] for cell in kinds.values())
    return {
        "accuracy": _interval(bootstrap([float(s.right) for s in scores], [s.case for s in scores])),
        "majority": sum(cell["majority"] * cell["count"] for cell in kinds.values()) / total if total else None,
        "chance": sum(cell["chance"] * cell["count"] for cell in kinds.values()) / total if total else None,
        "kinds": kinds,
        "wrong": [
            {"case": s.case, "question": s.question, "expected": s.expected, "given": s.given}
            for s in scores
            if not s.right
        ],
    }


def answer_text(figures: Mapping[str, Any]) -> str:
    """The table of :func:`answer_figures`."""
    rows = [
        [kind, f"{cell['accuracy']:.3f}", f"{cell['majority']:.3f}", f"{cell['chance']:.3f}", str(cell["count"])]
        for kind, cell in figures["kinds"].items()
    ]
    overall = figures["accuracy"]
    if overall:
        rows.append(
            [
                "all",
                f"{overall['mean']:.3f} [{overall['low']:.3f}, {overall['high']:.3f}]",
                f"{figures['majority']:.3f}",
                f"{figures['chance']:.3f}",
                str(overall["count"]),
            ]
        )
    return "Closed questions, generated cases (controls: best constant answer a kind; chance)\n" + table(
        ["kind", "accuracy", "constant", "chance", "n"], rows
    )


def report_text(figures: Mapping[str, Any]) -> str:
    """One line on report findings."""
    counts = figures["counts"]
    return (
        f"Report findings (organ and kind), generated cases: F1 {_number(figures['finding_f1'])} "
        f"(right {counts['hit']}, invented {counts['extra']}, missed {counts['missed']}); "
        f"best constant report {_number(figures['constant_report_f1'])}"
    )
