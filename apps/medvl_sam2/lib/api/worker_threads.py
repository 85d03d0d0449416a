"""Handlers in worker threads, so that the event loop stays free and nobody waits for somebody else's slow request.

MONAI Label declares its handlers ``async`` and blocks inside: a download from a DICOM server, a ZIP of the studies or a
conversion would keep every other request waiting. :func:`in_worker_threads` copies a router with each handler moved to
a thread; path, parameters, access, responses and documentation stay.

Concurrency: five pools, so that slow work of one kind takes no thread from the others. Inference requests wait in
their thread for their turn (:mod:`lib.turns`); what only reads memory (``QUICK``) never waits behind a download;
neither a viewer that loads hundreds of frames from a slow DICOM server nor requests that list or fetch what it holds
(``FETCHING``) keep a label from being saved. Requests beyond a pool's size queue without a thread. Threads that infer
have a lower priority on the processor (:mod:`lib.priority`).
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

from fastapi import APIRouter, Response
from fastapi.encoders import jsonable_encoder
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from lib.api.plain_names import NAMES, check_plain_names, check_plain_path
from lib.priority import INFERENCE, give_way

_INFERENCE = ThreadPoolExecutor(64, "inference", give_way, (INFERENCE,))
_QUICK = ThreadPoolExecutor(8, "quick")
DICOM_THREADS = 512
"""More than viewers ask at a time; a thread that waits costs little memory and no processor."""
DICOM = ThreadPoolExecutor(DICOM_THREADS, "dicom-proxy")
"""Asks the DICOM server; :mod:`lib.api.proxy` has another pool to pass its answers on."""
_FETCHING = ThreadPoolExecutor(16, "fetching")
_WORK = ThreadPoolExecutor(32, "work")
_POOLS = (
    (("/infer/", "/medvl/texts/ask", "/medvl/texts/report", "/medvl/texts/mask"), _INFERENCE),
    (("/info/", "/medvl/health", "/medvl/jobs", "/auth"), _QUICK),
    (("/proxy/dicom/",), DICOM),
)
_FETCHED = frozenset(
    f"{path}{end}"
    for path in ("/datastore", "/datastore/image", "/datastore/label", "/datastore/dataset", "/medvl/cases")
    for end in ("", "/")
)
"""Reading these, and asking for the next sample, may wait for a DICOM server to list or send what it holds."""


def in_worker_threads(router: APIRouter, blocking_async: bool = False) -> APIRouter:
    """A copy of ``router`` whose plain handlers run in a worker thread, with the names they get checked before.

    ``blocking_async``: treat ``async`` handlers likewise. Only for those that block and await nothing of the server's
    event loop: the thread has one of its own.
    """
    moved = APIRouter()
    for route in router.routes:
        if isinstance(route, APIRoute) and (blocking_async or not inspect.iscoroutinefunction(route.endpoint)):
            route = copy.copy(route)
            route.endpoint = _threaded(route)
        moved.routes.append(route)
    return moved


def _threaded(route: APIRoute) -> Callable[..., Any]:
    endpoint, modelled = route.endpoint, route.response_model is not None
    pool = _pool(route)
    # An inference may name an image by its path; lib.sessions.may_be_image judges those.
    names = NAMES - {"image"} if route.path.startswith("/infer/") else NAMES

    def call(values: dict[str, Any]) -> Any:
        result = endpoint(**values)
        if inspect.iscoroutine(result):
            result = asyncio.run(_awaited(result))
        if modelled or isinstance(result, Response):
            return result
        # Thousands of images make a large answer: it is written here, not on the event loop.
        return JSONResponse(jsonable_encoder(result))

    @functools.wraps(endpoint)
    async def run(**values: Any) -> Any:
        check_plain_names(values, names)
        if isinstance(values.get("path"), str):
            check_plain_path(values["path"])
        return await asyncio.get_running_loop().run_in_executor(pool, copy_context().run, call, values)

    return run


def _pool(route: APIRoute) -> ThreadPoolExecutor:
    reads = route.methods is not None and route.methods <= {"GET", "HEAD"}
    if (reads and route.path in _FETCHED) or route.path.startswith("/activelearning/"):
        return _FETCHING
    return next((pool for prefixes, pool in _POOLS if route.path.startswith(prefixes)), _WORK)


async def _awaited(coroutine: Any) -> Any:
    return await coroutine
