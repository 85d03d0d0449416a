"""``--conf upstream_aliases true``: our tasks under the names of MONAI Label's radiology app."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.conftest import AFFINE, SHAPE, Running
from app.test_infer import _nrrd
from lib.configs.upstream_aliases import INFER_ALIASES, TRAIN_ALIASES, TRAIN_DEFAULTS, UNCERTAINTY_ALIAS
from lib.trainers import finetune
from medvl_sam2.training.finetune_records import FinetuneConfig, FinetuneResult
from medvl_sam2.types import Geometry
from medvl_sam2.vocabulary import CLASSES
from medvl_sam2.volume_io import write_mask


def test_aliases_are_offered_on_request_only(start: Callable[..., Running]) -> None:
    info = start().client.get("/info/").json()
    assert not set(INFER_ALIASES) & set(info["models"])
    assert list(info["trainers"]) == ["medvl_sam2"]
    assert not {UNCERTAINTY_ALIAS} & {*info["strategies"], *info["scoring"]}
    info = start(upstream_aliases="true").client.get("/info/").json()
    assert set(INFER_ALIASES) < set(info["models"])
    assert set(TRAIN_ALIASES) < set(info["trainers"])
    assert UNCERTAINTY_ALIAS in info["strategies"]
    assert UNCERTAINTY_ALIAS in info["scoring"]
    assert next(iter(info["models"])) == "medvl_interactive"  # ours stay first


def test_an_alias_answers_as_its_task(start: Callable[..., Running]) -> None:
    running = start(upstream_aliases="true")
    values, _ = _nrrd(running.infer("segmentation_spleen", output="image").content)
    assert set(np.unique(values)) == {0, CLASSES.index("spleen") + 1}
    values, _ = _nrrd(running.infer("segmentation_spleen", output="image", classes="liver").content)
    assert set(np.unique(values)) == {0, CLASSES.index("liver") + 1}
    values, _ = _nrrd(running.infer("deepgrow_pipeline", output="image", foreground=[[1, 2, 3]]).content)
    assert np.argwhere(values).tolist() == [[1, 2, 3]]


def test_an_alias_trains_by_short_settings_and_the_requests(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    running = start(upstream_aliases="true")
    mask = np.zeros(SHAPE, np.uint8)
    mask[2:6] = 5
    for image in ("case_a", "case_b"):
        write_mask(tmp_path / "label.nrrd", mask, Geometry(SHAPE, AFFINE))
        running.submit(image, tmp_path / "label.nrrd")
    seen: list[FinetuneConfig] = []

    def run(config: FinetuneConfig, *_: Any) -> FinetuneResult:
        seen.append(config)
        return FinetuneResult(tmp_path, "not published")

    monkeypatch.setattr(finetune, "run_finetune", run)
    monkeypatch.setattr(finetune, "load_backend", lambda *_: None)
    theirs = {"model": "deepedit", "max_epochs": 3, "name": "run_01", "val_split": 0.5, "multi_gpu": False}
    assert running.client.post("/train/deepedit", params={"run_sync": True}, json=theirs).status_code == 200
    assert seen == [dataclasses.replace(TRAIN_DEFAULTS, epochs=3)]
    # Without a name in the address: what the request names, else our trainer, once in either case.
    named = running.client.post("/train/", params={"run_sync": True}, json=theirs).json()
    assert named["deepedit"]["result"]["reason"] == "not published"
    own = {"medvl_sam2": {"max_epochs": 2}}
    assert list(running.client.post("/train/", params={"run_sync": True}, json=own).json()) == ["medvl_sam2"]
    assert seen[1:] == [seen[0], FinetuneConfig(epochs=2)]


def test_an_alias_publishes_by_the_gates_of_our_trainer() -> None:
    ours, theirs = dataclasses.asdict(FinetuneConfig()), dataclasses.asdict(TRAIN_DEFAULTS)
    changed = {name for name, value in theirs.items() if value != ours[name]}
    assert changed == {"epochs", "steps_per_epoch", "minutes", "replay_cases"}  # how long it trains, and no more


@pytest.mark.parametrize("alias", ["segmentation_spleen", "deepedit"])
def test_an_alias_that_is_off_is_unknown(running: Running, alias: str) -> None:
    assert running.infer(alias).status_code == 404
