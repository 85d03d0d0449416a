"""What a DICOMweb server holds: image series, and the segmentations that refer to them."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dicomweb_client import DICOMwebClient
from pydicom.dataset import Dataset

from medvl_sam2.dicom_io import NOT_IMAGES

logger = logging.getLogger(__name__)
_SAID = ("PatientID", "StudyDate", "SeriesDescription", "SeriesNumber")


@dataclass(frozen=True)
class SeriesRecord:
    """An image series; ``instances`` is None where the server does not count.

    ``said`` has more of what the server's answer states, by DICOM keyword: for lists that people read.
    """

    series: str
    study: str
    modality: str
    instances: int | None
    said: Mapping[str, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class SegRecord:
    """A stored segmentation of image series ``image``. ``made``: date and time of its content, as text that sorts."""

    series: str
    instance: str
    study: str
    image: str
    made: str
    creator: str
    description: str


@dataclass(frozen=True)
class _Listing:
    images: dict[str, SeriesRecord] = field(default_factory=dict)
    segmentations: dict[str, list[SegRecord]] = field(default_factory=dict)
    at: float = float("-inf")


class Catalog:
    r"""Asks the server again when its last answer is older than ``fresh_s``; one thread at a time.

    ``search_filter``: QIDO-RS filter of image series. Several modalities stand in one value, separated by backslashes
    as everywhere in DICOM: ``{"Modality": "CT\\MR"}``; each is asked for by itself, as not every server knows lists.
    """

    def __init__(self, client: DICOMwebClient, search_filter: Mapping[str, Any], fresh_s: float) -> None:
        self._client = client
        self._filter = dict(search_filter)
        self._fresh_s = fresh_s
        self._lock = threading.RLock()
        self._listing = _Listing()
        self._references: dict[tuple[str, int | None], list[SegRecord]] = {}

    def images(self) -> dict[str, SeriesRecord]:
        """Image series by SeriesInstanceUID. Raises :class:`requests.RequestException`."""
        return self._current().images

    def segmentations(self, image: str | None = None) -> list[SegRecord]:
        """Segmentations of an image series, or all; the newest first. Raises :class:`requests.RequestException`."""
        found = self._current().segmentations
        return list(found.get(image, [])) if image is not None else [seg for segs in found.values() for seg in segs]

    def last_known(self, image: str) -> tuple[SeriesRecord | None, list[SegRecord]]:
        """What the last answer said of a series; asks nobody."""
        listing = self._listing
        return listing.images.get(image), list(listing.segmentations.get(image, []))

    def find(self, series: str) -> SeriesRecord | None:
        """Any series of the server by its UID, whatever the filter. Raises :class:`requests.RequestException`."""
        found = self._search({"SeriesInstanceUID": series})  # no wait for who lists everything
        return next((record for record in found if record.series == series), None)

    def forget(self) -> None:
        """Ask anew next time."""
        self._listing = _Listing(self._listing.images, self._listing.segmentations)

    def _current(self) -> _Listing:
        with self._lock:
            if time.monotonic() - self._listing.at > self._fresh_s:
                images = {record.series: record for record in self._image_series()}
                self._listing = _Listing(images, self._segmentations(), time.monotonic())
            return self._listing

    def _image_series(self) -> list[SeriesRecord]:
        modalities = [part for part in str(self._filter.get("Modality", "")).split("\\") if part]
        filters = [{**self._filter, "Modality": modality} for modality in modalities] or [self._filter]
        found = [record for one in filters for record in self._search(one)]
        return [record for record in found if record.modality not in NOT_IMAGES]

    def _segmentations(self) -> dict[str, list[SegRecord]]:
        by_image = defaultdict(list)
        for record in self._search({"Modality": "SEG"}):
            key = (record.series, record.instances)
            if key not in self._references:
                self._references[key] = self._read_references(record)
            for seg in self._references[key]:
                by_image[seg.image].append(seg)
        return {image: sorted(segs, key=lambda seg: seg.made, reverse=True) for image, segs in by_image.items()}

    def _read_references(self, record: SeriesRecord) -> list[SegRecord]:
        found = []
        for item in self._client.retrieve_series_metadata(record.study, record.series):
            header = header_of(item)
            referenced = header.get("ReferencedSeriesSequence")
            if not referenced:
                logger.warning("Segmentation %s names no image series and is ignored", record.series)
                continue
            found.append(
                SegRecord(
                    series=record.series,
                    instance=str(header.SOPInstanceUID),
                    study=record.study,
                    image=str(referenced[0].SeriesInstanceUID),
                    made=content_time(header),
                    creator=str(header.get("ContentCreatorName") or "").replace("^", " ").strip(),
                    description=str(header.get("SeriesDescription") or header.get("ContentDescription") or ""),
                )
            )
        return found

    def _search(self, search_filter: Mapping[str, Any]) -> list[SeriesRecord]:
        found = []
        for item in self._client.search_for_series(search_filters=dict(search_filter)):
            header = header_of(item)
            count = header.get("NumberOfSeriesRelatedInstances")
            found.append(
                SeriesRecord(
                    series=str(header.SeriesInstanceUID),
                    study=str(header.StudyInstanceUID),
                    modality=str(header.get("Modality") or ""),
                    instances=int(count) if count is not None else None,
                    said={name: str(header[name].value) for name in _SAID if header.get(name) is not None},
                )
            )
        return found


def header_of(item: dict[str, Any]) -> Dataset:
    """A header from DICOM JSON; pixels and other values that the server keeps elsewhere are left empty."""
    return Dataset.from_json(item, bulk_data_uri_handler=lambda uri: None)


def content_time(header: Dataset) -> str:
    """When an object's content was made, ``YYYYMMDDHHMMSS.ffffff``: its content's, else its series', else its own."""
    for kind in ("Content", "Series", "InstanceCreation"):
        date, clock = str(header.get(f"{kind}Date") or ""), str(header.get(f"{kind}Time") or "")
        if date:
            whole, _, fraction = clock.replace(":", "").partition(".")
            return f"{date.replace('.', '').replace('-', '')}{whole:0<6}.{fraction:0<6}"
    return ""
