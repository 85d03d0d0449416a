"""``/medvl/jobs``, ``/medvl/health`` and ``/medvl/cases``: what the panel and an administrator look at."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import pytest
from monailabel.utils.async_tasks import utils as async_tasks

import lib.server
from app.conftest import AFFINE, SHAPE, Running
from lib.api import dicomweb_server, health
from medvl_sam2.publishing import POINTER_FILE


def test_jobs_of_a_fresh_server(running: Running) -> None:
    jobs = running.client.get("/medvl/jobs").json()
    assert jobs["inference"] == []
    assert (jobs["training"], jobs["scoring"], jobs["batch_inference"]) == (None, None, None)
    assert jobs["model"]["served"] == "shipped"
    assert jobs["model"]["loaded"] is None
    assert jobs["model"]["history"] == [{"version": "shipped", "published": None}]
    assert running.predictors == []


def test_requests_in_the_queue_have_positions(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, opened = threading.Event(), threading.Event()
    running.slicer("medvl_semantic", classes="liver")  # loads the predictor
    answer = running.predictors[0].answer

    def slow(session: Any, question: str) -> Any:
        entered.set()
        assert opened.wait(20)
        return answer(session, question)

    monkeypatch.setattr(running.predictors[0], "answer", slow)

    async def run() -> list[dict[str, Any]]:
        transport = httpx.ASGITransport(app=lib.server.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:

            async def ask(who: str, image: str) -> None:
                params = json.dumps({"question": "Is it?", "client_id": who})
                await client.post("/infer/medvl_vqa", params={"image": image}, data={"params": params})

            async def queue(length: int) -> list[dict[str, Any]]:
                while True:
                    jobs = (await client.get("/medvl/jobs")).json()
                    if len(jobs["inference"]) == length:
                        return jobs["inference"]
                    await asyncio.sleep(0.01)

            tasks = [asyncio.create_task(ask("anna", "case_a"))]
            assert await asyncio.to_thread(entered.wait, 20)
            for number, who in enumerate(("ben", "carla"), start=2):
                tasks.append(asyncio.create_task(ask(who, "case_b")))
                waiting = await asyncio.wait_for(queue(number), 20)
            opened.set()
            await asyncio.gather(*tasks)
            assert (await client.get("/medvl/jobs")).json()["inference"] == []
            return waiting

    queue = asyncio.run(run())
    assert [(one["client"], one["position"]) for one in queue] == [("anna", 0), ("ben", 1), ("carla", 2)]
    assert [one["what"] for one in queue] == ["medvl_vqa"] * 3
    assert queue[0]["image"] == "case_a.nii.gz"
    assert all(0 <= one["seconds"] < 60 for one in queue)


def _mask(path: Path) -> Path:
    image = nib.Nifti1Image(np.ones(SHAPE, np.uint8), AFFINE)
    image.set_sform(AFFINE, 1)
    nib.save(image, path)
    return path


def _task(status: str, started: datetime, **more: Any) -> dict[str, Any]:
    moment = started.strftime("%Y-%m-%d %H:%M:%S")
    return {"id": "t1", "status": status, "request": {}, "start_ts": moment, **more}


def test_training_progress(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"line {number}" for number in range(20)]
    started = datetime.now().replace(microsecond=0)
    monkeypatch.setitem(async_tasks.background_tasks, "train", [_task("RUNNING", started, details=lines)])
    running.store.mkdir(exist_ok=True)
    stats = {"epoch": 2, "total_epochs": 8, "best_metric": 0.7, "stage": "train", "loss": 0.5, "seconds": 61.0}
    file = running.store / "train_stats.json"
    file.write_text(json.dumps(stats | {"message": ""}), encoding="utf-8")

    training = running.client.get("/medvl/jobs").json()["training"]
    assert training["status"] == "RUNNING"
    assert training["lines"] == lines[-5:]
    assert training["ended"] is None
    assert datetime.fromisoformat(training["started"]).timestamp() == started.timestamp()
    assert training["progress"] == stats | {"message": "", "fraction": 0.25}

    os.utime(file, (started.timestamp() - 100,) * 2)  # written by the training before
    assert running.client.get("/medvl/jobs").json()["training"]["progress"] is None

    done = _task("DONE", started, details=lines, end_ts=started.strftime("%Y-%m-%d %H:%M:%S"))
    monkeypatch.setitem(async_tasks.background_tasks, "train", [done])
    assert running.client.get("/medvl/jobs").json()["training"]["ended"] == training["started"]


def test_schedule_and_history(start: Callable[..., Running], tmp_path: Path) -> None:
    running = start(retrain_every_labels="5", retrain_cron="0 2 * * *")
    running.submit("case_a", _mask(tmp_path / "mask.nii.gz"))
    (running.store / "versions" / "2").mkdir(parents=True)
    pointer = {"version": 2, "last": 2, "history": [0, 1]}
    (running.store / POINTER_FILE).write_text(json.dumps(pointer), encoding="utf-8")
    jobs = running.client.get("/medvl/jobs").json()
    schedule = jobs["schedule"]
    assert (schedule["every_labels"], schedule["cron"], schedule["due"]) == (5, "0 2 * * *", False)
    assert schedule["labels_since_training"] == 1
    assert datetime.fromisoformat(schedule["next_cron"]).timestamp() > time.time()
    history = jobs["model"]["history"]
    assert [one["version"] for one in history] == ["shipped", "1", "2"]
    assert [one["published"] is None for one in history] == [True, True, False]  # 1 was deleted since


def test_health(running: Running) -> None:
    response = running.client.get("/medvl/health")
    said = response.json()
    assert (response.status_code, said["status"], said["reasons"]) == (200, "ok", [])
    assert said["store_writable"] is True
    assert said["disk_free_mb"] >= health.LEAST_FREE_MB
    assert (said["model_version"], said["device"], said["precision"], said["sessions"]) == ("shipped", None, None, 0)
    assert running.predictors == []  # nothing was loaded for it
    running.slicer("medvl_semantic", classes="liver")
    said = running.client.get("/medvl/health").json()
    assert (said["model_version"], said["device"], said["precision"]) == ("shipped-1", "cpu", "float32")
    assert said["sessions"] == 1


def test_health_names_what_is_wrong(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    running.store.write_text("a file where the folder should be", encoding="utf-8")
    monkeypatch.setattr(health, "LEAST_FREE_MB", 10**12)
    monkeypatch.setattr(dicomweb_server, "server_root", lambda: "http://127.0.0.1:9/dicom-web")
    away = dicomweb_server.Reachability(False, "it cannot be reached (ConnectionError)")
    monkeypatch.setattr(health._DICOMWEB, "known", lambda root: away)
    response = running.client.get("/medvl/health")
    said = response.json()
    assert (response.status_code, said["status"]) == (503, "unwell")
    assert said["store_writable"] is False
    assert said["dicomweb_reachable"] is False
    text = " ".join(said["reasons"])
    for reason in ("cannot be written to", "MB of disk are free", "http://127.0.0.1:9/dicom-web: it cannot be reached"):
        assert reason in text


@pytest.mark.parametrize("pointer", ['{"version": 7, "last": 7, "history": [0]}', "{"])
def test_health_tells_of_weights_that_are_gone(running: Running, pointer: str) -> None:
    running.store.mkdir()
    (running.store / POINTER_FILE).write_text(pointer, encoding="utf-8")
    response = running.client.get("/medvl/health")
    assert response.status_code == 503
    assert "weights: " in response.json()["reasons"][0]


def test_cases(running: Running, tmp_path: Path) -> None:
    running.app.datastore().update_image_info("case_a", {"PatientID": "P1", "StudyInstanceUID": "1.2"})
    before = time.time()
    assert running.submit("case_a", _mask(tmp_path / "mask.nii.gz")).status_code == 200
    assert running.submit("case_a", tmp_path / "mask.nii.gz", tag="version_1").status_code == 200
    first, second = running.client.get("/medvl/cases").json()
    assert (first["image"], first["labelled"], first["PatientID"], first["StudyInstanceUID"]) == (
        *("case_a", True, "P1", "1.2"),
    )
    assert {"final", "version_1"} <= set(first["tags"])
    assert first["versions"] >= 1
    assert int(before) <= datetime.fromisoformat(first["labelled_at"]).timestamp() <= time.time()
    assert (second["image"], second["labelled"], second["versions"], second["labelled_at"]) == (
        "case_b",
        False,
        0,
        None,
    )


def test_thousands_of_cases_cost_a_handful_of_questions(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    store = running.app.datastore()
    one = store._datastore.objects["case_a"]
    for number in range(5000):
        store._datastore.objects[f"copy_{number}"] = one.model_copy(deep=True)
    asked: list[str] = []
    for name in ("get_image_info", "get_label_info", "get_image_uri", "get_labels_by_image_id"):
        monkeypatch.setattr(store, name, lambda *_, name=name: asked.append(name))
    started = time.process_time()
    assert len(running.client.get("/medvl/cases").json()) == 5002
    assert asked == []
    assert time.process_time() - started < 2
