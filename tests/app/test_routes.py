"""Every route and response of MONAI Label is still there, and what is new is described."""

from __future__ import annotations

import json
from typing import Any

import monailabel.app
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient

import lib.server
from app.conftest import Running


def _routes(app: FastAPI) -> set[tuple[str, str]]:
    contexts = iter_route_contexts(app.routes)
    return {(one.path, method) for one in contexts if getattr(one, "path", None) for method in one.methods or ("*",)}


def test_no_route_of_monai_label_is_lost() -> None:
    theirs, ours = _routes(monailabel.app.app), _routes(lib.server.app)
    assert len(theirs) > 50
    assert theirs - ours == set()
    assert {path for path, _ in ours - theirs if not path.startswith("/medvl/")} == set()


def test_the_descriptions_of_monai_label_are_kept() -> None:
    theirs, ours = monailabel.app.app.openapi()["paths"], lib.server.app.openapi()["paths"]
    for path, methods in theirs.items():
        assert ours[path] == methods, path


@pytest.mark.parametrize("path", ["/medvl/health", "/medvl/jobs", "/medvl/cases"])
def test_what_is_new_is_described(path: str) -> None:
    described = lib.server.app.openapi()["paths"][path]["get"]
    assert described["summary"]
    assert described["tags"] == ["MedVL"]
    content = described["responses"]["200"]["content"]["application/json"]["schema"]
    assert "$ref" in json.dumps(content)


def test_every_handler_of_monai_label_has_left_the_event_loop() -> None:
    endpoints = [context.endpoint for context in iter_route_contexts(lib.server.app.routes) if context.endpoint]
    theirs = [one for one in endpoints if one.__module__.startswith("monailabel.endpoints")]
    assert len(theirs) > 40
    assert [one for one in theirs if not one.__code__.co_filename.endswith("worker_threads.py")] == []


@pytest.mark.parametrize(
    ("method", "url", "more"),
    [
        ("GET", "/", {}),
        ("GET", "/favicon.ico", {}),
        ("GET", "/docs", {}),
        ("GET", "/info/", {}),
        ("GET", "/info", {}),
        ("GET", "/datastore/", {}),
        ("GET", "/datastore/", {"params": {"output": "all"}}),
        ("GET", "/datastore/", {"params": {"output": "train"}}),
        ("GET", "/datastore/", {"params": {"output": "nonsense"}}),
        ("GET", "/datastore/image", {"params": {"image": "case_a"}}),
        ("GET", "/datastore/image", {"params": {"image": "nobody"}}),
        ("HEAD", "/datastore/image", {"params": {"image": "case_a"}}),
        ("GET", "/datastore/image/info", {"params": {"image": "case_a"}}),
        ("GET", "/datastore/label", {"params": {"label": "case_a", "tag": "final"}}),
        ("PUT", "/datastore/image/info", {"params": {"image": "case_a"}, "data": {"info": '{"seen": true}'}}),
        ("POST", "/activelearning/first", {"json": {"client_id": "somebody"}}),
        ("GET", "/train/", {}),
        ("GET", "/scoring/", {}),
        ("GET", "/batch/infer", {}),
        ("DELETE", "/train/", {}),
        ("GET", "/session/nobody", {}),
        ("GET", "/model/info/medvl_semantic", {}),
        ("GET", "/nothing", {}),
        ("PATCH", "/info/", {}),
    ],
)
def test_responses_are_those_of_monai_label(running: Running, method: str, url: str, more: dict[str, Any]) -> None:
    bare = TestClient(monailabel.app.app, raise_server_exceptions=False)
    theirs, ours = bare.request(method, url, **more), running.client.request(method, url, **more)
    assert ours.status_code == theirs.status_code
    assert ours.headers.get("content-type") == theirs.headers.get("content-type")
    assert ours.headers.get("content-disposition") == theirs.headers.get("content-disposition")
    if theirs.status_code == 422:
        assert ours.json()["detail"] == theirs.json()["detail"]
        assert "'train', 'stats' or 'all'" in ours.json()["reason"]
    elif url == "/activelearning/first":
        assert ours.json() == theirs.json() | {"strategy": ours.json()["strategy"]}
    else:
        assert ours.content == theirs.content


def test_inference_answers_as_monai_label(running: Running) -> None:
    bare = TestClient(monailabel.app.app, raise_server_exceptions=False)
    ask = {"params": {"image": "case_a", "output": "json"}, "data": {"params": '{"question": "Is it?"}'}}
    theirs, ours = (client.post("/infer/medvl_vqa", **ask).json() for client in (bare, running.client))
    assert {key: ours[key] for key in ("answer", "question")} == {key: theirs[key] for key in ("answer", "question")}
    assert ours.keys() == theirs.keys()


def test_other_origins_are_allowed_as_by_monai_label(running: Running) -> None:
    origin = {"Origin": "http://viewer.example"}
    bare = TestClient(monailabel.app.app)
    theirs, ours = (client.get("/info/", headers=origin).headers for client in (bare, running.client))
    assert theirs["access-control-allow-origin"] == ours["access-control-allow-origin"]
