"""Names that are no names and bodies that are too large are refused with a reason, wherever they come."""

from __future__ import annotations

import asyncio
import io
import tarfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import lib.server
from app.conftest import Running

_BAD = ("../../x", "..", "a/b", "a\\b", "a\nb", "x" * 300)


@pytest.mark.parametrize("name", _BAD)
@pytest.mark.parametrize(
    ("method", "url", "parameter", "more"),
    [
        ("GET", "/datastore/image", "image", {}),
        ("HEAD", "/datastore/image", "image", {}),
        ("PUT", "/datastore/image", "image", {"files": {"file": ("x.nii.gz", b"voxels")}}),
        ("DELETE", "/datastore/image", "id", {}),
        ("GET", "/datastore/image/info", "image", {}),
        ("PUT", "/datastore/image/info", "image", {}),
        ("GET", "/datastore/label", "label", {"params": {"tag": "final"}}),
        ("GET", "/datastore/label", "tag", {"params": {"label": "case_a"}}),
        ("PUT", "/datastore/label", "tag", {"params": {"image": "case_a"}, "files": {"label": ("x.nii.gz", b"v")}}),
        ("PUT", "/datastore/label", "image", {"files": {"label": ("x.nii.gz", b"v")}}),
        ("DELETE", "/datastore/label", "tag", {"params": {"id": "case_a"}}),
        ("GET", "/datastore/label/info", "tag", {"params": {"label": "case_a"}}),
        ("PUT", "/datastore/label/info", "label", {"params": {"tag": "final"}}),
        ("POST", "/infer/medvl_semantic", "session_id", {}),
    ],
)
def test_parameters_are_plain_names(
    running: Running, method: str, url: str, parameter: str, more: dict[str, Any], name: str
) -> None:
    before = sorted(running.studies.parent.rglob("*"))
    request = {**more, "params": {**more.get("params", {}), parameter: name}}
    response = running.client.request(method, url, **request)
    assert response.status_code == 400
    if method != "HEAD":
        assert f"{parameter} '" in response.json()["detail"]
        assert len(response.json()["detail"]) < 300
    after = sorted(running.studies.parent.rglob("*"))
    assert [path for path in after if path.name not in (".lock", ".medvl.lock")] == [
        path for path in before if path.name not in (".lock", ".medvl.lock")
    ]


@pytest.mark.parametrize("name", ["%2e%2e", "..%5cx", "a%0ab", "x" * 300])
@pytest.mark.parametrize(
    ("method", "url"),
    [
        ("GET", "/session/{}"),
        ("DELETE", "/session/{}"),
        ("GET", "/model/{}"),
        ("GET", "/model/info/{}"),
        ("DELETE", "/model/{}"),
        ("POST", "/infer/{}?image=case_a"),
        ("POST", "/train/{}"),
        ("POST", "/scoring/{}"),
        ("POST", "/activelearning/{}"),
        ("POST", "/batch/infer/{}"),
        ("POST", "/infer/wsi_v2/{}"),
    ],
)
def test_names_in_paths_are_plain(running: Running, method: str, url: str, name: str) -> None:
    assert running.client.request(method, url.format(name)).status_code == 400


def test_names_of_real_files_are_plain(running: Running) -> None:
    """Clinics name files as they like; only what leads elsewhere is refused."""
    for name in ("Fälle (1)+ä 2..3", "1.2.840.113619.2.1", "_x"):
        response = running.client.get("/datastore/image", params={"image": name})
        assert response.status_code == 404, name


@pytest.mark.parametrize(
    ("url", "more", "status", "reason"),
    [
        ("/infer/nonsense?image=case_a", {}, 404, "medvl_semantic"),
        ("/infer/medvl_semantic?session_id=nobody", {}, 404, "session 'nobody'"),
        ("/infer/medvl_semantic?image=nobody", {}, 404, "nobody"),
        ("/train/nonsense", {"json": {}}, 404, "medvl_sam2"),
        ("/scoring/nonsense", {"json": {}}, 404, "dice"),
        ("/activelearning/nonsense", {"json": {}}, 404, "uncertainty"),
        ("/batch/infer/nonsense", {"json": {}}, 404, "medvl_semantic"),
    ],
)
def test_what_does_not_exist(running: Running, url: str, more: dict[str, Any], status: int, reason: str) -> None:
    response = running.client.post(url, **more)
    assert response.status_code == status
    assert reason in response.json()["detail"]


def test_no_dataset_and_no_gpu_are_no_errors_of_the_server(
    running: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    response = running.client.get("/datastore/dataset")
    assert response.status_code == 404
    assert "no submitted label" in response.json()["detail"]
    monkeypatch.setenv("PATH", str(tmp_path))
    response = running.client.get("/logs/gpu")
    assert response.status_code == 404
    assert "nvidia-smi" in response.json()["detail"]


def _archive(member: str) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        header = tarfile.TarInfo(member)
        header.size = 3
        archive.addfile(header, io.BytesIO(b"abc"))
    return packed.getvalue()


@pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")  # MONAI Label takes a folder's name only
def test_archives_stay_in_their_folder(running: Running) -> None:
    bad = {"files": {"files": ("x.tar.gz", _archive("../../outside.txt"))}, "params": {"uncompress": True}}
    assert running.client.put("/session/", **bad).status_code >= 400
    good = {"files": {"files": ("x.tar.gz", _archive("inside.txt"))}, "params": {"uncompress": True}}
    assert running.client.put("/session/", **good).status_code == 200
    junk = running.client.put("/session/", files={"files": ("x.tar.gz", b"junk")}, params={"uncompress": True})
    assert junk.status_code == 400
    assert "archive" in junk.json()["detail"]


def test_an_announced_body_is_refused_unread(start: Callable[..., Running]) -> None:
    running = start(max_upload_megabytes="1")
    sent = 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(4):
            sent += 1_000_000
            yield b"0" * 1_000_000

    headers = {"Content-Length": "4000000", "Content-Type": "multipart/form-data; boundary=x"}
    response = _ask("PUT", "/datastore/image", headers, body)
    assert response.status_code == 413
    assert "1 MB (--conf max_upload_megabytes)" in response.json()["detail"]
    assert sent == 0
    small = running.client.put("/datastore/image", files={"file": ("new.nii.gz", b"0" * 900_000)})
    assert small.status_code == 200


@pytest.mark.parametrize(
    ("content_type", "limit"),
    [("multipart/form-data; boundary=x", "1 MB"), ("application/json", "1000000"), ("text/plain", "1 MB")],
)
def test_a_streamed_body_is_refused_where_it_grows_too_large(
    start: Callable[..., Running], content_type: str, limit: str
) -> None:
    start(max_upload_megabytes="1")
    sent = 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="x.nii.gz"\r\n\r\n'
        for _ in range(40):
            sent += 100_000
            yield b"0" * 100_000

    url = "/activelearning/random" if "json" in content_type else "/datastore/image"
    response = _ask("POST" if "json" in content_type else "PUT", url, {"Content-Type": content_type}, body)
    if content_type == "text/plain":  # no route reads that, so nothing of it is taken in
        assert response.status_code == 422
        assert sent <= 1_100_000
        return
    assert response.status_code == 413
    assert limit in response.json()["detail"]
    assert sent <= 1_100_000


def test_params_have_their_own_limit(running: Running) -> None:
    long = '{"question": "' + "x" * 2_000_000 + '"}'
    query = {"image": "case_a"}
    form = running.client.post("/infer/medvl_vqa", params=query, data={"params": long})
    assert form.status_code == 413
    assert "1000000" in form.json()["detail"]
    part = running.client.post("/infer/medvl_vqa", params=query, files={"params": (None, long)})
    assert part.status_code == 400
    assert "maximum size" in part.json()["detail"]


def test_bad_limits_are_named(start: Callable[..., Running]) -> None:
    from medvl_sam2.errors import ConfigError

    with pytest.raises(ConfigError, match="max_upload_megabytes '0'"):
        start(max_upload_megabytes="0")


def _ask(method: str, url: str, headers: dict[str, str], body: Callable[[], Iterator[bytes]]) -> httpx.Response:
    """One request whose body is made while it is read, as a server reads it from the network."""

    async def chunks() -> AsyncIterator[bytes]:
        for chunk in body():
            yield chunk

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app=lib.server.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
            return await client.request(method, url, headers=headers, content=chunks())

    return asyncio.run(run())
