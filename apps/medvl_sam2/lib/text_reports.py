"""Stored texts as DICOM SR, when they are stored or later: a text made twice is the same object."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from typing import Any

from lib.dicom_attempt import Attempt, attempt
from lib.dicom_sr import Report, StoredReport, store_report_sr
from lib.text_versions import TextVersion, TextVersions


def publish_text(datastore: Any, versions: TextVersions, image: str, text: TextVersion) -> Attempt:
    """Make the DICOM SR of a stored text, send it and note beside the text where it lies.

    On a store that is no DICOMweb server nothing happens. Blocks on the network.
    """
    if not hasattr(datastore, "source_headers"):
        return Attempt()

    def make() -> dict[str, str]:
        note = _published(datastore, image, text, versions.readable(image))
        versions.add_sr(image, text.version, note)
        return note

    what = text_name(image, text)
    outcome = attempt(what, "SR", make)
    if "refused" in outcome.note:
        with suppress(OSError):  # it is tried again after the next start, then
            versions.add_sr(image, text.version, outcome.note)
    if outcome.failed:
        datastore.look_back_again(what, outcome.failed)
    return outcome


def text_name(image: str, text: TextVersion) -> str:
    """What a stored text is called in the log."""
    return f"Text {text.version} of {image}"


def _published(datastore: Any, image: str, text: TextVersion, known: list[TextVersion]) -> dict[str, str]:
    """Identifiers of the DICOM SR of a text, ``waiting`` among them while the server does not take it."""
    before = [
        StoredReport(one.sr["StudyInstanceUID"], one.sr["SeriesInstanceUID"], one.sr["SOPInstanceUID"])
        for one in known
        if one.version < text.version and (one.kind, one.question) == (text.kind, text.question)
        if one.sr and "SOPInstanceUID" in one.sr
    ]
    report = Report(
        kind=text.kind,
        text=text.text,
        author=text.author,
        model_version=text.model_version if text.draft else None,
        question=text.question or None,
        structures=text.structures,
        version=text.version,
        replaces=before[-1] if before else None,
        made=datetime.fromisoformat(text.time),
    )
    stored = store_report_sr(datastore, image, report)
    sr = {
        "StudyInstanceUID": stored.study,
        "SeriesInstanceUID": stored.series,
        "SOPInstanceUID": stored.instance,
    }
    return sr | ({"waiting": stored.waiting} if stored.waiting else {})
