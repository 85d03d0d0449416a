"""Quick work goes before inference, inference before what nobody waits for."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient

from lib.api.worker_threads import in_worker_threads
from lib.priority import BACKGROUND, INFERENCE, give_way, give_way_as_task

START = os.getpriority(os.PRIO_PROCESS, 0) if sys.platform == "linux" else 0

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="a priority is a thread's only on Linux"),
    pytest.mark.skipif(START >= INFERENCE, reason=f"the tests themselves run with niceness {START}"),
]


def _niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


def _of_new_thread(work: Callable[[], int]) -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_only_threads_that_infer_are_slowed() -> None:
    router = APIRouter()
    for path in ("/infer/model", "/medvl/labels", "/info/"):
        router.add_api_route(path, _niceness, methods=["GET"])
    app = FastAPI()
    app.include_router(in_worker_threads(router))
    with TestClient(app) as client:
        assert client.get("/infer/model").json() == INFERENCE
        assert client.get("/medvl/labels").json() == START
        assert client.get("/info/").json() == START
    assert _niceness() == START


def test_a_thread_that_gives_way_passes_it_on_and_never_rises() -> None:
    def work() -> int:
        give_way(BACKGROUND)
        give_way(INFERENCE)
        assert _of_new_thread(_niceness) == _niceness()
        return _niceness()

    assert _of_new_thread(work) == BACKGROUND
    assert _niceness() == START


def test_processes_that_monai_label_starts_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their main module tells them from the server."""

    def started_as(name: str) -> int:
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec(name, None))
        give_way_as_task()
        return _niceness()

    assert _of_new_thread(lambda: started_as("pytest.__main__")) == START
    assert _of_new_thread(lambda: started_as("monailabel.interfaces.utils.app")) == BACKGROUND
