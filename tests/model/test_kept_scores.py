"""Scores of models are kept under a key, and found again only under the same conditions."""

from __future__ import annotations

import ast
import dataclasses
import os
from importlib.metadata import packages_distributions, version
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune_fakes import SHAPE, FakePredictor, make_samples, write_model
from medvl_sam2.training import kept_scores
from medvl_sam2.training.finetune_samples import load_samples
from medvl_sam2.training.holdout import assign_patients
from medvl_sam2.training.kept_scores import LIBRARIES, KeptScores, library_version, score_key
from medvl_sam2.training.measure import Measurement, Naming, Score
from medvl_sam2.types import Geometry

NO_SCORE_DEPENDS_ON = {"hydra-core"}
"""Distributions that the code which measures imports and that change no score: hydra is only cleared again."""


def test_model_cases_settings_place_and_code_are_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, base = make_samples(tmp_path, 5), write_model(tmp_path / "base", 0.6)
    predictor = FakePredictor(base)
    split = assign_patients(tmp_path / "holdout.json", [sample.patient for sample in samples])
    held = next(sample for sample in samples if sample.patient in split.holdout)
    (loaded,), _ = load_samples([held])
    settings = {"clicks": 1, "objects": 24, "min_voxels": 50}
    key = score_key(base, predictor, [loaded.case], settings)
    assert key == score_key(base, FakePredictor(base), [load_samples([held])[0][0].case], dict(settings))
    volume, masks = loaded.case.volume, loaded.case.masks
    other_voxel = volume.array.copy()
    other_voxel[0, 0, 0] += 1
    name = next(iter(masks))
    others = {
        "weights": score_key(write_model(tmp_path / "other", 0.7), predictor, [loaded.case], settings),
        "device": score_key(base, FakePredictor(base, "meta"), [loaded.case], settings),
        "precision": score_key(base, FakePredictor(base, precision="bfloat16"), [loaded.case], settings),
        "settings": score_key(base, predictor, [loaded.case], {**settings, "clicks": 2}),
        "cases": score_key(base, predictor, [loaded.case] * 2, settings),
    }
    for what, case in {
        "image": dataclasses.replace(loaded.case, volume=dataclasses.replace(volume, array=other_voxel)),
        "place": dataclasses.replace(
            loaded.case, volume=dataclasses.replace(volume, geometry=Geometry(SHAPE, np.diag([2.0, 2, 3, 1])))
        ),
        "mask": dataclasses.replace(loaded.case, masks={**masks, name: ~masks[name]}),
        "name": dataclasses.replace(loaded.case, masks={f"not {n}": mask for n, mask in masks.items()}),
    }.items():
        others[what] = score_key(base, predictor, [case], settings)
    with monkeypatch.context() as other:
        other.setattr(kept_scores, "package_sha256", lambda: "other code")
        others["code"] = score_key(base, predictor, [loaded.case], settings)
    with monkeypatch.context() as other:
        other.setattr(torch, "__version__", "other torch")
        others["torch"] = score_key(base, predictor, [loaded.case], settings)
    for name in LIBRARIES:
        with monkeypatch.context() as other:
            other.setattr(kept_scores, "version", lambda asked, name=name: "0.0" if asked == name else version(asked))
            others[name] = score_key(base, predictor, [loaded.case], settings)
    assert len({key, *others.values()}) == 1 + len(others)


def test_the_libraries_in_the_key_are_those_the_measuring_code_imports() -> None:
    """A new one is put in the key, or above."""
    made_by = packages_distributions()
    measuring = ("medvl_sam2.predictor.predictor", "medvl_sam2.training.measure")
    names = {name.partition(".")[0] for name in _imported(*measuring)}
    libraries = {made_by[name][0].lower() for name in names - {"medvl_sam2"} if name in made_by}
    known = {name.lower() for name in LIBRARIES}
    assert libraries - NO_SCORE_DEPENDS_ON == {"torch"} | known - {"torchvision"}  # that one sam2 imports


def _imported(*modules: str) -> set[str]:
    """Modules that these of the package import, and names out of them, also through others of the package."""
    root, found, left = Path(kept_scores.__file__).parents[2], set[str](), list(modules)
    while left:
        file = root / f"{left.pop().replace('.', '/')}.py"
        if not file.is_file():
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            new: set[str] = set()
            if isinstance(node, ast.Import):
                new = {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                new = {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
            left += new - found
            found |= new
    return found


def test_the_version_of_a_library_that_is_not_installed_is_empty() -> None:
    assert library_version("numpy") == np.__version__
    assert library_version("medvl-sam2-of-nobody") == ""


def test_the_scores_that_were_used_last_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_scores, "MOST_KEPT", 3)
    scores = KeptScores(tmp_path)
    measured = Measurement((Score("case", "liver", "text", 0.5),), Naming(0, ()))
    for age, key in enumerate(["c", "b", "a"]):
        scores.keep(key, measured)
        os.utime(tmp_path / "scores" / f"{key}.json", (1000 - age, 1000 - age))
    assert scores.known("a") == measured  # the oldest, used now
    scores.keep("new", measured)
    assert [scores.known(key) for key in ("a", "b", "c", "new")] == [measured, None, measured, measured]
