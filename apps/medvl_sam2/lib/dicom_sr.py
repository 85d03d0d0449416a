"""Reports and answers as DICOM structured reports beside the images they speak of.

An Enhanced SR by TID 2000 (basic diagnostic imaging report): title, observers (the person who wrote or corrected the
text and the model that drafted it), the question of an answer as section "Request", the text verbatim as section
"Findings", inferred from the segments it rests on. The source images are listed as evidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from highdicom.sr import (
    ContainerContentItem,
    ContentSequence,
    DeviceObserverIdentifyingAttributes,
    EnhancedSR,
    ImageContentItem,
    ObserverContext,
    PersonObserverIdentifyingAttributes,
    RelationshipTypeValues,
    TextContentItem,
)
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import EnhancedSRStorage, generate_uid

from lib.dicom_codes import segment_name, structure_name
from lib.dicom_objects import MANUFACTURER, MODEL_NAME, dated, long_string, object_uid, person_name, stamped
from medvl_sam2.errors import DataError

_SERIES_NUMBER = 901
_FINDINGS = codes.cid7001.Findings
_REQUEST = codes.cid7001.Request


@dataclass(frozen=True)
class Report:
    """A text about one image series.

    ``author``: who wrote or corrected it. ``model_version``: the model that drafted it, None for a person's own text.
    ``question``: what was asked, for an answer. ``structures``: names of the structures the text rests on; those that
    the newest stored DICOM SEG of the series has are referenced as its segments. ``verified``: the author stands for
    the text; ``organization`` is then stated too. ``replaces``: the report this one is the next version of.
    ``made``, with a time zone: a report with it becomes an object with the same UIDs and times whenever it is built.
    """

    kind: Literal["report", "answer"]
    text: str
    author: str
    model_version: str | None = None
    question: str | None = None
    structures: tuple[str, ...] = ()
    verified: bool = False
    organization: str | None = None
    version: int | None = None
    replaces: StoredReport | None = None
    made: datetime | None = None


@dataclass(frozen=True)
class StoredReport:
    """Where a report lies. ``waiting``: why the server does not have it yet; it is sent again by itself."""

    study: str
    series: str
    instance: str
    waiting: str | None = None


def store_report_sr(datastore: Any, image_id: str, report: Report) -> StoredReport:
    """Make a structured report of ``report`` and store it in the study of series ``image_id``.

    ``datastore``: the app's, over a DICOMweb server (:class:`lib.dicomweb_store.GuardedDicomWebStore`). A server that
    does not take the report leaves it queued on disk, with the reason in ``waiting``. Blocks on the network: call it
    from a worker thread.

    Raises:
        DataError: empty text, or the source images lack what a report must state.
        VolumeError: the series cannot be read.
        HTTPException: 404 no such series, 502 the series itself or the header of its DICOM SEG cannot be fetched.
    """
    headers = datastore.source_headers(image_id)
    document = build_report_sr(headers, report, datastore.stored_segmentation(image_id))
    waiting = datastore.send(document)
    return StoredReport(
        str(document.StudyInstanceUID), str(document.SeriesInstanceUID), str(document.SOPInstanceUID), waiting
    )


def build_report_sr(headers: Sequence[Dataset], report: Report, segmentation: Dataset | None = None) -> Dataset:
    """The structured report about the images with ``headers`` (one dataset a slice, pixels not needed).

    Raises:
        DataError: empty text, or headers that lack an identifier.
    """
    if not report.text.strip():
        raise DataError("the report is empty; write its text first")
    segments = _referenced_segments(segmentation, report.structures)
    evidence = [*headers, *([segmentation] if segmentation is not None and segments else [])]
    organization = report.organization or str(headers[0].get("InstitutionName") or "") or "not stated"
    series_uid, instance_uid = (
        object_uid(kind, str(headers[0].SeriesInstanceUID), report.version, report.made, report.author)
        for kind in ("report series", "report")
    )
    document = EnhancedSR(
        evidence=evidence,
        content=_content(report, segmentation, segments),
        series_instance_uid=series_uid,
        series_number=_SERIES_NUMBER,
        sop_instance_uid=instance_uid,
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=MODEL_NAME,
        software_versions=report.model_version or "none",
        series_description=_description(report),
        is_complete=True,
        is_final=report.verified,
        is_verified=report.verified,
        verifying_observer_name=person_name(report.author) if report.verified else None,
        verifying_organization=organization if report.verified else None,
        previous_versions=[_predecessor(report.replaces)] if report.replaces else None,
    )
    return stamped(dated(document, report.made))


def report_text(document: Dataset) -> str:
    """The text of section "Findings" of a structured report made here."""
    texts = [
        str(item.TextValue)
        for section in document.ContentSequence
        if section.ValueType == "CONTAINER" and section.ConceptNameCodeSequence[0].CodeValue == _FINDINGS.value
        for item in section.ContentSequence
        if item.ValueType == "TEXT"
    ]
    return "\n".join(texts)


def _content(report: Report, segmentation: Dataset | None, segments: Sequence[int]) -> ContainerContentItem:
    root = ContainerContentItem(name=codes.cid7000.DiagnosticImagingReport, template_id="2000")
    items = ContentSequence()
    for observer in _observers(report):
        items.extend(observer)
    if report.question:
        question = TextContentItem(_REQUEST, report.question, RelationshipTypeValues.CONTAINS)
        items.append(_section(_REQUEST, question))
    text = TextContentItem(codes.cid7002.Finding, report.text, RelationshipTypeValues.CONTAINS)
    if segmentation is not None and segments:
        source = ImageContentItem(
            name=codes.DCM.ReferencedSegment,
            referenced_sop_class_uid=segmentation.SOPClassUID,
            referenced_sop_instance_uid=segmentation.SOPInstanceUID,
            referenced_segment_numbers=list(segments),
            relationship_type=RelationshipTypeValues.INFERRED_FROM,
        )
        text.ContentSequence = ContentSequence([source])
    items.append(_section(_FINDINGS, text))
    root.ContentSequence = items
    return root


def _section(heading: Code, item: TextContentItem) -> ContainerContentItem:
    section = ContainerContentItem(heading, relationship_type=RelationshipTypeValues.CONTAINS)
    section.ContentSequence = ContentSequence([item])
    return section


def _observers(report: Report) -> list[ObserverContext]:
    person = PersonObserverIdentifyingAttributes(person_name(report.author), organization_name=report.organization)
    observers = [ObserverContext(codes.DCM.Person, person)]
    if report.model_version:
        device = DeviceObserverIdentifyingAttributes(
            uid=generate_uid(entropy_srcs=[MODEL_NAME, report.model_version]),
            name=MODEL_NAME,
            manufacturer_name=MANUFACTURER,
            model_name=report.model_version,
        )
        observers.append(ObserverContext(codes.DCM.Device, device))
    return observers


def _referenced_segments(segmentation: Dataset | None, structures: Sequence[str]) -> list[int]:
    """Numbers of the segments that carry one of the names."""
    wanted = {structure_name(name) for name in structures}
    items = segmentation.SegmentSequence if segmentation is not None else []
    return [int(item.SegmentNumber) for item in items if segment_name(item) in wanted]


def _predecessor(report: StoredReport) -> Dataset:
    item = Dataset()
    item.StudyInstanceUID, item.SeriesInstanceUID, item.SOPInstanceUID = report.study, report.series, report.instance
    item.SOPClassUID = EnhancedSRStorage
    return item


def _description(report: Report) -> str:
    version = f" version {report.version}" if report.version is not None else ""
    return long_string(f"{MANUFACTURER} {report.kind}{version}")
