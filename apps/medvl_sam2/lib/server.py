"""MONAI Label's HTTP application with errors that state a reason and an event loop that stays free.

Started with ``start_server --uvicorn_app lib.server:app`` (``scripts/serve.py`` does). Every route of MONAI Label
stays as it is, except that inference runs in a worker thread: MONAI Label runs it on the event loop, where it keeps
``/info/`` and everybody else waiting. Without this front the app works too, with barer messages for malformed JSON.
"""

from __future__ import annotations

import json
import logging
from typing import Annotated, Any

from fastapi import BackgroundTasks, Depends, FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi.responses import JSONResponse
from monailabel.app import app as monailabel_app
from monailabel.config import settings
from monailabel.endpoints import infer as infer_endpoint
from monailabel.endpoints import scoring as scoring_endpoint
from monailabel.endpoints.infer import ResultType
from monailabel.endpoints.user.auth import RBAC, User
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException, MONAILabelException
from monailabel.interfaces.utils.app import app_instance

from lib.api.routers import ROUTERS
from lib.result_writing import http_error
from medvl_sam2.errors import MedVLError

logger = logging.getLogger(__name__)

_User = Annotated[User, Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))]
_Annotator = Annotated[User, Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR))]


def run_infer(
    background_tasks: BackgroundTasks,
    model: str,
    user: _User,
    image: str = "",
    session_id: str = "",
    params: Annotated[str, Form()] = "{}",
    file: Annotated[UploadFile | None, File()] = None,
    label: Annotated[UploadFile | None, File()] = None,
    output: ResultType | None = None,
) -> Any:
    """MONAI Label's inference, in a worker thread; the task learns which output is asked for."""
    if not file and not image and not session_id:
        raise HTTPException(400, "no image: give image, session_id or file")
    values = _json_object(params, "params")
    values["output"] = output.value if output else None
    text = json.dumps(values)
    return infer_endpoint.run_inference(background_tasks, model, image, session_id, text, file, label, output)


def run_scoring(method: str, user: _Annotator, params: dict[str, Any] | None = None, run_sync: bool = False) -> Any:
    """MONAI Label's scoring, refused at once for a method that does not exist."""
    known = list(app_instance().info()["scoring"])
    if method not in known:
        raise HTTPException(404, f"scoring method {method!r} does not exist; choose from {', '.join(known)}")
    return scoring_endpoint.run_method(method, params, run_sync)


def build_app() -> FastAPI:
    """Put the front's routes before MONAI Label's own and add its error handlers."""
    app = monailabel_app
    prefix = settings.MONAI_LABEL_API_STR
    theirs = list(app.router.routes)
    for router in ROUTERS:
        app.include_router(router, prefix=prefix)
    ours = app.router.routes[len(theirs) :]
    app.router.routes[:] = [*ours, *theirs]
    for path, endpoint in ((f"{prefix}/infer/{{model}}", run_infer), (f"{prefix}/scoring/{{method}}", run_scoring)):
        app.add_api_route(path, endpoint, methods=["POST"], response_model=None)
        app.router.routes.insert(0, app.router.routes.pop())
    app.add_exception_handler(MONAILabelException, _monailabel_error)
    app.add_exception_handler(MedVLError, _medvl_error)
    app.add_exception_handler(json.JSONDecodeError, _json_error)
    app.add_exception_handler(Exception, _any_error)
    return app


def _json_object(text: str, name: str) -> dict[str, Any]:
    try:
        values = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise HTTPException(400, f"{name} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise HTTPException(400, f"{name} must be a JSON object, got {type(values).__name__}")
    return values


def _monailabel_error(request: Request, error: Exception) -> JSONResponse:
    missing = isinstance(error, (ImageNotFoundException, LabelNotFoundException))
    return JSONResponse({"detail": str(getattr(error, "msg", error))}, status_code=404 if missing else 400)


def _medvl_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, MedVLError)
    answer = http_error(error)
    return JSONResponse({"detail": answer.detail}, status_code=answer.status_code)


def _json_error(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": f"a form field is not JSON: {error}"}, status_code=400)


def _any_error(request: Request, error: Exception) -> JSONResponse:
    reason = f"{request.method} {request.url.path} failed: {type(error).__name__}: {error}; see the server's log"
    return JSONResponse({"detail": reason}, status_code=500)


app = build_app()
