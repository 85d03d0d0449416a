"""The HTTP application: MONAI Label's routes and our own, off the event loop, with errors that state a reason.

Started with ``start_server --uvicorn_app lib.server:app`` (``scripts/serve.py`` does). Every route of MONAI Label
stays, with its parameters, access, responses and documentation; its blocking handlers run in worker threads
(:mod:`lib.api.worker_threads`). Without this front the app works too, one request at a time.
"""

from __future__ import annotations

import tarfile

import monailabel.app as monailabel_front
from fastapi import FastAPI
from fastapi.routing import APIRoute
from monailabel.config import settings
from monailabel.endpoints import (
    activelearning,
    batch_infer,
    datastore,
    infer,
    info,
    login,
    logs,
    model,
    ohif,
    scoring,
    session,
    train,
    wsi_infer,
)
from starlette.middleware import Middleware
from starlette.routing import Mount

from lib.api import stand_ins
from lib.api.body_limit import BodyLimit
from lib.api.errors import add_error_handlers
from lib.api.routers import ROUTERS
from lib.api.worker_threads import in_worker_threads

_THEIRS = (
    *(info, model, infer, wsi_infer, batch_infer, train, activelearning, scoring, datastore, logs, ohif, session),
    *((login,) if settings.MONAI_LABEL_AUTH_ENABLE else ()),
)
"""MONAI Label's, in its order, but for the DICOMweb proxy: :mod:`lib.api.proxy` stands in for it."""


def build_app() -> FastAPI:
    """Our own routers first, so that one may stand in for a route of MONAI Label; then all of those."""
    # Upload sessions unpack archives; a member must not leave the folder it is unpacked to.
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    theirs = monailabel_front.app
    app = FastAPI(
        title=theirs.title,
        docs_url=None,
        redoc_url=theirs.redoc_url,
        openapi_url=theirs.openapi_url,
        lifespan=monailabel_front.lifespan,
        middleware=[*theirs.user_middleware, Middleware(BodyLimit)],
    )
    prefix = settings.MONAI_LABEL_API_STR
    for router in (*ROUTERS, stand_ins.router):
        app.include_router(in_worker_threads(router), prefix=prefix)
    app.include_router(in_worker_threads(stand_ins.root_router))
    for module in _THEIRS:
        app.include_router(in_worker_threads(module.router, blocking_async=True), prefix=prefix)
    # What belongs to no router: the start page, its icon and /static.
    app.router.routes.extend(route for route in theirs.routes if isinstance(route, APIRoute | Mount))
    add_error_handlers(app)
    return app


app = build_app()
