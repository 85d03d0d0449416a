"""``GET /medvl/health``: whether this server can do its work, for a load balancer or an administrator."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Response
from monailabel.interfaces.utils.app import app_instance
from pydantic import BaseModel

from lib.api import dicomweb_server
from lib.api.access import AsUser
from medvl_sam2.checkpoint import shipped_checkpoint
from medvl_sam2.errors import CheckpointError
from medvl_sam2.publishing import read_published

router = APIRouter(prefix="/medvl/health", tags=["MedVL"])

LEAST_FREE_MB = 500
"""A volume, its mask and a training state need about this."""
_STARTED = time.monotonic()
_DICOMWEB = dicomweb_server.Watch()


class Health(BaseModel):
    """What is well and what is not."""

    status: Literal["ok", "unwell"]
    reasons: list[str]
    """Why it is unwell, with the remedy."""
    uptime_s: float
    model_version: str
    """Of the weights in memory, or of those the next request loads."""
    device: str | None
    """Where the model computes; None before the first request."""
    precision: str | None
    """Number format it computes slices in, ``bfloat16`` or ``float32``; None before the first request."""
    sessions: int
    waiting: int
    """Requests that wait for the model."""
    store_writable: bool
    disk_free_mb: int
    """The least among the disks of the weights, the images and temporary files."""
    dicomweb_reachable: bool | None
    """As it was at most half a minute before somebody asked; None for a folder, and before the first look."""


@router.get("", summary="Whether the server can work; 503 with reasons when not", responses={503: {"model": Health}})
def health(response: Response, user: AsUser) -> Health:
    """Cheap: nothing is loaded and nobody else is asked meanwhile."""
    app = app_instance()
    images = Path(getattr(app.datastore(), "folder", app.config.store))
    folders = (app.config.store, images, Path(tempfile.gettempdir()))
    writable = _writable(app.config.store)
    free_mb = min(_free_mb(folder) for folder in folders)
    root = dicomweb_server.server_root()
    dicomweb = _DICOMWEB.known(root) if root else dicomweb_server.Reachability()
    loaded = app.runtime.loaded()
    reasons = _weights_reasons(app)
    if not writable:
        reasons.append(f"{app.config.store} cannot be written to: no training can be published; mend its permissions")
    if free_mb < LEAST_FREE_MB:
        reasons.append(f"only {free_mb} MB of disk are free; at least {LEAST_FREE_MB} MB are needed: make room")
    if dicomweb.reachable is False:
        reasons.append(f"the DICOMweb server {root}: {dicomweb.reason}")
    response.status_code = 503 if reasons else 200
    waiting = sum(not request.running for request in app.runtime.waiting())
    return Health(
        status="unwell" if reasons else "ok",
        reasons=reasons,
        uptime_s=round(time.monotonic() - _STARTED, 1),
        model_version=loaded.version or app.runtime.served_version(),
        device=loaded.device,
        precision=loaded.precision,
        sessions=app.runtime.session_count(),
        waiting=waiting,
        store_writable=writable,
        disk_free_mb=free_mb,
        dicomweb_reachable=dicomweb.reachable,
    )


def _weights_reasons(app: Any) -> list[str]:
    """Whether the next request finds weights."""
    try:
        if read_published(app.config.store) is None:
            shipped_checkpoint()
    except CheckpointError as error:
        return [f"weights: {error}"]
    loaded = app.runtime.loaded()
    if loaded.refused:
        return [f"version {loaded.refused} cannot be loaded, {loaded.version} is served; see the server's log"]
    return []


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            return True
    except OSError:
        return False


def _free_mb(folder: Path) -> int:
    return shutil.disk_usage(_existing(folder)).free // 1_000_000


def _existing(folder: Path) -> Path:
    """The folder, or the one it will be made in."""
    return next(path for path in (folder, *folder.parents) if path.exists())
