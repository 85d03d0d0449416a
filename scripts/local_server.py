"""A throw-away annotation server of this checkout, for scripts that drive one over HTTP."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from monailabel.client.client import MONAILabelClient, MONAILabelClientException

from medvl_sam2.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
_ENDS = (signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class OwnServer:
    """``address`` to talk to and ``process`` id of a running server."""

    address: str
    process: int

    def peak_memory_mib(self) -> float:
        """Peak resident memory of the server process in MiB (Linux)."""
        status = Path(f"/proc/{self.process}/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def computing_of(address: str) -> dict[str, Any]:
    """Weights, device and number format a server has computed with so far, as JSON values.

    Raises:
        requests.RequestException: it does not answer, or is no server of this project.
    """
    reply = requests.get(f"{address}/medvl/health", timeout=60)
    if reply.status_code != 503:  # unwell, but it says with what it computes
        reply.raise_for_status()
    health = reply.json()
    return {name: health[name] for name in ("model_version", "device", "precision")}


def said(facts: dict[str, Any]) -> str:
    """:func:`computing_of` in one line."""
    if facts["device"] is None:
        return f"the server has weights {facts['model_version']} and computed nothing"
    return f"the server computed on {facts['device']} in {facts['precision']}, weights {facts['model_version']}"


@contextmanager
def own_server(
    folder: Path, host: str = "127.0.0.1", studies: Path | None = None, conf: Mapping[str, str] | None = None
) -> Iterator[OwnServer]:
    """A server of this checkout on a free port, with a store of its own and no studies unless given.

    ``conf`` are further settings of the app. Stopped at the end.
    """
    with socket.socket() as probe:
        probe.bind((host, 0))
        port = probe.getsockname()[1]
    if studies is None:
        studies = folder / "studies"
        studies.mkdir()
    command = [sys.executable, str(ROOT / "scripts" / "serve.py"), "--studies", str(studies), "--host", host]
    command += ["--port", str(port)]
    for name, value in {"store": str(folder / "store"), **(conf or {})}.items():
        command += ["--conf", name, value]
    with _stopping_on_signals():
        with open(folder / "server.log", "wb") as log:
            server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
        try:
            _wait_for(f"http://{host}:{port}", server, folder / "server.log")
            yield OwnServer(f"http://{host}:{port}", server.pid)
        finally:
            _stop(server)


@contextmanager
def _stopping_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the script by an exception, so that what it started is stopped on the way out."""
    if threading.current_thread() is not threading.main_thread():  # Python takes signals in the main thread only
        yield
        return

    def leave(number: int, _: object) -> None:
        for again in _ENDS:  # a second one must not interrupt the stopping
            signal.signal(again, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in _ENDS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server with its process group: a training is a child of the server and must not outlive it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(20)
            break
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue


def _wait_for(address: str, server: subprocess.Popen[bytes], log: Path, limit: float = 300.0) -> None:
    client = MONAILabelClient(address)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if server.poll() is not None:
            tail = log.read_text(errors="replace").splitlines()[-15:]
            raise DataError("the server stopped while starting; the end of its log:\n" + "\n".join(tail))
        try:
            client.info()
        except (OSError, MONAILabelClientException):
            time.sleep(0.5)
        else:
            return
    raise DataError(f"the server did not answer within {limit:.0f} s; see {log}")
