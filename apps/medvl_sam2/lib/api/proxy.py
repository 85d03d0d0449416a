"""The DICOMweb proxy of MONAI Label, at its paths: the viewer's queries arrive whole, answers are passed as they come.

MONAI Label's own drops query strings (so a study filter finds everything), reads answers into memory and blocks
everybody meanwhile.

Concurrency: a slow DICOM server takes no thread from anything but this proxy. Questions wait in one pool of threads
(:data:`lib.api.worker_threads.DICOM`) and the pieces of answers in another, so that answers come to an end while others
still wait for theirs. Each pool has :data:`lib.api.worker_threads.DICOM_THREADS` threads, started as they are needed:
so many requests may hang, each for at most :data:`lib.api.dicomweb_server.READ_S` of silence, before the next one
waits. When a client leaves amid an answer, the DICOM server's is ended, by a thread of its own: all others may hang in
what is to be ended. Nobody else's answer comes over that connection (:mod:`lib.api.lent_connections`). The framework's
own threads, which uploads need, are not used.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import requests
from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import StreamingResponse
from starlette.datastructures import MutableHeaders
from starlette.types import Receive, Scope, Send

from lib.api import dicomweb_server
from lib.api.access import AsAnnotator, AsUser
from lib.api.lent_connections import Answer
from lib.api.plain_names import check_plain_path
from lib.api.worker_threads import DICOM, DICOM_THREADS

router = APIRouter(prefix="/proxy/dicom", include_in_schema=False)

_ASKED = ("accept", "accept-encoding", "content-type", "if-none-match", "if-modified-since", "range")
"""Headers of the client that say what it wants. Its cookies, tokens and host name are not the DICOM server's matter."""
_KEPT_BACK = frozenset(
    ("connection", "keep-alive", "proxy-authenticate", "set-cookie", "te", "trailer", "transfer-encoding", "upgrade")
)
"""Headers of one connection or of the other site."""
_REFUSALS = (400, 406, 415)
_CHUNK_BYTES = 256 * 1024
_IN_MEMORY_BYTES = 8_000_000
_ANSWERS = ThreadPoolExecutor(DICOM_THREADS, "dicom-answers")
_CLOSING = ThreadPoolExecutor(1, "dicom-closing")


@router.get("/{path:path}")  # the lowest is offered a request first
@router.get("/stow/{path:path}")
@router.get("/qido/{path:path}")
@router.get("/wado/{path:path}")
def get(request: Request, path: str, user: AsUser) -> StreamingResponse:
    """QIDO-RS and WADO-RS."""
    return _passed_on(request, path, None)


@router.post("/{path:path}")  # the lowest is offered a request first
@router.post("/stow/{path:path}")
@router.post("/qido/{path:path}")
@router.post("/wado/{path:path}")
async def post(request: Request, path: str, user: AsAnnotator) -> StreamingResponse:
    """STOW-RS, and queries whose filter is a form; the body waits on disk if it is large.

    Whatever service a path names, a server may take a POST as something to store: that is for annotators.
    """
    check_plain_path(path)
    with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES) as body:
        async for chunk in request.stream():
            await asyncio.to_thread(body.write, chunk)
        size = body.tell()
        body.seek(0)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(DICOM, _passed_on, request, path, body if size else None)


def _passed_on(request: Request, path: str, body: IO[bytes] | None) -> StreamingResponse:
    root = dicomweb_server.server_root()
    if root is None:
        raise HTTPException(404, "the studies are a folder, so there is no DICOMweb server to ask")
    url = dicomweb_server.resource_url(root, _service(request), path)
    headers = {name: request.headers[name] for name in _ASKED if name in request.headers}
    # What is packed passes as it is, so only as the client can unpack it.
    headers.setdefault("accept-encoding", "identity")
    try:
        answer = dicomweb_server.send(request.method, url, request.url.query, headers, body)
        if request.method == "GET" and answer.status_code in _REFUSALS and headers.pop("accept", None):
            # Servers differ in what they offer; without a wish each sends what it has, which MONAI Label relies on.
            answer.close()
            answer = dicomweb_server.send(request.method, url, request.url.query, headers)
    except requests.RequestException as error:
        reason = f"the DICOMweb server does not answer ({type(error).__name__}); is it running and reachable from here?"
        raise HTTPException(502, reason) from error
    return _streamed(answer)


def _service(request: Request) -> str:
    first, slash, _ = request.url.path.partition("/proxy/dicom/")[2].partition("/")
    return first if slash and first in ("qido", "wado", "stow") else ""


def _streamed(answer: Answer) -> StreamingResponse:
    response = _PassedOn(answer)
    passed = MutableHeaders()
    for name, value in answer.headers.items():
        if name.lower() not in _KEPT_BACK and not name.lower().startswith("access-control-"):
            passed[name] = value
    response.init_headers(passed)
    return response


class _PassedOn(StreamingResponse):
    """An answer of the DICOM server, which is closed however this ends, also before its first piece was asked for."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(_chunks(answer), status_code=answer.status_code)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            _CLOSING.submit(self._answer.close)


async def _chunks(answer: Answer) -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    pieces = answer.pieces(_CHUNK_BYTES)
    while piece := await loop.run_in_executor(_ANSWERS, next, pieces, b""):
        yield piece
