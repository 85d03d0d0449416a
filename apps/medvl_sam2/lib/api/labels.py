"""Versions of labels over HTTP: list, fetch, save, restore, compare, and make one of several.

``router`` is ours. ``upload_router`` stands in for MONAI Label's ``PUT /datastore/label``, which works on the event
loop and forgets who sent the label.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, BackgroundTasks, Body, File, Form, HTTPException, Query, UploadFile
from fastapi.responses import FileResponse
from monailabel.endpoints.datastore import save_label as monailabel_save_label
from monailabel.endpoints.user.auth import User
from monailabel.interfaces.utils.app import app_instance
from pydantic import BaseModel, Field

from lib.api.access import AsAnnotator, AsUser, author_of
from lib.api.stand_ins import json_object
from lib.label_comparison import NSD_TOLERANCE_MM, Method, NamedMask, compare, consensus, pairwise, read_named
from lib.label_versions import LabelVersion, stated_names
from lib.result_writing import file_called, write_label_map
from lib.version_files import MASKS
from medvl_sam2.errors import DataError, VolumeError
from medvl_sam2.types import Geometry
from medvl_sam2.volume_io import read_mask

router = APIRouter(prefix="/medvl/labels", tags=["MedVL labels"])
upload_router = APIRouter(tags=["Datastore"])

_Image = Annotated[str, Query(description="Id of an image of the datastore")]
_Number = Annotated[int, Query(ge=1, description="Number of a version")]
_Text = Annotated[str, Field(max_length=10_000)]
_MAX_BYTE = 255
_UNKNOWN = "unknown"
"""The one voter all versions without an author are, where no version has one."""


class StructureReply(BaseModel):
    """A structure of a label, the value it has in the mask, and its voxels."""

    name: str
    value: int
    voxels: int


class VersionReply(BaseModel):
    """One version of a label. ``checksum`` is the SHA-256 of its file, ``time`` ISO with offset.

    ``dicom_seg``: its UIDs on a DICOMweb server, and ``waiting`` or ``refused`` with the reason; null without one.
    """

    version: int
    tag: str
    author: str
    time: str
    source: str
    client_id: str
    model_version: str
    note: str
    status: str
    level: str
    approved_by: str
    checksum: str
    structures: list[StructureReply]
    prompts: list[Any]
    restored_from: int | None
    made_from: list[int]
    dicom_seg: dict[str, Any] | None


class VersionsReply(BaseModel):
    """All versions, oldest first; ``final`` is the one that counts as the image's label."""

    image: str
    final: int | None
    versions: list[VersionReply]


class AgreementReply(BaseModel):
    """Agreement on one structure; ``voxels_a`` and ``voxels_b`` are its sizes."""

    name: str
    dice: float
    nsd: float
    voxels_a: int
    voxels_b: int


class ComparisonReply(BaseModel):
    """Two versions structure by structure; surface Dice at ``tolerance_mm``."""

    image: str
    a: int
    b: int
    tolerance_mm: float
    structures: list[AgreementReply]


class PairReply(BaseModel):
    """Two annotators' latest versions."""

    authors: tuple[str, str]
    versions: tuple[int, int]
    structures: list[AgreementReply]


class AgreementsReply(BaseModel):
    """The latest version of every author, and every two of them.

    A version without an author counts only where none has one: the newest of them, as ``unknown``. ``passed_over``:
    versions whose mask could not be read, for which their author's one before counts.
    """

    image: str
    tolerance_mm: float
    latest: dict[str, int]
    pairs: list[PairReply]
    passed_over: list[int]


class ConsensusReply(VersionReply):
    """The new version; ``passed_over``: those whose mask could not be read, in whose place an older one voted."""

    passed_over: list[int]


class RestoreBody(BaseModel):
    """Who restores, and why."""

    author: _Text = ""
    note: _Text = ""


class ConsensusBody(BaseModel):
    """Which ``versions``, or the latest ones of which ``authors``; without both those of all authors.

    ``unknown`` as an author means the newest version without one, as other programs leave them in the store.
    """

    versions: list[int] = Field(default=[], max_length=64)
    authors: list[_Text] = Field(default=[], max_length=64)
    method: Method = Method.MAJORITY
    author: _Text = ""
    note: _Text = ""


@router.get("", summary="Versions of an image's label")
def list_versions(image: _Image, user: AsUser) -> VersionsReply:
    versions = [_shown(record) for record in _store().versions(image)]
    return VersionsReply(image=image, versions=versions, final=_store().final_version(image))


@router.get("/file", summary="The mask of a version, on the image's grid", response_class=FileResponse)
def version_file(
    tasks: BackgroundTasks, image: _Image, version: _Number, user: AsUser, format: Literal["nrrd", "nii.gz"] = "nrrd"
) -> FileResponse:
    store = _store()
    record, path = store.version(image, version)
    name = f"{image}-{record.tag}.{format}"
    if record.extension == f".{format}":
        return FileResponse(path, media_type="application/octet-stream", filename=name)
    with file_called(_name(record), path):
        labels, _ = read_mask(path)
    if int(labels.max()) > _MAX_BYTE:
        stored = record.extension.removeprefix(".")
        raise DataError(
            f"version {version} has mask values beyond {_MAX_BYTE}; ask for format={stored}, as it is stored"
        )
    made = Path(write_label_map(labels, _grid(image), f".{format}", compress=True))
    tasks.add_task(made.unlink, missing_ok=True)
    return FileResponse(made, media_type="application/octet-stream", filename=name)


@router.post("", summary="Save a label as a new version")
def save_version(
    image: _Image,
    user: AsAnnotator,
    label: Annotated[UploadFile, File(description=".nii.gz, .nii, .nrrd, or .bin: a byte a voxel, first axis fastest")],
    params: Annotated[str, Form(description="JSON: author, note, client_id, source, label_info, prompts, ...")] = "{}",
) -> VersionReply:
    """``label_info`` is a list of ``{"name", "idx"}``; here ``idx`` is the value in the mask.

    ``made_from``: numbers of the versions it is a consensus of, which makes it nobody's own.
    """
    sent = json_object(params, "params")
    known = ("note", "client_id", "model_version", "segmentationMeta", "made_from")
    info = {key: sent[key] for key in known if key in sent}
    if isinstance(sent.get("prompts"), list):
        info["prompts"] = sent["prompts"]
    info["source"] = str(sent.get("source") or "api")
    info["label_info"] = _numbered(sent.get("label_info"))
    with tempfile.TemporaryDirectory(prefix="medvl-label-") as folder:
        suffix = next((known for known in (*MASKS, ".bin") if (label.filename or "").endswith(known)), "")
        file = Path(folder) / f"label{suffix or Path(label.filename or '').suffix}"
        with open(file, "wb") as target:
            shutil.copyfileobj(label.file, target, 1 << 20)
        return _keep(image, file, info | _author(user, sent))


@router.post("/restore", summary="Make an earlier version the label again, as a new version")
def restore(image: _Image, version: _Number, user: AsAnnotator, body: Annotated[RestoreBody, Body()]) -> VersionReply:
    record, path = _store().version(image, version)
    info = {
        **stated_names(record),
        "note": body.note,
        "source": "restore",
        "model_version": record.model_version,
        "prompts": list(record.prompts),
        "restored_from": record.version,
        "made_from": list(record.made_from),
    }
    return _keep(image, path, info | _author(user, body.model_dump()))


@router.get("/compare", summary="Two versions, structure by structure")
def compare_versions(image: _Image, a: _Number, b: _Number, user: AsUser) -> ComparisonReply:
    masks = _masks(image, [a, b])
    structures = compare(masks[a], masks[b])
    shown = [AgreementReply(**vars(structure)) for structure in structures]
    return ComparisonReply(image=image, a=a, b=b, tolerance_mm=NSD_TOLERANCE_MM, structures=shown)


@router.get("/agreement", summary="The latest versions of all annotators, pair by pair")
def agreement(image: _Image, user: AsUser) -> AgreementsReply:
    latest, masks, passed_over = _latest(image)
    authors = {number: author for author, number in latest.items()}
    pairs = [
        PairReply(
            authors=(authors[pair.a], authors[pair.b]),
            versions=(pair.a, pair.b),
            structures=[AgreementReply(**vars(structure)) for structure in pair.structures],
        )
        for pair in pairwise(masks)
    ]
    return AgreementsReply(
        image=image, tolerance_mm=NSD_TOLERANCE_MM, latest=latest, pairs=pairs, passed_over=passed_over
    )


@router.get("/consensus", summary="What a label of the latest versions would be", response_class=FileResponse)
def look_at_consensus(
    tasks: BackgroundTasks, image: _Image, user: AsUser, method: Method = Method.MAJORITY
) -> FileResponse:
    """NRRD on the image's grid, nothing is stored; header ``MedVL-Consensus`` is JSON.

    It has ``versions``, ``structures`` and ``passed_over``: versions whose mask could not be read.
    """
    numbers, passed_over, mask, names, grid = _consensus(image, ConsensusBody(method=method))
    made = Path(write_label_map(mask, grid, ".nrrd", compress=True))
    tasks.add_task(made.unlink, missing_ok=True)
    structures = [{"name": name, "value": value} for value, name in enumerate(names, start=1)]
    told = {"versions": numbers, "structures": structures, "passed_over": passed_over}
    said = json.dumps(told)  # ASCII, as headers must be
    return FileResponse(made, media_type="application/octet-stream", headers={"MedVL-Consensus": said})


@router.post("/consensus", summary="One label of several versions, as a new version")
def make_consensus(image: _Image, user: AsAnnotator, body: Annotated[ConsensusBody, Body()]) -> ConsensusReply:
    numbers, passed_over, mask, names, grid = _consensus(image, body)
    info = {
        "label_info": [{"name": name, "idx": value, "value": value} for value, name in enumerate(names, start=1)],
        "note": body.note or f"{body.method.value} of versions {', '.join(map(str, numbers))}",
        "source": f"consensus-{body.method.value}",
        "prompts": [],
        "made_from": numbers,
    }
    file = Path(write_label_map(mask, grid, ".nii.gz", compress=True))
    try:
        kept = _keep(image, file, info | _author(user, body.model_dump()))
        return ConsensusReply(**kept.model_dump(), passed_over=passed_over)
    finally:
        file.unlink(missing_ok=True)


@upload_router.put("/datastore/label", summary="Save Finished Label")
def save_label(
    tasks: BackgroundTasks,
    image: str,
    user: AsAnnotator,
    label: Annotated[UploadFile, File()],
    params: Annotated[str, Form()] = "{}",
    tag: str = "final",
) -> dict[str, Any]:
    """As MONAI Label's, which Slicer submits to; ``final`` and ``version_N`` make a new version."""
    sent = json_object(params, "params")
    text = json.dumps(sent | _author(user, sent))
    reply: dict[str, Any] = monailabel_save_label(tasks, image, text, tag, label, user.username)
    return reply


def _store() -> Any:
    """The app's datastore. Not checked by class: the app may have been loaded with another copy of ``lib``."""
    store = app_instance().datastore()
    if not hasattr(store, "versions"):
        raise HTTPException(501, "this kind of datastore keeps no versions of labels")
    return store


def _keep(image: str, file: Path, info: dict[str, Any]) -> VersionReply:
    """Save by the one path that all labels take, and tell the app."""
    store = _store()
    label_id = store.save_label(image, str(file), "final", info)
    app_instance().on_save_label(image, label_id)
    return _shown(store.version(image, info["version"])[0])


def _shown(record: LabelVersion) -> VersionReply:
    note = getattr(_store(), "dicom_note", None)
    seg = note(record.image, record.tag) if note else None
    return VersionReply.model_validate({**record.shown(), "dicom_seg": seg or None})


def _author(user: User, sent: dict[str, Any]) -> dict[str, str]:
    name = author_of(user, sent.get("author"))
    return {"author": str(name)} if name else {}


def _numbered(label_info: Any) -> list[dict[str, Any]]:
    """Names with the mask values their client states, so that no position is taken for a value later."""
    if label_info is None:
        return []
    whole = isinstance(label_info, list) and all(
        isinstance(one, dict) and isinstance(one.get("name"), str) and type(one.get("idx")) is int and one["idx"] > 0
        for one in label_info
    )
    if not whole:
        raise HTTPException(400, 'label_info must be a list of {"name": "liver", "idx": 1}, idx being the mask value')
    return [{**one, "value": one["idx"]} for one in label_info]


def _grid(image: str) -> Geometry:
    path = Path(_store().get_image_uri(image))
    with file_called(f"image {image!r}", path):
        grid: Geometry = app_instance().runtime.geometry(path)
    return grid


def _consensus(image: str, body: ConsensusBody) -> tuple[list[int], list[int], np.ndarray, list[str], Geometry]:
    """Versions it is of, and passed over; the mask, the names of its values from 1 on, and the image's grid."""
    if body.versions and body.authors:
        raise HTTPException(400, "give versions or authors, not both")
    passed_over: list[int] = []
    if body.versions:
        masks = _masks(image, body.versions)
    else:
        _, masks, passed_over = _latest(image, body.authors)
    mask, names = consensus(list(masks.values()), body.method)
    grid = _grid(image)
    if mask.shape != grid.shape:
        raise DataError(f"the versions have shape {mask.shape}, the image {grid.shape}: it was replaced after them")
    return list(masks), passed_over, mask, names, grid


def _masks(image: str, numbers: Sequence[int]) -> dict[int, NamedMask]:
    found = {number: _store().version(image, number) for number in dict.fromkeys(numbers)}
    return {number: _read(record, path) for number, (record, path) in found.items()}


def _read(record: LabelVersion, path: Path) -> NamedMask:
    with file_called(_name(record), path):
        return read_named(record, path)


def _name(record: LabelVersion) -> str:
    return f"version {record.version} of {record.image!r}"


def _latest(image: str, authors: Sequence[str] = ()) -> tuple[dict[str, int], dict[int, NamedMask], list[int]]:
    """Number of every author's latest version, or of those of ``authors``, the masks by number, and those passed over.

    What was made of others' versions is nobody's own. What has no author never votes beside what has one: a program
    that writes masks into the store would outvote the annotators. A mask that cannot be read is passed over for the one
    before: it keeps nobody from the others' votes.
    """
    own: dict[str, list[LabelVersion]] = {}
    unsigned: list[LabelVersion] = []
    for record in _store().versions(image):
        if not record.made_from and record.restored_from is None:
            (own.setdefault(record.author, []) if record.author else unsigned).append(record)
    voters = authors or list(own) or [_UNKNOWN]
    own.setdefault(_UNKNOWN, unsigned)
    missing = [author for author in authors if not own.get(author)]
    if missing:
        named = ", ".join(author for author, records in own.items() if records)
        raise HTTPException(404, f"no version by {missing[0]!r}; there are some by {named or 'nobody'}")
    latest: dict[str, int] = {}
    masks: dict[int, NamedMask] = {}
    passed_over: list[int] = []
    for author in dict.fromkeys(voters):
        for record in reversed(own[author]):
            try:
                masks[record.version] = _read(record, _store().mask_of(record))
            except VolumeError:
                passed_over.append(record.version)
                continue
            latest[author] = record.version
            break
        if author in authors and author not in latest:
            raise VolumeError(f"no version by {author!r} can be read; the server's log says why")
    return latest, masks, passed_over
