"""Routes in place of MONAI Label's of the same path, where its own fail without a reason, leave files or repeat work.

They are not in the schema: MONAI Label's own description of each path stays there.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, File, Form, HTTPException, Response, UploadFile
from fastapi.responses import FileResponse
from monailabel.endpoints import datastore as datastore_endpoint
from monailabel.endpoints import infer as infer_endpoint
from monailabel.endpoints import scoring as scoring_endpoint
from monailabel.endpoints.infer import ResultType
from monailabel.interfaces.utils.app import app_instance, clear_cache
from monailabel.utils.async_tasks.task import AsyncTask
from monailabel.utils.others.generic import remove_file

from lib.api.access import AsAdmin, AsAnnotator, AsUser
from lib.configs.medvl_sam2 import TRAINER

router = APIRouter(include_in_schema=False)
root_router = APIRouter(include_in_schema=False)
"""Of routes that MONAI Label has outside the prefix of its API."""


@router.post("/infer/{model}", response_model=None)
def run_infer(
    background_tasks: BackgroundTasks,
    model: str,
    user: AsUser,
    image: str = "",
    session_id: str = "",
    params: Annotated[str, Form()] = "{}",
    file: Annotated[UploadFile | None, File()] = None,
    label: Annotated[UploadFile | None, File()] = None,
    output: ResultType | None = None,
) -> Any:
    """The task learns which output is asked for; an upload session that is over is no image of another name."""
    if not file and not image and not session_id:
        raise HTTPException(400, "no image: give image, session_id or file")
    if session_id and not file:
        _require_session(session_id)
    values = json_object(params, "params")
    values["output"] = output.value if output else None
    text = json.dumps(values)
    return infer_endpoint.run_inference(background_tasks, model, image, session_id, text, file, label, output)


@router.post("/scoring/{method}", response_model=None)
def run_scoring(method: str, user: AsAnnotator, params: dict[str, Any] | None = None, run_sync: bool = False) -> Any:
    """Refused at once for a method that does not exist."""
    known = list(app_instance().info()["scoring"])
    if method not in known:
        raise HTTPException(404, f"scoring method {method!r} does not exist; choose from {', '.join(known)}")
    return scoring_endpoint.run_method(method, params, run_sync)


@router.post("/train/", response_model=None)
def run_training(user: AsAdmin, params: dict[str, Any] | None = None, run_sync: bool = False) -> Any:
    """Our trainer once, whatever other names it has; a request that says its ``model`` means that one."""
    asked = params or {}
    model = str(asked.get("model") or TRAINER)
    own = asked.get(model)
    values = {"model": model, **asked, **(own if isinstance(own, dict) else {})}
    result, detail = AsyncTask.run("train", params=values, force_sync=run_sync, enqueue=True)
    return {model: {"result": result, "detail": detail}}


@router.get("/datastore/dataset", response_model=None)
def download_dataset(
    background_tasks: BackgroundTasks, user: AsAnnotator, limit_cases: int | None = None
) -> FileResponse:
    """The archive is deleted once it is sent, and no label at all is not an error of the server."""
    if not app_instance().datastore().get_labeled_images():
        raise HTTPException(404, "there is no submitted label yet, so there is no dataset to download")
    archive: FileResponse = datastore_endpoint.download_dataset(limit_cases)
    background_tasks.add_task(remove_file, archive.path)
    return archive


@router.get("/logs/gpu", response_model=None)
def gpu_state(user: AsAdmin) -> Response:
    """404 on a machine without an NVIDIA driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        raise HTTPException(404, "nvidia-smi is not installed: this machine has no NVIDIA driver")
    listing = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    return Response(listing.stdout, media_type="text/plain")


@root_router.post("/reload", response_model=None)
def reload(user: AsAdmin) -> dict[str, Any]:
    """Build the app anew at the next request. MONAI Label lets everybody, also where a login is needed."""
    clear_cache()
    return {}


def json_object(text: str, name: str) -> dict[str, Any]:
    """A form field that holds a JSON object; 400 for anything else."""
    try:
        values = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise HTTPException(400, f"{name} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise HTTPException(400, f"{name} must be a JSON object, got {type(values).__name__}")
    return values


def _require_session(session_id: str) -> None:
    sessions = app_instance().sessions()
    if sessions is not None and sessions.get_session(session_id, update_ts=False) is None:
        raise HTTPException(404, f"session {session_id!r} does not exist or is over; send the image again")
