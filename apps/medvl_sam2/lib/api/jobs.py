"""``GET /medvl/jobs``: who waits for what, how far trainings are, and which weights answer."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.async_tasks.utils import tasks
from pydantic import BaseModel

from lib.api.access import AsUser
from medvl_sam2.publishing import SHIPPED_VERSION, publication_history

router = APIRouter(prefix="/medvl/jobs", tags=["MedVL"])

TRAIN_STATS = "train_stats.json"
_LINES = 5


class Inference(BaseModel):
    """A request to the model."""

    what: str
    """The model asked."""
    image: str
    client: str
    seconds: float
    """Since it came."""
    position: int
    """0 has its turn, 1 is next in order of arrival; a short correction may go before long ones."""


class Progress(BaseModel):
    """How far a training is."""

    stage: str
    """``measure``, ``train`` or ``done``."""
    epoch: int
    total_epochs: int
    fraction: float
    """Of the epochs begun, 0..1."""
    loss: float | None
    best_metric: float | None
    """Best score so far on held-out cases, 0..1, of what is or would be served."""
    seconds: float | None
    message: str


class Task(BaseModel):
    """A process that MONAI Label started; it remembers them until the server stops."""

    id: str
    status: Literal["SUBMITTED", "RUNNING", "DONE", "ERROR", "STOPPED"]
    started: datetime
    ended: datetime | None
    lines: list[str]
    """The last it logged."""
    progress: Progress | None = None


class Schedule(BaseModel):
    """When a training starts by itself."""

    every_labels: int | None
    labels_since_training: int
    cron: str | None
    next_cron: datetime | None
    due: bool
    """It starts as soon as none is running."""
    last_training: datetime | None


class Publication(BaseModel):
    """Weights that were served."""

    version: str
    published: datetime | None
    """None for the weights shipped with the package, and where the version was deleted since."""


class Weights(BaseModel):
    """Which weights answer."""

    served: str
    loaded: str | None
    """In memory; None before the first request. A new version is loaded by the next request."""
    refused: str | None
    """A published version that cannot be loaded, so that ``loaded`` answers in its place."""
    history: list[Publication]
    """Oldest first, the served one last."""


class Jobs(BaseModel):
    """Everything slow."""

    inference: list[Inference]
    """The one that has its turn first, then those that wait."""
    training: Task | None
    scoring: Task | None
    batch_inference: Task | None
    schedule: Schedule
    model: Weights


@router.get("", summary="Requests in the queue, trainings, the schedule and the served weights")
def jobs(user: AsUser) -> Jobs:
    """From memory and two small files; never waits for a request or a training."""
    app = app_instance()
    store: Path = app.config.store
    loaded = app.runtime.loaded()
    training = _last_task("train")
    if training is not None:
        training.progress = _progress(store / TRAIN_STATS, app.info()["train_stats"], training)
    return Jobs(
        inference=_queue(app.runtime.waiting()),
        training=training,
        scoring=_last_task("scoring"),
        batch_inference=_last_task("batch_infer"),
        schedule=_schedule(app.schedule),
        model=Weights(
            served=app.runtime.served_version(),
            loaded=loaded.version,
            refused=loaded.refused,
            history=[_publication(store, number) for number in publication_history(store)],
        ),
    )


def _queue(requests: tuple[Any, ...]) -> list[Inference]:
    """The runtime's list as it stands: the one with its turn first. Without one, the first to wait is the next."""
    shift = 0 if requests and requests[0].running else 1
    return [
        Inference(what=one.what, image=one.image, client=one.client, seconds=round(one.seconds, 2), position=place)
        for place, one in enumerate(requests, start=shift)
    ]


def _last_task(method: str) -> Task | None:
    known = tasks(method)
    if not known:
        return None
    last = known[-1]
    ended = last.get("end_ts")
    return Task(
        id=last["id"],
        status=last["status"],
        started=_local_time(last["start_ts"]),
        ended=_local_time(ended) if ended else None,
        lines=list(last.get("details", ()))[-_LINES:],
    )


def _local_time(text: str) -> datetime:
    return datetime.strptime(text, "%Y-%m-%d %H:%M:%S").astimezone()


def _progress(file: Path, stats_by_trainer: dict[str, dict[str, Any]], task: Task) -> Progress | None:
    """What the training wrote; None while the file is still that of an earlier one."""
    stats = next((stats for stats in stats_by_trainer.values() if stats), None)
    if stats is None or not file.is_file() or file.stat().st_mtime < task.started.timestamp():
        return None
    epoch, total = int(stats.get("epoch", 0)), int(stats.get("total_epochs", 0))
    return Progress(
        stage=str(stats.get("stage", "")),
        epoch=epoch,
        total_epochs=total,
        fraction=min(epoch / total, 1.0) if total else 0.0,
        loss=stats.get("loss"),
        best_metric=stats.get("best_metric"),
        seconds=stats.get("seconds"),
        message=str(stats.get("message", "")),
    )


def _schedule(schedule: Any) -> Schedule:
    state = schedule.state()
    return Schedule(
        every_labels=schedule.config.every_labels,
        labels_since_training=state.labels,
        cron=schedule.config.cron,
        next_cron=schedule.next_cron(),
        due=state.pending,
        last_training=datetime.fromisoformat(state.last_start) if state.last_start else None,
    )


def _publication(store: Path, number: int) -> Publication:
    if number == SHIPPED_VERSION:
        return Publication(version="shipped", published=None)
    folder = store / "versions" / str(number)
    published = datetime.fromtimestamp(folder.stat().st_mtime, UTC) if folder.is_dir() else None
    return Publication(version=str(number), published=published)
