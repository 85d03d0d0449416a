"""A DICOMweb server in memory, seen through the client's methods the store calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pydicom
import requests
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from app.segs import reread
from lib.dicomweb_store import GuardedDicomWebStore
from medvl_sam2.volume_io import read_volume
from orthanc import WrittenSeries


class FakeDicomWeb:
    """``down``: no request reaches it; ``refuses``: STOW-RS is answered with a failure; ``asked``: QIDO-RS filters.

    ``duplicates``: what it has already is taken again, ``refused`` with 200 and a reason, or with 409 and none.
    ``stalled``: requests wait until it is set.
    """

    base_url = "http://fake/dicom-web"

    def __init__(self) -> None:
        self.held: dict[str, Dataset] = {}
        self.down = False
        self.refuses = False
        self.duplicates: Literal["taken", "refused", "409"] = "taken"
        self.turned_away: list[str] = []
        """SOPInstanceUIDs of the duplicates it did not take."""
        self.stalled: threading.Event | None = None
        self.asked: list[dict[str, Any]] = []

    def add(self, series: WrittenSeries) -> None:
        for file in series.files:
            self.put(pydicom.dcmread(file))

    def put(self, document: Dataset) -> None:
        self.held[str(document.SOPInstanceUID)] = reread(document)

    def series(self, modality: str) -> list[Dataset]:
        """First instance of every series of a modality."""
        return list({str(d.SeriesInstanceUID): d for d in self.held.values() if d.Modality == modality}.values())

    def search_for_series(self, search_filters: dict[str, Any]) -> list[dict[str, Any]]:
        self._reach()
        self.asked.append(search_filters)
        groups: dict[str, list[Dataset]] = {}
        for document in self.held.values():
            if all(str(document.get(key)) == value for key, value in search_filters.items()):
                groups.setdefault(str(document.SeriesInstanceUID), []).append(document)
        return [self._summary(documents) for documents in groups.values()]

    def retrieve_series_metadata(self, study: str, series: str) -> list[dict[str, Any]]:
        return [self._meta(document) for document in self._of(study, series)]

    def iter_series(self, study: str, series: str, media_types: Any = None) -> Iterator[Dataset]:
        return iter(self._of(study, series))

    def retrieve_instance(self, study: str, series: str, instance: str) -> Dataset:
        for document in self._of(study, series):
            if document.SOPInstanceUID == instance:
                return document
        raise requests.HTTPError("404 Client Error: Not Found")

    def retrieve_instance_metadata(self, study: str, series: str, instance: str) -> dict[str, Any]:
        return self._meta(self.retrieve_instance(study, series, instance))

    def store_instances(self, documents: Sequence[Dataset]) -> Dataset:
        self._reach()
        reply = Dataset()
        if self.refuses:
            failed = Dataset()
            failed.FailureReason = 0x0110
            reply.FailedSOPSequence = [failed]
            return reply
        for document in documents:
            uid = str(document.SOPInstanceUID)
            if self.duplicates == "taken" or uid not in self.held:
                self.put(document)
                continue
            self.turned_away.append(uid)
            if self.duplicates == "409":
                answer = requests.Response()
                answer.status_code = 409
                raise requests.HTTPError("409 Client Error: Conflict", response=answer)
            failed = Dataset()
            failed.FailureReason = 0x0111
            reply.FailedSOPSequence = [failed]
        return reply

    def holds(self, document: Dataset) -> bool:
        self._reach()
        return str(document.SOPInstanceUID) in self.held

    def _of(self, study: str, series: str) -> list[Dataset]:
        self._reach()
        found = [d for d in self.held.values() if (d.StudyInstanceUID, d.SeriesInstanceUID) == (study, series)]
        return [reread(document) for document in found]

    def _reach(self) -> None:
        if self.stalled is not None:
            assert self.stalled.wait(60)
        if self.down:
            raise requests.ConnectionError("nobody answers")

    @staticmethod
    def _meta(document: Dataset) -> dict[str, Any]:
        plain = Dataset({element.tag: element for element in document if element.keyword != "PixelData"})
        return dict(plain.to_json_dict())

    @staticmethod
    def _summary(documents: Sequence[Dataset]) -> dict[str, Any]:
        summary = Dataset()
        for name in ("StudyInstanceUID", "SeriesInstanceUID", "Modality", "PatientID", "StudyDate", "StudyTime"):
            setattr(summary, name, documents[0].get(name))
        summary.NumberOfSeriesRelatedInstances = len(documents)
        return dict(summary.to_json_dict())


def anew(document: Dataset, made: str) -> Dataset:
    """The same object as somebody else stored it at ``made`` (YYYYMMDDHHMMSS)."""
    other = reread(document)
    other.SOPInstanceUID, other.SeriesInstanceUID = generate_uid(), generate_uid()
    other.file_meta.MediaStorageSOPInstanceUID = other.SOPInstanceUID
    other.ContentDate, other.ContentTime = made[:8], made[8:]
    return other


Open = Callable[..., GuardedDicomWebStore]
"""Open a store: keywords of :func:`store_opener`."""


def store_opener(server: Any, folder: Path) -> Open:
    """Stores over ``server`` (a client) with caches in ``folder``; ``cache="b"`` is another machine."""

    def begin(cache: str = "a", **settings: Any) -> GuardedDicomWebStore:
        store = GuardedDicomWebStore(
            client=server,
            cache_path=str(folder / cache),
            geometry_of=lambda path: read_volume(path).geometry,
            **{"search_filter": {"Modality": "CT\\MR"}, "fresh_s": 0.0, **settings},
        )
        store._observer.stop()  # the folder's watcher is a thread that would outlive the test
        store._observer.join()
        return store

    return begin
