"""The two lines of README that start a DICOM server."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import requests

from orthanc import free_port, orthanc_missing, stow, write_series
from volume_files import hounsfield, turned


@pytest.mark.e2e
def test_server_answers_dicomweb_and_keeps_what_it_was_sent(repository: Path, tmp_path: Path) -> None:
    reason = orthanc_missing()
    if reason:
        pytest.skip(reason)
    port = free_port()
    storage = tmp_path / "my studies"
    command = [str(repository / "scripts" / "orthanc"), "--port", str(port), f"--storage={storage}"]
    affine = np.eye(4)
    affine[:3, :3] = turned()
    series = write_series(tmp_path / "s", hounsfield(), affine)
    for start in range(2):
        with open(tmp_path / "log", "wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            studies = _studies(f"http://127.0.0.1:{port}/dicom-web")
            assert [s["0020000D"]["Value"] for s in studies] == ([[series.study]] if start else [])
            if not start:
                stow(f"http://127.0.0.1:{port}/dicom-web", series.files)
        finally:
            process.terminate()
            process.wait(timeout=20)
    assert f"--studies http://127.0.0.1:{port}/dicom-web" in (tmp_path / "log").read_text()


def _studies(dicomweb: str) -> list[dict]:
    for _ in range(200):
        try:
            reply = requests.get(f"{dicomweb}/studies", headers={"Accept": "application/dicom+json"}, timeout=2)
        except requests.ConnectionError:
            time.sleep(0.05)
            continue
        return list(reply.json())
    pytest.fail("Orthanc does not answer")


@pytest.mark.parametrize(
    ("options", "reason"), [(["--port", "abc"], "is no number"), (["--what"], "unknown option --what")]
)
def test_wrong_options_are_explained(repository: Path, options: list[str], reason: str) -> None:
    done = subprocess.run([repository / "scripts" / "orthanc", *options], capture_output=True, text=True, timeout=20)
    assert done.returncode == 2
    assert reason in done.stderr
