"""Rows of the challenge's loop, one a case and engine: kept in a file that a later run goes on from, and summed up."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medvl_sam2.errors import DataError
from medvl_sam2.evaluation.challenge.case import ChallengeCase
from medvl_sam2.evaluation.challenge.loop import CaseCurve
from medvl_sam2.evaluation.metrics import bootstrap
from medvl_sam2.evaluation.report import interval_figures, number, table
from medvl_sam2.files import write_json_atomically

NOC_TARGETS = (0.8, 0.9)


def clicks_to_reach(numbers: Sequence[int], dice: Sequence[float], target: float) -> int | None:
    """Clicks after which Dice is first at least ``target`` (0: the box sufficed), None where it never is."""
    return next((clicks for clicks, value in zip(numbers, dice, strict=True) if value >= target), None)


def row(case: ChallengeCase, engine: str, curve: CaseCurve) -> dict[str, Any]:
    """Everything measured on one case, as JSON values; lists run over steps, ``steps`` says after how many clicks."""
    numbers = [step.number for step in curve.steps]
    voxels = np.bincount(case.labels.ravel(), minlength=len(case.names) + 1)[1:]
    structures = []
    for index, name in enumerate(case.names):
        dice = [step.scores.dsc[index] for step in curve.steps]
        structures.append(
            {
                "structure": name,
                "voxels": int(voxels[index]),
                "dsc": dice,
                "nsd": [None if step.scores.nsd is None else step.scores.nsd[index] for step in curve.steps],
                **{_noc(target): clicks_to_reach(numbers, dice, target) for target in NOC_TARGETS},
                "clicks_zyx_label": [[*click.position, click.label] for click in curve.clicks[index]],
            }
        )
    return {
        "case": case.name,
        "patient": case.patient,
        "sha256": case.sha256(),
        "engine": engine,
        "setting": "clicks" if case.boxes is None else "box",
        "steps": numbers,
        "dsc": [step.scores.mean_dsc for step in curve.steps],
        "nsd": [step.scores.mean_nsd for step in curve.steps],
        "dsc_auc": curve.dsc_auc,
        "nsd_auc": curve.nsd_auc,
        "dsc_final": curve.final.mean_dsc,
        "nsd_final": curve.final.mean_nsd,
        "seconds": [step.seconds for step in curve.steps],
        "structures": structures,
    }


class Results:
    """Rows and failures of a run, written to ``path`` after each; a run of the same ``settings`` goes on from there.

    ``settings`` are JSON values by name.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        """Raises :class:`DataError` when ``path`` holds the results of other settings, or no results."""
        self.rows: list[dict[str, Any]] = []
        self.failed: dict[str, str] = {}
        self._path, self._settings = path, dict(settings)
        if path is None or not path.exists():
            return
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            written, self.rows = earlier["settings"], earlier["rows"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} holds no results of this program; name another file") from error
        for name in {**self._settings, **written}:
            self._require_same(name, written.get(name), self._settings.get(name))

    def _require_same(self, field: str, written: object, own: object) -> None:
        if written != own:
            raise DataError(
                f"{self._path} was written with {field} {written!r}, not {own!r}; name another file, or remove this one"
            )

    def cases(self) -> set[str]:
        """Names of the cases with any row."""
        return {row["case"] for row in self.rows}

    def require_case(self, case: ChallengeCase) -> None:
        """Raises :class:`DataError` where rows of this name were measured on another volume, labels or boxes."""
        for row in self.rows:
            if row["case"] == case.name:
                self._require_same(f"case {case.name!r} of sha256", row.get("sha256"), case.sha256())

    def has(self, case: str, engine: str) -> bool:
        """Whether a case is done."""
        return any((row["case"], row["engine"]) == (case, engine) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.rows.append(row)
        self.save()

    def fail(self, case: str, engine: str, reason: object) -> None:
        """Keep what went wrong; a failed case has no scores and is tried again by the next run."""
        self.failed[f"{case}: {engine}"] = str(reason)
        self.save()

    def save(self) -> None:
        """Write everything known so far."""
        if self._path is not None:
            figures = {"settings": self._settings, "failed": self.failed, "summary": self.summary(), "rows": self.rows}
            write_json_atomically(self._path, figures)

    def summary(self) -> list[dict[str, Any]]:
        """One record a setting and engine; means over cases, and over structures where the name says so."""
        keys = dict.fromkeys((row["setting"], row["engine"]) for row in self.rows)
        return [_summary(*key, [r for r in self.rows if (r["setting"], r["engine"]) == key]) for key in sorted(keys)]


def margin(rows: Sequence[Mapping[str, Any]], setting: str, model: str, controls: Iterable[str]) -> dict[str, Any]:
    """The model minus the control with the best final Dice, on the cases both have; {} where there are none.

    A mean of paired differences with its 95% bootstrap interval over patients, for final Dice and its area.
    """
    found = {(row["engine"], row["case"]): row for row in rows if row["setting"] == setting}
    cases = [case for engine, case in found if engine == model and all((name, case) in found for name in controls)]
    if not cases or not list(controls):
        return {}
    best = max(controls, key=lambda name: float(np.mean([found[name, case]["dsc_final"] for case in cases])))
    result: dict[str, Any] = {"best_control": best}
    for figure in ("dsc_final", "dsc_auc"):
        differences = [found[model, case][figure] - found[best, case][figure] for case in cases]
        result[figure] = interval_figures(bootstrap(differences, [found[model, case]["patient"] for case in cases]))
    return result


def text(summary: Sequence[Mapping[str, Any]]) -> str:
    """The table of a summary."""
    head = ["", "cases", "box", "+1", "+3", "+5", "DSC_AUC", "NSD_AUC", "NSD +5", "objects", "+1", "+5"]
    head += [_noc(target) for target in NOC_TARGETS] + ["s a step"]
    lines = []
    for record in summary:
        after, objects = record["dsc_after"], record["structure_dsc_after"]
        line = [f"{record['engine']}, {record['setting']}", str(record["cases"])]
        line += [_mean(after.get(step)) for step in ("0", "1", "3", "5")]
        line += [_mean(record[name]) for name in ("dsc_auc", "nsd_auc", "nsd_final")]
        line += [str(record["structures"]), _mean(objects["1"]), _mean(objects["5"])]
        line += [f"{record[n]['mean']:.2f} ({record[n]['reached']:.0%})" for n in map(_noc, NOC_TARGETS)]
        lines.append([*line, number(record["seconds_a_step"], 2)])
    return table(head, lines)


def _summary(setting: str, engine: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    patients = [row["patient"] for row in rows]
    structures = [(item, row["patient"]) for row in rows for item in row["structures"]]
    steps, last = rows[0]["steps"], rows[0]["steps"][-1]
    record: dict[str, Any] = {"setting": setting, "engine": engine, "cases": len(rows), "structures": len(structures)}
    record["dsc_after"] = {
        str(step): interval_figures(bootstrap([row["dsc"][n] for row in rows], patients))
        for n, step in enumerate(steps)
    }
    for figure in ("dsc_auc", "nsd_auc", "dsc_final", "nsd_final"):
        record[figure] = interval_figures(bootstrap([row[figure] for row in rows], patients))
    record["structure_dsc_after"] = {
        str(step): interval_figures(bootstrap([item["dsc"][n] for item, _ in structures], [p for _, p in structures]))
        for n, step in enumerate(steps)
    }
    for name in map(_noc, NOC_TARGETS):
        # Where the target is never reached the number of clicks that were allowed counts, as is usual for NoC.
        reached = [item[name] for item, _ in structures if item[name] is not None]
        mean = (sum(reached) + last * (len(structures) - len(reached))) / len(structures)
        record[name] = {"mean": mean, "reached": len(reached) / len(structures), "limit": last}
    record["seconds_a_step"] = float(np.mean([seconds for row in rows for seconds in row["seconds"]]))
    return record


def _noc(target: float) -> str:
    return f"noc{round(target * 100)}"


def _mean(figures: Mapping[str, Any] | None) -> str:
    return number(None if figures is None else figures["mean"])
