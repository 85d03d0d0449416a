"""Questions, report drafts and the structures they rest on; corrected texts come back as versions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Response
from monailabel.interfaces.utils.app import app_instance
from pydantic import BaseModel, Field

from lib.api.access import AsAnnotator, AsUser, author_of
from lib.dicomweb_session import briefly
from lib.request_parsing import MAX_TEXT, Client
from lib.result_writing import http_errors, write_label_map
from lib.text_reports import publish_text
from lib.text_versions import MAX_CHARACTERS, Kind, TextVersion, TextVersions
from medvl_sam2.errors import PromptError
from medvl_sam2.types import Answer, Evidence

router = APIRouter(prefix="/medvl/texts", tags=["MedVL texts"])

ImageId = Annotated[str, Query(description="id of an image of the datastore")]
_ANYBODY = Client.API.value


class EvidenceReply(BaseModel):
    """A structure that a text names; ``voxels`` 0 and no centre when the image map does not show it."""

    name: str
    voxels: int
    centroid_voxel: tuple[float, float, float] | None
    why: str

    @classmethod
    def of(cls, evidence: Evidence) -> EvidenceReply:
        return cls(name=evidence.name, voxels=evidence.voxels, centroid_voxel=evidence.centroid, why=evidence.why)


class SentenceReply(BaseModel):
    """A sentence of a report and what it rests on."""

    text: str
    evidence: list[EvidenceReply]


class Asking(BaseModel):
    """A question about an image; ``client_id`` names the annotator's session."""

    image: str
    question: str = Field(max_length=MAX_TEXT)
    client_id: str = _ANYBODY


class AnswerReply(BaseModel):
    """An answer, with what it and its question name."""

    question: str
    answer: str
    notice: str
    model_version: str
    evidence: list[EvidenceReply]


class Drafting(BaseModel):
    """Asks for the draft of a report."""

    image: str
    client_id: str = _ANYBODY


class ReportReply(BaseModel):
    """A drafted report, in sentences."""

    text: str
    notice: str
    model_version: str
    sentences: list[SentenceReply]


class TextUpload(BaseModel):
    """A corrected or accepted text. ``draft`` is what the model had written, ``structures`` what the text rests on."""

    kind: Kind
    text: str = Field(max_length=MAX_CHARACTERS)
    author: str = Field(min_length=1, max_length=64)
    draft: str = Field(default="", max_length=MAX_CHARACTERS)
    question: str = Field(default="", max_length=MAX_CHARACTERS)
    note: str = Field(default="", max_length=MAX_CHARACTERS)
    model_version: str = Field(default="", description="of the draft; empty: the model that is served now")
    structures: list[str] = Field(default_factory=list, description="names of the draft's evidence")


class StoredText(BaseModel):
    """A stored version. ``sr``: where its DICOM SR lies, None when the store is no DICOMweb server."""

    version: int
    time: str
    checksum: str
    sr: dict[str, str] | None
    sr_error: str | None = None
    """Why the text has no DICOM SR although it is stored; one that fails for now is made later."""


class TextRecord(StoredText):
    """A stored version with its content."""

    kind: Kind
    text: str
    draft: str
    question: str
    author: str
    note: str
    model_version: str


class TextList(BaseModel):
    """All versions of an image's texts, oldest first."""

    image: str
    versions: list[TextRecord]


@router.post("/ask")
def ask(body: Asking, user: AsUser) -> AnswerReply:
    """Answer a question and say which structures of the image the answer rests on."""
    with _session(body.image, body.client_id, "question") as held:
        answer: Answer = held.predictor.answer(held.session, body.question)
        version = str(held.predictor.meta.version)
    return AnswerReply(
        question=answer.question,
        answer=answer.text,
        notice=answer.notice,
        model_version=version,
        evidence=[EvidenceReply.of(item) for item in answer.evidence],
    )


@router.post("/report")
def draft_report(body: Drafting, user: AsUser) -> ReportReply:
    """Draft a report whose every sentence says which structures it rests on."""
    with _session(body.image, body.client_id, "report") as held:
        answer: Answer = held.predictor.report(held.session)
        version = str(held.predictor.meta.version)
    sentences = [
        SentenceReply(text=sentence.text, evidence=[EvidenceReply.of(item) for item in sentence.evidence])
        for sentence in answer.sentences
    ]
    if not sentences:  # a model without an image map
        sentences = [SentenceReply(text=answer.text, evidence=[])]
    return ReportReply(text=answer.text, notice=answer.notice, model_version=version, sentences=sentences)


@router.get("/mask", response_class=Response)
def evidence_mask(image: ImageId, name: str, user: AsUser, compress: bool = True) -> Response:
    """The mask of an answer's evidence as NRRD, one byte a voxel, on the image's grid; 404 for what is not there."""
    with _session(image, _ANYBODY, "evidence") as held:
        try:
            mask = held.predictor.evidence_mask(held.session, name)
        except PromptError as error:
            raise HTTPException(404, str(error)) from error
        geometry = held.session.volume.geometry
    file = Path(write_label_map(mask.astype("uint8"), geometry, ".nrrd", compress))
    try:
        content = file.read_bytes()
    finally:
        file.unlink()
    return Response(content, media_type="application/octet-stream")


@router.post("")
def store_text(image: ImageId, body: TextUpload, user: AsAnnotator) -> StoredText:
    """Keep a text as a new version; on a DICOMweb store it also becomes a DICOM SR in the image's study."""
    app = app_instance()
    _check_image(app, image)
    versions = _versions(app)
    with http_errors(f"Storing a text of {image!r}"):
        stored = versions.save(
            image,
            TextVersion(
                kind=body.kind,
                text=body.text,
                author=author_of(user, body.author) or body.author,
                model_version=body.model_version or app.runtime.served_version(),
                draft=body.draft,
                question=body.question,
                note=body.note,
                structures=tuple(body.structures),
            ),
        )
        with briefly():  # the text is kept; its SR can come later
            outcome = publish_text(app.datastore(), versions, image, stored)
    return StoredText(
        version=stored.version,
        time=stored.time,
        checksum=stored.checksum,
        **_shown_sr(outcome.note, outcome.failed),
    )


@router.get("")
def list_texts(image: ImageId, user: AsUser) -> TextList:
    """Every stored text of an image."""
    app = app_instance()
    _check_image(app, image)
    with http_errors(f"Reading the texts of {image!r}"):
        texts = _versions(app).of(image)
    outcomes = app.datastore().report_notes(image, texts)
    return TextList(
        image=image,
        versions=[
            TextRecord(**{**vars(text), **_shown_sr(outcome.note, outcome.failed)})
            for text, outcome in zip(texts, outcomes, strict=True)
        ],
    )


@contextmanager
def _session(image: str, client: str, what: str) -> Iterator[Any]:
    app = app_instance()
    path = _image_path(app, image)
    with http_errors(f"A text about {image!r}"), app.runtime.use(path, client or _ANYBODY, what=what) as held:
        yield held


def _image_path(app: Any, image: str) -> Path:
    path = app.datastore().get_image_uri(image) if image else ""
    if not path:
        raise _no_image(image)
    return Path(path)


def _check_image(app: Any, image: str) -> None:
    """As :func:`_image_path`, but a text needs no voxels: it is kept and listed whatever a DICOMweb server does."""
    if not image or not app.datastore().may_have(image):
        raise _no_image(image)


def _no_image(image: str) -> HTTPException:
    return HTTPException(404, f"image {image!r} is not in the datastore; refresh the list of images")


def _versions(app: Any) -> TextVersions:
    return TextVersions(Path(app.datastore().folder))


def _shown_sr(note: Mapping[str, str], failed: str = "") -> dict[str, Any]:
    """``sr`` and ``sr_error`` of what is noted of a text as DICOM SR."""
    where = {key: value for key, value in note.items() if key != "refused"}
    return {"sr": where or None, "sr_error": note.get("refused") or failed or None}
