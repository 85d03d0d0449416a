"""The DICOMweb proxy, against a small server that says what it was asked."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import pytest
from fastapi.testclient import TestClient
from monailabel.config import settings
from starlette.requests import ClientDisconnect

import lib.server
from app.conftest import AFFINE, SHAPE, Running
from app.small_server import serving
from lib.api import dicomweb_server, proxy
from lib.api.dicomweb_server import Watch, resource_url

_FRAMES = bytes(range(256)) * 20_000


class _Slow:
    """What the small server does not answer, or only by half, until it may ``go_on``."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.halves: list[str] = []
        self.silent: list[str] = []
        self.left = threading.Event()


class _DicomServer(BaseHTTPRequestHandler):
    """Answers with what it was asked; some paths are special."""

    protocol_version = "HTTP/1.1"
    slow = _Slow()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.endswith("/silent"):
            self.slow.silent.append(path)
            assert self.slow.go_on.wait(60)
            self._answer(200, "text/plain", b"late")
        elif path.endswith("/half"):
            self.slow.halves.append(path)
            self._answer(200, "text/plain", b"half", {"Content-Length": "8"})
            assert self.slow.go_on.wait(60)
            self.wfile.write(b"late")
        elif path.endswith("/left"):
            once = {"Connection": "close"} if self.path.endswith("?once") else {}
            self._answer(200, "text/plain", b"half", {"Content-Length": "8", **once})
            self.connection.settimeout(30)
            with suppress(ConnectionResetError):
                assert self.connection.recv(1) == b""
            self.slow.left.set()
            self.close_connection = True
        elif self.headers.get("Accept") == "image/unknown":
            self._answer(406, "text/plain", b"not offered")
        elif path.endswith("/empty"):
            self._answer(204, "application/dicom+json", b"")
        elif path.endswith("/missing"):
            self._answer(404, "text/plain", b"no such study")
        elif path.endswith("/frames"):
            self._answer(200, "multipart/related; type=application/octet-stream; boundary=x", _FRAMES)
        elif path.endswith("/packed"):
            self._answer(200, "application/dicom+json", gzip.compress(b"[]"), {"Content-Encoding": "gzip"})
        else:
            self._echo(b"")

    def do_POST(self) -> None:
        self._echo(self.rfile.read(int(self.headers["Content-Length"])))

    def _echo(self, body: bytes) -> None:
        heard = {"method": self.command, "path": self.path, "headers": dict(self.headers), "body": body.decode()}
        self._answer(200, "application/dicom+json", json.dumps(heard).encode())

    def _answer(self, status: int, kind: str, content: bytes, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        cookie = {"Set-Cookie": "session=1", "X-Server": "small"}
        for name, value in {"Content-Type": kind, "Content-Length": len(content), **cookie, **(more or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def dicom_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(ThreadingHTTPServer, "request_queue_size", 128)
    monkeypatch.setattr(_DicomServer, "slow", _Slow())
    with serving(_DicomServer) as address:
        try:
            yield f"{address}/dicom-web"
        finally:
            _DicomServer.slow.go_on.set()


@pytest.fixture
def client(running: Running, monkeypatch: pytest.MonkeyPatch, dicom_server: str) -> TestClient:
    """The front over the app of ``running``, with the small server as what the proxy asks."""
    monkeypatch.setattr("lib.api.dicomweb_server.settings.MONAI_LABEL_STUDIES", dicom_server)
    monkeypatch.setattr(lib.server.monailabel_front, "app_instance", lambda: running.app)
    monkeypatch.setattr("lib.api.body_limit.app_instance", lambda: running.app)
    return TestClient(lib.server.app, raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("qido/studies?PatientID=A*&limit=5", "/dicom-web/studies?PatientID=A*&limit=5"),
        (
            "qido/studies?00100010=M%C3%BCller%5EA&includefield=00081030",
            "/dicom-web/studies?00100010=M%C3%BCller%5EA&includefield=00081030",
        ),
        ("wado/studies/1.2/series/3.4/metadata", "/dicom-web/studies/1.2/series/3.4/metadata"),
        ("stow/studies", "/dicom-web/studies"),
        ("studies/1.2/instances/5/frames/1,2", "/dicom-web/studies/1.2/instances/5/frames/1,2"),
        ("qido/studies/a%3Fb%23c", "/dicom-web/studies/a%3Fb%23c"),
    ],
)
def test_queries_arrive_whole(client: TestClient, path: str, asked: str) -> None:
    response = client.get(f"/proxy/dicom/{path}")
    assert response.status_code == 200
    assert response.json()["path"] == asked


def test_prefixes_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("QIDO", "rs"), ("WADO", "wado"), ("STOW", "stow")):
        monkeypatch.setattr(settings, f"MONAI_LABEL_{name}_PREFIX", value)
    assert resource_url("http://h/d", "qido", "studies") == "http://h/d/rs/studies"
    assert resource_url("http://h/d", "qido", "studies/1/metadata") == "http://h/d/wado/studies/1/metadata"
    assert resource_url("http://h/d", "wado", "studies/1") == "http://h/d/wado/studies/1"
    assert resource_url("http://h/d", "stow", "studies") == "http://h/d/stow/studies"
    assert resource_url("http://h/d", "", "studies") == "http://h/d/studies"


def test_what_was_encoded_twice_stays_so() -> None:
    """A server must not decode a second time what was checked after the first."""
    assert resource_url("http://h/d", "", "a%2e%2e%2fb") == "http://h/d/a%252e%252e%252fb"


def test_what_the_client_wants_is_passed_and_who_it_is_is_not(client: TestClient) -> None:
    sent = {"Accept": "application/dicom+json", "Authorization": "Bearer mine", "Cookie": "a=b", "Range": "bytes=0-9"}
    heard = client.get("/proxy/dicom/qido/studies", headers=sent).json()["headers"]
    assert heard["accept"] == "application/dicom+json"
    assert heard["range"] == "bytes=0-9"
    assert not {"authorization", "cookie"} & {name.lower() for name in heard}


def test_a_kind_the_server_does_not_offer_is_not_insisted_on(client: TestClient) -> None:
    response = client.get("/proxy/dicom/qido/studies?a=b", headers={"Accept": "image/unknown"})
    assert response.status_code == 200
    assert response.json()["path"] == "/dicom-web/studies?a=b"
    assert "accept" not in response.json()["headers"]


def test_the_servers_own_credentials_are_used(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "MONAI_LABEL_DICOMWEB_USERNAME", "user")
    monkeypatch.setattr(settings, "MONAI_LABEL_DICOMWEB_PASSWORD", "secret")
    heard = client.get("/proxy/dicom/qido/studies").json()["headers"]
    assert heard["Authorization"] == "Basic dXNlcjpzZWNyZXQ="


def test_answers_pass_as_they_come(client: TestClient) -> None:
    frames = client.get("/proxy/dicom/wado/studies/1/frames")
    assert frames.content == _FRAMES
    assert frames.headers["content-type"] == "multipart/related; type=application/octet-stream; boundary=x"
    assert frames.headers["content-length"] == str(len(_FRAMES))
    assert frames.headers["x-server"] == "small"
    assert "set-cookie" not in frames.headers
    empty = client.get("/proxy/dicom/qido/studies/empty")
    assert (empty.status_code, empty.content) == (204, b"")
    missing = client.get("/proxy/dicom/wado/studies/missing")
    assert (missing.status_code, missing.text) == (404, "no such study")
    assert client.get("/proxy/dicom/qido/packed").json() == []


def test_bodies_are_posted(client: TestClient) -> None:
    kind = "multipart/related; type=application/dicom; boundary=x"
    heard = client.post("/proxy/dicom/stow/studies?x=1", content=b"dicom" * 1000, headers={"Content-Type": kind}).json()
    assert (heard["method"], heard["path"], heard["body"]) == ("POST", "/dicom-web/studies?x=1", "dicom" * 1000)
    assert heard["headers"]["content-type"] == kind


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "path", ["%2e%2e/system", "qido/%2e%2e/%2e%2e/system", "wado/a%2f%2e%2e%2fb", "qido/..%5csystem"]
)
def test_nothing_leaves_the_root(client: TestClient, method: str, path: str) -> None:
    response = client.request(method, f"/proxy/dicom/{path}")
    assert response.status_code == 400
    assert "leaves its folder" in response.json()["detail"]


def test_a_server_that_is_away(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "MONAI_LABEL_STUDIES", "http://127.0.0.1:9/dicom-web")
    for response in (client.get("/proxy/dicom/qido/studies"), client.post("/proxy/dicom/stow/studies", content=b"x")):
        assert response.status_code == 502
        assert "does not answer" in response.json()["detail"]


def test_a_viewer_waiting_for_600_frames_keeps_no_label_from_being_saved(
    running: Running, dicom_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A hundred answers stop half way, which is more than the framework has threads; the rest do not begin."""
    monkeypatch.setattr("lib.api.dicomweb_server.server_root", lambda: dicom_server)
    monkeypatch.setattr("starlette.formparsers.MultiPartParser.spool_max_size", 100)  # as a large label: on disk
    nib.save(nib.Nifti1Image(np.ones(SHAPE, np.uint8), AFFINE), tmp_path / "label.nii.gz")
    label, slow = (tmp_path / "label.nii.gz").read_bytes(), _DicomServer.slow

    async def load_and_save() -> tuple[httpx.Response, float, list[str]]:
        transport = httpx.ASGITransport(app=lib.server.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver", timeout=120) as viewer:
            frames = [asyncio.create_task(viewer.get(f"/proxy/dicom/wado/{n}/half")) for n in range(100)]
            await asyncio.to_thread(_until, lambda: len(slow.halves) == len(frames))
            frames += [asyncio.create_task(viewer.get(f"/proxy/dicom/wado/{n}/silent")) for n in range(500)]
            await asyncio.to_thread(_until, lambda: len(slow.silent) > 8)
            began = time.monotonic()
            saved = await asyncio.wait_for(
                viewer.put("/datastore/label", params={"image": "case_a"}, files={"label": ("label.nii.gz", label)}), 30
            )
            seconds = time.monotonic() - began
            assert not any(frame.done() for frame in frames)
            slow.go_on.set()
            return saved, seconds, [frame.text for frame in await asyncio.gather(*frames)]

    saved, seconds, frames = asyncio.run(load_and_save())
    print(f"saved in {seconds:.2f} s")
    assert saved.status_code == 200, saved.text
    assert frames == ["halflate"] * 100 + ["late"] * 500
    assert len(slow.silent) == 500


def test_requests_that_hang_leave_threads_to_others(running: Running, dicom_server: str, monkeypatch: Any) -> None:
    """Half of them before the answer begins, half amid it: a study that a server fetches from its archive."""
    monkeypatch.setattr("lib.api.dicomweb_server.server_root", lambda: dicom_server)
    slow = _DicomServer.slow

    async def load() -> str:
        transport = httpx.ASGITransport(app=lib.server.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver", timeout=120) as viewer:
            paths = [f"/proxy/dicom/wado/{n}/{kind}" for n in range(100) for kind in ("half", "silent")]
            hanging = [asyncio.create_task(viewer.get(path)) for path in paths]
            await asyncio.to_thread(_until, lambda: (len(slow.halves), len(slow.silent)) == (100, 100))
            answer = await asyncio.wait_for(viewer.get("/proxy/dicom/wado/studies/1/frames"), 30)
            assert not any(one.done() for one in hanging)
            slow.go_on.set()
            await asyncio.gather(*hanging)
            return hashlib.sha256(answer.content).hexdigest()

    assert asyncio.run(load()) == hashlib.sha256(_FRAMES).hexdigest()


@pytest.mark.parametrize("query", [b"", b"once"], ids=["kept connection", "connection for one answer"])
@pytest.mark.parametrize("busy", [False, True], ids=["threads left", "every thread hangs"])
@pytest.mark.parametrize("begun", [False, True], ids=["before its first piece", "amid its pieces"])
def test_the_request_ends_when_its_client_leaves(
    running: Running, dicom_server: str, monkeypatch: pytest.MonkeyPatch, begun: bool, busy: bool, query: bytes
) -> None:
    """Not only when the server gives up, nor when other answers come to an end."""
    monkeypatch.setattr("lib.api.dicomweb_server.server_root", lambda: dicom_server)
    if busy:
        pool = ThreadPoolExecutor(1)
        pool.submit(_DicomServer.slow.go_on.wait, 60)
        monkeypatch.setattr(proxy, "_ANSWERS", pool)
    answers, ask = [], dicomweb_server.send

    def kept(*args: Any, **kwargs: Any) -> Any:
        answers.append(ask(*args, **kwargs))  # else collecting garbage would close it
        return answers[-1]

    monkeypatch.setattr(dicomweb_server, "send", kept)

    async def leave() -> None:
        gone, path = asyncio.Event(), "/proxy/dicom/wado/studies/left"
        asgi = {"version": "3.0", "spec_version": "2.3" if begun else "2.4"}
        scope = {"type": "http", "asgi": asgi, "method": "GET", "path": path, "query_string": query, "headers": []}
        asked = False

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if not asked:
                asked = True
                return {"type": "http.request", "body": b"", "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if not begun:
                raise OSError("the client is gone")
            asyncio.get_running_loop().call_later(0.2, gone.set)

        with suppress(ClientDisconnect, OSError):
            await lib.server.app({**scope, "http_version": "1.1", "scheme": "http"}, receive, send)

    asyncio.run(leave())
    assert len(answers) == 1
    assert _DicomServer.slow.left.wait(20)


def test_a_folder_has_no_proxy(running: Running) -> None:
    response = running.client.get("/proxy/dicom/qido/studies")
    assert response.status_code == 404
    assert "folder" in response.json()["detail"]


def test_the_watch_tells_what_it_knows_and_never_waits(dicom_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch()
    assert watch.known(dicom_server).reachable is None
    _until(lambda: watch.known(dicom_server).reachable is not None)
    assert watch.known(dicom_server).reachable is True
    away = Watch()
    away.known("http://127.0.0.1:9/dicom-web")
    _until(lambda: away.known("http://127.0.0.1:9/dicom-web").reachable is not None)
    known = away.known("http://127.0.0.1:9/dicom-web")
    assert (known.reachable, known.reason) == (False, "it cannot be reached (ConnectionError)")


def _until(true: Callable[[], bool]) -> None:
    waited = threading.Event()
    for _ in range(2000):
        if true():
            return
        waited.wait(0.01)
    pytest.fail("it never came true")
