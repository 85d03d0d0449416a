"""No request keeps another one waiting: whatever blocks in a handler, the event loop goes on answering."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

import lib.server
from app.conftest import Running, write_phantom

_PATIENCE_S = 20.0


@dataclass
class Gate:
    """Stands in for a method: whoever calls it waits until the gate opens."""

    entered: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def __call__(self, *_: Any, **__: Any) -> Any:
        self.entered.set()
        if not self.opened.wait(_PATIENCE_S):
            raise TimeoutError("the test did not open the gate")
        raise RuntimeError("the gate was open")


async def _while_blocked(gate: Gate, requests: list[dict[str, Any]], other: str) -> tuple[int, list[int]]:
    """Status of ``other`` answered while all ``requests`` are blocked, and theirs afterwards."""
    transport = httpx.ASGITransport(app=lib.server.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver", timeout=60) as client:
        slow = [asyncio.create_task(client.request(**request)) for request in requests]
        entered = await asyncio.to_thread(gate.entered.wait, _PATIENCE_S)
        assert entered, f"not at the gate but {[task.result().text if task.done() else task for task in slow]}"
        answer = await asyncio.wait_for(client.get(other), _PATIENCE_S)
        assert not any(task.done() for task in slow), "a blocked request was over before the other one was answered"
        gate.opened.set()
        return answer.status_code, [response.status_code for response in await asyncio.gather(*slow)]


_LABEL = {"params": {"label": "case_a", "tag": "final"}}
_IMAGE = {"params": {"image": "case_a"}}
_ID = {"params": {"id": "case_a"}}
_STORE: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("get_image_uri", "GET", "/datastore/image", _IMAGE),
    ("get_image_uri", "HEAD", "/datastore/image", _IMAGE),
    ("get_image_uri", "POST", "/infer/medvl_semantic", _IMAGE),
    ("get_label_uri", "GET", "/datastore/label", _LABEL),
    ("get_label_uri", "HEAD", "/datastore/label", {"params": {"image": "case_a", "tag": "final"}}),
    ("get_image_info", "GET", "/datastore/image/info", _IMAGE),
    ("get_label_info", "GET", "/datastore/label/info", _LABEL),
    ("update_image_info", "PUT", "/datastore/image/info", _IMAGE),
    ("update_label_info", "PUT", "/datastore/label/info", _LABEL),
    ("update_label_info", "PUT", "/datastore/updatelabelinfo", _LABEL),
    ("remove_image", "DELETE", "/datastore/image", _ID),
    ("remove_image", "DELETE", "/datastore/", _ID),
    ("remove_label", "DELETE", "/datastore/label", {"params": {"id": "case_a", "tag": "final"}}),
    ("datalist", "GET", "/datastore/", {"params": {"output": "train"}}),
    ("json", "GET", "/datastore/", {"params": {"output": "all"}}),
    ("get_dataset_archive", "GET", "/datastore/dataset", {}),
    ("add_image", "PUT", "/datastore/image", {"files": {"file": ("case_c.nii.gz", b"voxels")}}),
    ("add_image", "PUT", "/datastore/", {"files": {"file": ("case_c.nii.gz", b"voxels")}}),
    ("save_label", "PUT", "/datastore/label", _IMAGE | {"files": {"label": ("case_a.nii.gz", b"voxels")}}),
    ("get_unlabeled_images", "POST", "/activelearning/first", {"json": {}}),
)
_APP: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("infer", "POST", "/infer/medvl_semantic", _IMAGE),
    ("infer_wsi", "POST", "/infer/wsi/medvl_semantic", _IMAGE | {"json": {}}),
    ("infer_wsi", "POST", "/infer/wsi_v2/medvl_semantic", _IMAGE),
    ("next_sample", "POST", "/activelearning/random", {"json": {}}),
    ("train", "POST", "/train/medvl_sam2", {"params": {"run_sync": True}}),
    ("train", "POST", "/train/", {"params": {"run_sync": True}}),
    ("bundle_path", "POST", "/train/medvl_sam2", {}),
    ("scoring", "POST", "/scoring/dice", {"params": {"run_sync": True}}),
    ("scoring", "POST", "/scoring/", {"params": {"run_sync": True}}),
    ("batch_infer", "POST", "/batch/infer/medvl_semantic", {"params": {"run_sync": True}}),
    ("model_info", "GET", "/model/info/medvl_semantic", {}),
    ("model_file", "GET", "/model/medvl_semantic", {}),
    ("model_file", "PUT", "/model/medvl_semantic", {"files": {"file": ("weights.pt", b"weights")}}),
    ("model_file", "DELETE", "/model/medvl_semantic", {}),
)
_SESSIONS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("add_session", "PUT", "/session/", {"files": {"files": ("local.nii.gz", b"voxels")}}),
    ("get_session", "GET", "/session/abc", {}),
    ("get_session", "DELETE", "/session/abc", {}),
    ("get_session", "POST", "/infer/medvl_semantic", {"params": {"session_id": "abc"}}),
)


@pytest.mark.filterwarnings("ignore:The `parse_obj` method is deprecated")  # MONAI Label's own
@pytest.mark.parametrize(
    ("owner", "name", "method", "url", "more"),
    [
        (owner, *case)
        for owner, cases in (("datastore", _STORE), ("app", _APP), ("sessions", _SESSIONS))
        for case in cases
    ],
)
def test_a_blocked_request_blocks_nobody(
    running: Running,
    monkeypatch: pytest.MonkeyPatch,
    owner: str,
    name: str,
    method: str,
    url: str,
    more: dict[str, Any],
) -> None:
    gate = Gate()
    holder = running.app if owner == "app" else getattr(running.app, owner)()
    assert callable(getattr(holder, name))
    monkeypatch.setattr(running.app.datastore(), "get_labeled_images", lambda *_: ["case_a"])  # there is a dataset
    monkeypatch.setattr(holder, name, gate)
    status, slow = asyncio.run(_while_blocked(gate, [{"method": method, "url": url, **more}], "/info/"))
    assert (status, slow) == (200, [500])


@pytest.mark.parametrize("url", ["/info/", "/datastore/"])
def test_a_blocked_description_blocks_nobody(running: Running, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Over a DICOMweb server, the counts come from a query."""
    running.client.get("/info/")  # the last description is sent when a new one fails
    gate = Gate()
    monkeypatch.setattr(running.app.datastore(), "status", gate)
    status, slow = asyncio.run(_while_blocked(gate, [{"method": "GET", "url": url}], "/session/abc"))
    assert (status, slow) == (404, [200 if url == "/info/" else 500])


def test_reading_the_log_blocks_nobody(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    monkeypatch.setattr("monailabel.endpoints.logs.get_logs", gate)
    assert asyncio.run(_while_blocked(gate, [{"method": "GET", "url": "/logs/"}], "/info/")) == (200, [500])


@pytest.mark.parametrize("other", ["/info/", "/medvl/jobs", "/medvl/health", "/datastore/", "/session/abc"])
def test_more_inferences_than_threads_leave_threads_to_others(
    running: Running, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    gate = Gate()
    monkeypatch.setattr(running.app, "infer", gate)
    requests = [{"method": "POST", "url": "/infer/medvl_semantic", **_IMAGE}] * 80
    status, slow = asyncio.run(_while_blocked(gate, requests, other))
    assert status == (404 if "session" in other else 200)
    assert slow == [500] * 80


def test_more_downloads_than_threads_leave_threads_to_info(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    monkeypatch.setattr(running.app.datastore(), "get_image_uri", gate)
    requests = [{"method": "GET", "url": "/datastore/image", **_IMAGE}] * 50
    assert asyncio.run(_while_blocked(gate, requests, "/info/")) == (200, [500] * 50)


def test_the_store_may_take_its_time(start: Callable[..., Running], tmp_path: Path) -> None:
    """The same through a client that connects anew each time: blocked requests end as ever once they can."""
    running = start()
    write_phantom(tmp_path / "new.nii.gz", 50)
    with open(tmp_path / "new.nii.gz", "rb") as file:
        sent = running.client.put("/datastore/image", params={"image": "new"}, files={"file": ("new.nii.gz", file)})
    assert sent.json() == {"image": "new"}
    assert running.client.get("/datastore/image", params={"image": "new"}).status_code == 200
