"""A real server in a process of its own: it starts offline, answers, and its training process finds the app."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from app.conftest import write_phantom
from orthanc import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server started by ``scripts/serve.py`` over two phantoms."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "studies").mkdir()
    write_phantom(folder / "studies" / "case_a.nii.gz", 100)
    write_phantom(folder / "studies" / "case_b.nii.gz", 300)
    port = free_port()
    repository = Path(__file__).resolve().parents[2]
    command = [sys.executable, "scripts/serve.py", "--studies", str(folder / "studies"), "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MONAI_LABEL")}
    environment.pop("PYTHONPATH", None)
    environment["MONAI_LABEL_SESSION_PATH"] = str(folder / "sessions")
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [*command, "--conf", "store", str(folder / "store")],
            cwd=repository,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                pytest.fail((folder / "log").read_text(errors="replace")[-3000:])
            try:
                requests.get(f"{address}/info/", timeout=10)
                break
            except requests.ConnectionError:
                time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


def test_it_describes_itself(server: str) -> None:
    info = requests.get(f"{server}/info/", timeout=60).json()
    assert info["name"] == "MedVL-SAM2"
    assert info["datastore"]["total"] == 2


def test_it_states_reasons(server: str) -> None:
    response = requests.post(f"{server}/infer/medvl_report", params={"image": "nobody"}, timeout=60)
    assert response.status_code == 404
    assert "image" in response.json()["detail"]
    response = requests.post(f"{server}/infer/medvl_report", params={"image": "x"}, data={"params": "{"}, timeout=60)
    assert response.status_code == 400


def test_a_training_process_finds_the_app_and_says_why_it_stops(server: str) -> None:
    assert requests.post(f"{server}/train/medvl_sam2", json={}, timeout=60).status_code == 200
    while (task := requests.get(f"{server}/train/", timeout=60).json())["status"] in ("SUBMITTED", "RUNNING"):
        time.sleep(0.5)
    assert task["status"] == "ERROR"
    assert any("no label to train on" in line for line in task["details"])
    assert requests.get(f"{server}/info/", timeout=60).status_code == 200
