"""The train task turns submitted labels into a finetuning and reports it in the clients' keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.conftest import AFFINE, SHAPE, Running, write_phantom
from lib.trainers import finetune
from lib.trainers.finetune import datastore_samples, finetune_config
from medvl_sam2.errors import ConfigError, DataError
from medvl_sam2.training.finetune_records import FinetuneConfig, FinetuneProgress, FinetuneResult, FinetuneSample, Gate
from medvl_sam2.types import Geometry
from medvl_sam2.volume_io import write_mask


def submit(running: Running, image: str, values: list[int], **params: Any) -> None:
    mask = np.zeros(SHAPE, np.uint8)
    for row, value in enumerate(values):
        mask[row] = value
    path = running.studies.parent / "label.nrrd"
    write_mask(path, mask, Geometry(SHAPE, AFFINE))
    assert running.submit(image, path, **params).status_code == 200


def test_options_and_defaults(running: Running) -> None:
    trainer = running.client.get("/info/").json()["trainers"]["medvl_sam2"]
    assert finetune_config({**trainer["config"], "name": "train_01", "gpus": "all"}) == FinetuneConfig()
    changed = finetune_config({"max_epochs": "3", "learning_rate": 0.001, "trust_labels": "true", "minutes": ""})
    assert changed == FinetuneConfig(epochs=3, learning_rate=0.001, trust_labels=True)
    with pytest.raises(ConfigError, match="max_epochs 'many'"):
        finetune_config({"max_epochs": "many"})


def test_samples_carry_names_and_patients(running: Running) -> None:
    submit(running, "case_a", [1, 2], label_info=[{"name": "liver", "idx": 4}, {"name": "my segment", "idx": 9}])
    submit(running, "case_b", [5])
    running.app.datastore().update_image_info("case_b", {"PatientID": "P7"})
    first, second = datastore_samples(running.app.datastore())
    assert (first.image_id, dict(first.names)) == ("case_a", {1: "liver", 2: "my segment"})
    assert (second.image_id, dict(second.names)) == ("case_b", {5: "liver"})
    assert first.image == running.studies.resolve() / "case_a.nii.gz"
    assert second.label.parent.name == "version_1", "a version never changes, final does"
    assert second.patient == "id:P7" != first.patient


def test_a_label_without_names_is_left_out(running: Running) -> None:
    submit(running, "case_a", [1, 2], label_info=[{"name": "liver", "idx": 1}])
    with pytest.raises(DataError, match="case_a: mask value 2"):
        datastore_samples(running.app.datastore())
    submit(running, "case_b", [5])
    assert [sample.image_id for sample in datastore_samples(running.app.datastore())] == ["case_b"]


def test_training_without_labels_says_so(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "load_backend", lambda *_: None)
    response = running.client.post("/train/medvl_sam2", params={"run_sync": True})
    assert response.status_code == 422
    assert "no label to train on" in response.json()["detail"]
    assert running.client.get("/info/").json()["train_stats"] == {"medvl_sam2": {}}


def test_progress_and_outcome_reach_the_clients(
    running: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    submit(running, "case_a", [5])
    submit(running, "case_b", [5])
    during: list[dict[str, Any]] = []

    def run(
        config: FinetuneConfig,
        samples: list[FinetuneSample],
        base: Path | None,
        store: Path,
        progress: Callable[[FinetuneProgress], None],
        *_: Any,
    ) -> FinetuneResult:
        assert config.epochs == 2
        assert [sample.image_id for sample in samples] == ["case_a", "case_b"]
        assert store == running.store
        progress(FinetuneProgress("train", 1, config.epochs, loss=0.5, best_metric=0.75))
        during.append(running.client.get("/info/").json()["train_stats"]["medvl_sam2"])
        gate = Gate("holdout", True, "0.75 to 0.80")
        return FinetuneResult(tmp_path, "published", store / "versions" / "1", epochs=2, gates=(gate,), seconds=61.2)

    monkeypatch.setattr(finetune, "run_finetune", run)
    monkeypatch.setattr(finetune, "load_backend", lambda *_: None)
    assert running.app.schedule.state().labels == 2
    result = running.client.post("/train/medvl_sam2", params={"run_sync": True}, json={"max_epochs": 2}).json()
    assert result["published"] == "1"
    assert result["gates"][0]["name"] == "holdout"
    said = {"epoch": 1, "total_epochs": 2, "best_metric": 0.75, "stage": "train", "loss": 0.5, "message": ""}
    assert during == [said | {"seconds": 0.0}]
    after = running.client.get("/info/").json()["train_stats"]["medvl_sam2"]
    assert after["total_time"] == "0:01:01"
    assert after["message"] == "published"
    assert running.app.schedule.state().labels == 0


def test_labels_start_a_training(start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    running = start(retrain_every_labels="2")
    started: list[str] = []
    monkeypatch.setattr(running.app, "async_training", lambda model: started.append(model) or {"id": 1})
    submit(running, "case_a", [5])
    assert running.app.schedule.check() is False
    submit(running, "case_b", [5])
    assert running.app.schedule.check() is True
    assert started == ["medvl_sam2"]
    # What was counted survives a restart.
    assert start(retrain_every_labels="2").app.schedule.state().labels == 0


def test_patients_stay_apart_from_image_names(running: Running) -> None:
    write_phantom(running.studies / "case_c.nii.gz", 500)
    running.app.datastore().refresh()
    for image in ("case_a", "case_b", "case_c"):
        submit(running, image, [5])
    assert len({sample.patient for sample in datastore_samples(running.app.datastore())}) == 3
