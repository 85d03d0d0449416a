"""Every error as JSON with its reason under ``detail``: Slicer shows it to the annotator."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException, MONAILabelException
from pydantic import ValidationError

from lib.result_writing import http_error, reason_of
from medvl_sam2.errors import MedVLError


def add_error_handlers(app: FastAPI) -> None:
    """Give every error of a handler a status that fits and a reason."""
    for kind, handler in (
        (MONAILabelException, _monailabel_error),
        (MedVLError, _medvl_error),
        (json.JSONDecodeError, _json_error),
        (RequestValidationError, _invalid_request),
        (ValidationError, _invalid_request),
        (shutil.ReadError, _archive_error),
        (Exception, _any_error),
    ):
        app.add_exception_handler(kind, handler)


def _monailabel_error(request: Request, error: Exception) -> JSONResponse:
    missing = isinstance(error, (ImageNotFoundException, LabelNotFoundException))
    return JSONResponse({"detail": str(getattr(error, "msg", error))}, status_code=404 if missing else 400)


def _medvl_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, MedVLError)
    answer = http_error(error)
    return JSONResponse({"detail": answer.detail}, status_code=answer.status_code)


def _json_error(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": f"a form field is not JSON: {error}"}, status_code=400)


def _archive_error(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": f"the upload is no archive that can be unpacked: {error}"}, status_code=400)


def _invalid_request(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's list under ``detail`` as programs know it, and the same in a sentence under ``reason``."""
    assert isinstance(error, (RequestValidationError, ValidationError))
    problems = jsonable_encoder(error.errors())
    return JSONResponse({"detail": problems, "reason": _sentence(problems)}, status_code=422)


def _sentence(problems: Sequence[dict[str, Any]]) -> str:
    return "; ".join(f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}" for one in problems)


def _any_error(request: Request, error: Exception) -> JSONResponse:
    reason = f"{request.method} {request.url.path} failed: {reason_of(error)}; see the server's log"
    return JSONResponse({"detail": reason}, status_code=500)
