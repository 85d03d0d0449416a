"""Tables and JSON figures of masks. Pure functions: scores in, text and plain dictionaries out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from medvl_sam2.evaluation import relatives
from medvl_sam2.evaluation.boxes import NO_BOX
from medvl_sam2.evaluation.metrics import Interval, bootstrap, bootstrap_mean_of_kinds
from medvl_sam2.evaluation.protocol import ScoredCurve, Setting
from medvl_sam2.evaluation.tasks import ABSENT_RULE, MaskScore


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


def interval_figures(interval: Interval | None) -> dict[str, float | int] | None:
    """An interval as JSON values."""
    if interval is None:
        return None
    return {"mean": interval.mean, "low": interval.low, "high": interval.high, "count": interval.count}


def interactive_figures(curves: Sequence[ScoredCurve], model: str, controls: Sequence[str]) -> list[dict[str, Any]]:
    """One record a split and setting: every engine after every step, structures, and model minus best control.

    The best control is the one with the higher mean after the last click on the same objects. ``margin`` is the mean of
    the paired differences (``margin_of`` minus it) with a bootstrap over patients.
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
                record["margin_of"] = model
                record["margin"] = interval_figures(_margin(by_engine[model], by_engine[best]))
        figures.append(record)
    return figures


def _last_mean(items: Sequence[ScoredCurve]) -> float:
    return float(np.mean([item.curve.steps[-1].dice for item in items]))


def _engine(items: Sequence[ScoredCurve]) -> dict[str, Any]:
    """Dice (and NSD) after each step, area, and seconds a click of one engine."""
    groups = [item.patient for item in items]
    steps: dict[str, Any] = {}
    for index, step in enumerate(items[0].curve.steps):
        entry: dict[str, Any] = {
            "dice": interval_figures(bootstrap([i.curve.steps[index].dice for i in items], groups))
        }
        surfaces = [(i.curve.steps[index].nsd, i.patient) for i in items]
        if all(value is not None for value, _ in surfaces):
            entry["nsd_2mm"] = interval_figures(bootstrap([v for v, _ in surfaces if v is not None], groups))
        steps[str(step.clicks)] = entry
    areas = [(item.curve.auc, item.patient) for item in items if item.curve.auc is not None]
    seconds = [[step.seconds for step in item.curve.steps if step.seconds is not None] for item in items]
    first = [times[0] for times in seconds if times]
    later = [time for times in seconds for time in times[1:]]
    return {
        "steps": steps,
        "dsc_auc": interval_figures(bootstrap([a for a, _ in areas if a is not None], [p for _, p in areas])),
        "first_seconds_median": float(np.median(first)) if first else None,
        "next_seconds_median": float(np.median(later)) if later else None,
    }


def _structures(items: Sequence[ScoredCurve]) -> dict[str, dict[str, dict[str, Any]]]:
    """Structure -> engine -> first and last Dice, its interval, and the number of objects."""
    collected: dict[str, dict[str, list[ScoredCurve]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        collected[item.curve.structure][item.curve.engine].append(item)
    return {
        structure: {
            engine: {
                "first": float(np.mean([s.curve.steps[0].dice for s in scored])),
                "last": _last_mean(scored),
                "last_interval": interval_figures(
                    bootstrap([s.curve.steps[-1].dice for s in scored], [s.patient for s in scored])
                ),
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
                    number(engine["dsc_auc"]["mean"] if engine["dsc_auc"] else None),
                    number(engine["first_seconds_median"], 2),
                    number(engine["next_seconds_median"], 2),
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


def number(value: float | None, digits: int = 3) -> str:
    """A figure for a table, "-" where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def mask_figures(scores: Sequence[MaskScore]) -> list[dict[str, Any]]:
    """Semantic or referring scores: one record a split with the mean by the rule, of present ones, and structures."""
    figures = []
    for split in sorted({score.split for score in scores}):
        chosen = [score for score in scores if score.split == split]
        by_name: dict[str, list[MaskScore]] = defaultdict(list)
        for score in chosen:
            by_name[score.structure].append(score)
        each = bootstrap_mean_of_kinds(
            [s.dice for s in chosen], [s.structure for s in chosen], [s.patient for s in chosen]
        )
        figures.append(
            {
                "split": split,
                "rule": ABSENT_RULE,
                "mean": _mean(chosen, lambda s: s.dice),
                "mean_present": _mean([score for score in chosen if score.present], lambda s: s.dice),
                "mean_of_structures": None if each is None else each.mean,
                "mean_of_structures_interval": interval_figures(each),
                "nsd_2mm": _mean(chosen, _nsd),
                "structures": {name: _structure(items) for name, items in sorted(by_name.items())},
                "boxes": _boxes(chosen),
                "relatives": _relatives(chosen),
                "scores": [
                    {
                        "case": s.case,
                        "structure": s.structure,
                        "dice": s.dice,
                        "nsd_2mm": _nsd(s),
                        "box_iou": s.box.iou if s.box else None,
                        "present": s.present,
                        "prompt": s.prompt,
                    }
                    for s in chosen
                ],
            }
        )
    return figures


def _mean(scores: Sequence[MaskScore], value: Callable[[MaskScore], float | None]) -> dict[str, float | int] | None:
    """Mean with interval of those scores that have the value and whose value is a number."""
    pairs = [(found, s.patient) for s in scores if (found := value(s)) is not None and not math.isnan(found)]
    return interval_figures(bootstrap([found for found, _ in pairs], [patient for _, patient in pairs]))


def _nsd(score: MaskScore) -> float | None:
    return None if score.surfaces is None else score.surfaces.nsd_2mm


def _structure(items: Sequence[MaskScore]) -> dict[str, Any]:
    return {
        "dice": float(np.mean([s.dice for s in items])),
        "interval": _mean(items, lambda s: s.dice),
        "nsd_2mm": _mean(items, _nsd),
        "present": sum(s.present for s in items),
        "wrongly_predicted": sum(not s.present for s in items),
    }


def _boxes(scores: Sequence[MaskScore]) -> dict[str, Any] | None:
    """Referring comprehension: IoU of boxes and M3D's score, for sentences whose structure is there."""
    boxes = [score.box for score in scores if score.box is not None]
    if not boxes:
        return None
    return {
        "iou": _mean(scores, lambda s: s.box.iou if s.box else None),
        "m3d_iou": _mean(scores, lambda s: s.box.m3d if s.box else None),
        "without_box": sum(box.m3d == NO_BOX for box in boxes),
    }


def _relatives(scores: Sequence[MaskScore]) -> dict[str, Any]:
    """The same masks by the relatives' rules, for comparison only."""
    return {
        "m3d_dice": _mean(scores, lambda s: relatives.m3d_dice(s.overlap)),
        "medsam2_dice": _mean(scores, lambda s: relatives.medsam2_dice(s.overlap) if s.present else None),
        "totalsegmentator_dice": _mean(scores, lambda s: relatives.totalsegmentator_dice(s.overlap)),
        "totalsegmentator_surface_dice_3mm": _mean(
            scores, lambda s: s.surfaces.totalsegmentator_3mm if s.surfaces else None
        ),
    }


def mask_text(title: str, figures: Sequence[Mapping[str, Any]]) -> str:
    """The tables of :func:`mask_figures`."""
    parts = []
    for record in figures:
        rows = [
            [
                name,
                f"{cell['dice']:.3f}",
                bounds(cell["interval"]),
                number(cell["nsd_2mm"]["mean"] if cell["nsd_2mm"] else None),
                str(cell["present"]),
                str(cell["wrongly_predicted"]),
            ]
            for name, cell in record["structures"].items()
        ]
        lines = [
            f"mean {with_bounds(record['mean'])}",
            f"mean of structures {with_bounds(record['mean_of_structures_interval'])}",
            f"present only {with_bounds(record['mean_present'])}",
        ]
        if record["nsd_2mm"]:
            lines.append(f"NSD 2 mm {with_bounds(record['nsd_2mm'])}")
        text = f"{title}, {record['split']} cases (rule: {record['rule']})\n"
        text += table(["structure", "Dice", "95% CI", "NSD 2 mm", "present", "absent but predicted"], rows)
        text += "\n" + "; ".join(lines)
        if record["boxes"]:
            boxes = record["boxes"]
            text += f"\nboxes of the masks: IoU {with_bounds(boxes['iou'])}; {boxes['without_box']} without a box"
            text += f"; M3D's score {with_bounds(boxes['m3d_iou'])}"
        text += "\nrelatives' rules, for comparison only: " + "; ".join(
            f"{name.replace('_', ' ')} {with_bounds(value)}" for name, value in record["relatives"].items() if value
        )
        parts.append(text)
    return "\n\n".join(parts)


def bounds(interval: Mapping[str, float] | None) -> str:
    """The 95% interval of :func:`interval_figures`."""
    return "-" if interval is None else f"[{interval['low']:.3f}, {interval['high']:.3f}]"


def with_bounds(interval: Mapping[str, float] | None) -> str:
    """Mean and 95% interval of :func:`interval_figures`."""
    return "-" if interval is None else f"{interval['mean']:.3f} {bounds(interval)}"
