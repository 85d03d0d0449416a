"""Runs the challenge's own evaluation script, unchanged, with a Python function in place of a team's container."""

from __future__ import annotations

import csv
import os
import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medvl_sam2.evaluation.challenge.npz import read_npz

Predict = Callable[[Path, Path], None]
LARGE = "60000000"
"""The script's limit for its half resolution path, as it stands there."""


class ReferenceRun:
    """``rows``: the script's CSV by case; ``requests``: the prompts of every step by case, as a container gets them."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}
        self.requests: dict[str, list[dict[str, Any]]] = {}


def run_reference(code: Path, cases: Path, work: Path, predict: Predict, large: int | None = None) -> ReferenceRun:
    """Score the npz files in ``cases`` by ``CVPR25_iter_eval.py`` of the checkout ``code``; files go to ``work``.

    ``large`` lowers the size from which the script measures errors at half resolution.
    """
    run = ReferenceRun()
    script = work / "evaluate_copy.py"
    teams, answers = work / "teams", work / "answers"
    teams.mkdir(parents=True)
    (teams / "ours.tar.gz").touch()
    text = (code / "CVPR25_iter_eval.py").read_text(encoding="utf-8")
    assert text.count(LARGE) == 1
    script.write_text(text if large is None else text.replace(LARGE, str(large)), encoding="utf-8")

    def system(command: str) -> int:
        if "container run" in command:
            for source in sorted((work / "inputs").iterdir()):
                run.requests.setdefault(source.stem, []).append(
                    {key: value for key, value in read_npz(source).items() if key in ("boxes", "clicks")}
                )
                predict(source, work / "outputs" / source.name)
        return 0

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the script's own: names that scipy and numpy have since moved
        patch.setattr(os, "system", system)
        patch.setattr("torch.cuda.is_available", lambda: False)
        patch.setattr(
            sys, "argv", ["evaluate", "-i", str(cases), "-o", str(answers), "-d", str(teams), "-val_gts", "-"]
        )
        patch.syspath_prepend(str(code))
        patch.chdir(work)
        runpy.run_path(str(script), run_name="__main__")
    with open(answers / "ours" / "ours_metrics.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            name = Path(row.pop("CaseName")).stem
            run.rows[name] = {key: float(value) for key, value in row.items()}
    return run


def write_case(
    path: Path, image: np.ndarray, labels: np.ndarray, spacing: tuple[float, ...], boxes: Any = None
) -> None:
    """A training case of the challenge; ``boxes`` are canonical (2, 3) arrays."""
    members: dict[str, Any] = {"imgs": image, "gts": labels, "spacing": spacing}
    if boxes is not None:
        members["boxes"] = [box_record(box) for box in boxes]
    np.savez_compressed(path, **members)


def box_record(box: np.ndarray) -> dict[str, Any]:
    """A box as the challenge writes it."""
    (z0, y0, x0), (z1, y1, x1) = box
    names = ("z_min", "z_max", "z_mid", "z_mid_x_min", "z_mid_y_min", "z_mid_x_max", "z_mid_y_max")
    return dict(zip(names, (z0, z1, (z0 + z1) // 2, x0, y0, x1, y1), strict=True))
