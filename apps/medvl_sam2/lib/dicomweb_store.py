"""The datastore of a DICOMweb server: series as images, DICOM SEG as labels, with a cache on disk.

Labels are saved in the cache first, like those of a folder, and then stored on the server as DICOM SEG, by way of an
outbox: what the server does not take at once is sent again later, and the reply says why. A version whose process was
killed before its SEG was made gets it after the next start, a text its SR (:mod:`lib.text_reports`); so does one whose
SEG or SR failed for a reason that passes. The other way round, a SEG that somebody else stored
becomes a label when it is newer than the one here; each is taken over once.

MONAI Label's own way is not used: dcmqi, which names segments by position, and lists that stay old for two hours.
"""

from __future__ import annotations

import logging
import math
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import requests
from fastapi import HTTPException
from filelock import FileLock
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMwebClientX
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.datastore import DefaultLabelTag
from pydicom.dataset import Dataset

from lib.datastore import GeometryOf, KnownImage
from lib.dicom_attempt import Attempt, attempt
from lib.dicom_objects import is_uid, source_headers
from lib.dicom_outbox import Outbox
from lib.dicom_seg import LabelOrigin, build_segmentation
from lib.dicom_seg_reading import SegLabels, read_segmentation
from lib.dicomweb_catalog import SegRecord, content_time, header_of
from lib.dicomweb_images import SeriesStore, reachable
from lib.dicomweb_session import TimedSession
from lib.label_names import stored_names
from lib.label_versions import ADOPTED, LabelVersion, version_number, version_tag
from lib.result_writing import http_error, reason_of
from lib.text_reports import publish_text, text_name
from lib.text_versions import TextVersion, TextVersions
from medvl_sam2.errors import MedVLError
from medvl_sam2.types import Geometry
from medvl_sam2.volume_io import read_mask, write_mask

logger = logging.getLogger(__name__)

FINAL = DefaultLabelTag.FINAL.value
_FROM_SERVER = "dicom"
_LONGEST_PAUSE_S = 300.0
"""Between two looks back for what fails again and again."""
_KNOWN = "known_segmentations"
"""In an image's info: SOPInstanceUIDs of the DICOM SEGs whose labels are or were here."""


class GuardedDicomWebStore(SeriesStore):
    """A DICOMweb server with a local cache."""

    def __init__(self, *, fresh_s: float, **kwargs: Any) -> None:
        self._fresh_s = fresh_s
        self._status: dict[str, Any] = {"total": 0, "completed": 0, "label_tags": {}}
        self._status_at = float("-inf")
        self._status_running = threading.Lock()
        self._unreadable: dict[str, str] = {}
        self._look_back_at = 0.0
        """When, by the monotonic clock, to look back for what has no DICOM object yet; infinite: there is nothing."""
        self._pause_s = fresh_s
        self._failed: dict[str, str] = {}
        """Why versions and texts had no DICOM object at first, by what they are called in the log."""
        super().__init__(fresh_s=fresh_s, **kwargs)

    @cached_property
    def _outbox(self) -> Outbox:
        return Outbox(self.folder / ".outbox", self._client.store_instances, self._has)

    # --- what there is ----------------------------------------------------------------------------------------------

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Listed images with a final label here, or with a DICOM SEG that may yet be taken over; each once."""
        with self._thread_lock:  # the folder's watcher changes the index in another thread
            here = set(LocalDatastore.get_labeled_images(self))
        with reachable():
            segmentations = self._catalog.segmentations()
        unread = [seg for seg in segmentations if seg.instance not in self._unreadable]
        there = {seg.image for seg in unread if seg.instance not in self._known(seg.image)}
        return [image for image in self.list_images() if image in here or image in there]

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Listed images without label, but for those found to be unreadable."""
        labelled = set(self.get_labeled_images())
        return [image for image in self.list_images() if image not in labelled and not self._refusal(image)]

    def known_images(self) -> dict[str, KnownImage]:
        """What the server lists, with what is known here of the series that were fetched."""
        here = super().known_images()
        with reachable():
            listed = self._catalog.images()
        found = {}
        for image, series in listed.items():
            known = here.get(image, KnownImage({}, {}))
            named = {"SeriesInstanceUID": image, "StudyInstanceUID": series.study, "Modality": series.modality}
            found[image] = KnownImage({**series.said, **named, **known.info}, known.labels)
        return found

    def status(self) -> dict[str, Any]:
        """Counts that may be ``fresh_s`` old plus one query: ``/info/`` must not wait for the DICOM server."""
        if time.monotonic() - self._status_at > self._fresh_s and self._status_running.acquire(blocking=False):
            threading.Thread(target=self._refresh_status, name="dicomweb-status", daemon=True).start()
        return dict(self._status)

    def _refresh_status(self) -> None:
        try:
            self._look_back()
            self._outbox.retry()
            images, labelled = self.list_images(), self.get_labeled_images()
            with self._thread_lock:  # never while the server is asked
                tags = Counter(tag for entry in self._datastore.objects.values() for tag in entry.labels)
            shown = {tag: count for tag, count in tags.items() if version_number(tag) is None}
            self._status = {"total": len(images), "completed": len(labelled), "label_tags": shown}
        except Exception:
            logger.exception("The DICOMweb server cannot be queried; the last known counts are shown")
        finally:
            self._status_at = time.monotonic()
            self._status_running.release()

    # --- labels -----------------------------------------------------------------------------------------------------

    def _label_stored(self, record: LabelVersion, path: Path) -> Mapping[str, Any]:
        """Make a DICOM SEG of a new version and send it; whatever fails, the version is kept and its info says why."""
        if record.source == _FROM_SERVER and "dicom_seg" in record.info:
            return {}  # it is one already
        what = _name(record.image, record.version)
        outcome = attempt(what, "SEG", lambda: self._sent(record, path))
        if outcome.failed:
            self.look_back_again(what, outcome.failed)
            return {}
        return {"dicom_seg": dict(outcome.note)}

    def _sent(self, record: LabelVersion, path: Path) -> dict[str, str]:
        document = self._segmentation(record, path)
        self._remember(record.image, str(document.SOPInstanceUID))
        waiting = self.send(document)
        return {**_note(document), **({"waiting": waiting} if waiting else {})}

    def look_back_again(self, what: str, reason: str, error: Exception | None = None) -> None:
        """Make the DICOM object of ``what`` at a later look at the server: it failed for a reason that may pass.

        What fails again is tried after longer and longer pauses, and is a warning in the log the first time only.
        """
        again = what in self._failed
        if not again:
            logger.warning("%s has no DICOM object yet: %s", what, reason, exc_info=error)
        self._failed[what] = reason
        pause = self._pause_s if again else self._fresh_s
        self._look_back_at = min(self._look_back_at, time.monotonic() + pause)

    def _look_back(self) -> None:
        if time.monotonic() < self._look_back_at:
            return
        self._look_back_at = math.inf  # unless something fails from here on
        try:
            self.publish_forgotten()
        except Exception as error:  # noqa: BLE001 - told in the log there
            self.look_back_again("Something that is kept here", reason_of(error), error)
        if self._look_back_at == math.inf:
            self._pause_s = self._fresh_s
            self._failed.clear()
        else:
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def publish_forgotten(self) -> None:
        """Make the DICOM SEG of versions, and the SR of texts, whose process was killed before it could note one.

        It may have sent it already: what is built again is the same object, which a server has once. What lay in the
        store without a request is nobody's submit and stays here.
        """
        for what, publish in [*self._forgotten_labels(), *self._forgotten_texts()]:
            logger.info("%s has no DICOM object yet; it is made now", what)
            try:
                publish()
            except Exception as error:  # noqa: BLE001 - told in the log there, and the next one may do better
                self.look_back_again(what, reason_of(error), error)

    def _forgotten_labels(self) -> Iterator[tuple[str, Callable[[], object]]]:
        with self._thread_lock:
            unnoted = {
                (image, number)
                for image, entry in self._datastore.objects.items()
                for tag, label in entry.labels.items()
                if (number := version_number(tag)) is not None
                and "dicom_seg" not in label.info
                and label.info.get("source") not in ADOPTED
            }
        for image, number in sorted(unnoted):
            record = self._files.read(image, number)
            if record is None or record.draft or record.withdrawn or "dicom_seg" in record.info:
                continue
            yield _name(image, number), partial(self._publish, record, self._files.mask_path(record))

    def _forgotten_texts(self) -> Iterator[tuple[str, Callable[[], object]]]:
        versions = TextVersions(self.folder)
        for image, text in versions.without_sr():
            yield text_name(image, text), partial(publish_text, self, versions, image, text)

    def _segmentation(self, record: LabelVersion, path: Path) -> Dataset:
        grid = self._grid(record.image)
        labels, _ = read_mask(path, like=grid.geometry)
        names = stored_names(record.index_info(), np.unique(labels).tolist())
        headers = source_headers(item.path for item in grid.slices)
        return build_segmentation(headers, labels, names, _origin(record))

    def dicom_note(self, image_id: str, tag: str = FINAL) -> dict[str, Any]:
        """What became of a label as DICOM SEG: its UIDs, and ``waiting`` or ``refused`` with the reason."""
        info = self.get_label_info(image_id, tag)
        note = dict(info.get("dicom_seg") or {})
        if not note:
            failed = self._failed.get(_name(image_id, info.get("version", 0)))
            return {"waiting": failed} if failed else {}
        return _with_waiting(note, self._outbox.waiting())

    def report_notes(self, image_id: str, texts: Sequence[TextVersion]) -> list[Attempt]:
        """What became of each text as DICOM SR, as it is now; ``failed`` of those that have none yet."""
        waiting = self._outbox.waiting()
        return [
            Attempt(_with_waiting(text.sr, waiting))
            if text.sr
            else Attempt(failed=self._failed.get(text_name(image_id, text), ""))
            for text in texts
        ]

    def send(self, document: Dataset) -> str | None:
        """Store an object on the server; returns why it still waits in the outbox, or None when it is there."""
        reason = self._outbox.send(document)
        self._catalog.forget()
        self._status_at = float("-inf")
        return reason

    def _has(self, document: Dataset) -> bool:
        """Whether the server holds an object."""
        uids = (document.StudyInstanceUID, document.SeriesInstanceUID, document.SOPInstanceUID)
        return bool(self._client.retrieve_instance_metadata(*map(str, uids)))

    def stored_segmentation(self, image_id: str) -> Dataset | None:
        """Header of the DICOM SEG that holds the final label, also while it waits to be sent.

        None without one, and where the server says that it has it no more. Raises HTTPException 502 when it fails.
        """
        note = self.dicom_note(image_id)
        instance = note.get("SOPInstanceUID")
        if not instance:
            return None
        waiting = self._outbox.read(instance)
        if waiting is not None:
            return waiting
        with reachable():
            study, series = note["StudyInstanceUID"], note["SeriesInstanceUID"]
            try:
                return header_of(self._client.retrieve_instance_metadata(study, series, instance))
            except requests.HTTPError as error:
                if error.response is None or error.response.status_code != requests.codes.not_found:
                    raise
                logger.warning("DICOM SEG %s of %s is not on the DICOMweb server", instance, image_id)
                return None

    def get_label_uri(self, label_id: str, label_tag: str, image_id: str = "") -> str:
        """Path of a label: ``label_id`` is an image, or with tag ``final`` also the series of a DICOM SEG."""
        if label_tag != FINAL or not is_uid(label_id):
            return str(LocalDatastore.get_label_uri(self, label_id, label_tag))
        with reachable():
            seg = next((seg for seg in self._catalog.segmentations() if seg.series == label_id), None)
        if seg is None:
            self._take_newest(label_id)
            return str(LocalDatastore.get_label_uri(self, label_id, FINAL))
        path = self.folder / ".segmentations" / f"{seg.instance}.nii.gz"
        if not path.is_file():
            labels, geometry = self._read(seg)
            path.parent.mkdir(exist_ok=True)
            write_mask(path, labels.mask, geometry)
        return str(path)

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        """Images with final labels as files; labels others stored on the server are fetched first."""
        self._outbox.retry()
        self._catalog.forget()
        for image_id in self.get_labeled_images():
            try:
                self.get_image_uri(image_id)
                self._take_newest(image_id)
            except HTTPException as error:
                logger.warning("The label of %s is left out: %s", image_id, error.detail)
        return [pair for pair in LocalDatastore.datalist(self, full_path) if Path(pair["image"]).exists()]

    def _take_newest(self, image_id: str) -> None:
        """Make the newest DICOM SEG of an image its final label, when it is newer than that and was never here."""
        with reachable():
            segmentations = self._catalog.segmentations(image_id)
        for seg in segmentations:
            if seg.instance in self._known(image_id) or seg.made <= _made(self.get_label_info(image_id, FINAL)):
                return
            if seg.instance in self._unreadable:
                continue
            try:
                labels, geometry = self._read(seg)
            except HTTPException as error:
                if error.status_code >= 500:  # passes; an older one must not take its place meanwhile
                    raise
                self._unreadable[seg.instance] = str(error.detail)
                logger.warning("Segmentation %s of %s is left out: %s", seg.series, image_id, error.detail)
                continue
            self._take(seg, labels, geometry)
            return

    def _take(self, seg: SegRecord, labels: SegLabels, geometry: Geometry) -> None:
        info = {
            "label_info": [{"name": name, "idx": value, "value": value} for value, name in labels.names.items()],
            "author": seg.creator,
            "source": _FROM_SERVER,
            "note": seg.description,
            "warnings": list(labels.warnings),
            "dicom_seg": {
                "StudyInstanceUID": seg.study,
                "SeriesInstanceUID": seg.series,
                "SOPInstanceUID": seg.instance,
                "made": seg.made,
            },
        }
        # A lock of its own: saving takes the store's and that of fetching, each by itself.
        with tempfile.TemporaryDirectory() as temporary, FileLock(str(self.folder / ".segmentations.lock"), timeout=60):
            with self._writing():
                known = self._known(seg.image)
            if seg.instance in known:
                return  # another process was quicker
            path = Path(temporary, f"{seg.image}.nii.gz")
            write_mask(path, labels.mask, geometry)
            super().save_label(seg.image, str(path), FINAL, info)
            self._remember(seg.image, seg.instance)
        logger.info("Segmentation %s of %s taken over from the server", seg.series, seg.image)

    def _read(self, seg: SegRecord) -> tuple[SegLabels, Geometry]:
        """A DICOM SEG of the server as a label map on its image's grid.

        Raises:
            HTTPException: 404, 415, 422 with the reason why it cannot be read, 502 the server fails.
        """
        image = self.get_image_uri(seg.image)
        if not image:
            raise HTTPException(404, f"segmentation {seg.series} is of series {seg.image}, which is not on the server")
        geometry = self._geometry_of(Path(image))
        with reachable():
            document = self._client.retrieve_instance(seg.study, seg.series, seg.instance)
        try:
            return read_segmentation(document, geometry), geometry
        except MedVLError as error:
            raise http_error(error) from error

    def _known(self, image_id: str) -> list[str]:
        obj = self._datastore.objects.get(image_id)
        return list(obj.image.info.get(_KNOWN, ())) if obj else []

    def _remember(self, image_id: str, instance: str) -> None:
        with self._writing():
            self.update_image_info(image_id, {_KNOWN: list(dict.fromkeys([*self._known(image_id), instance]))})


def open_dicomweb_store(url: str, geometry_of: GeometryOf) -> GuardedDicomWebStore:
    """A store over a DICOMweb server, with MONAI Label's settings."""
    user, password = settings.MONAI_LABEL_DICOMWEB_USERNAME, settings.MONAI_LABEL_DICOMWEB_PASSWORD
    session = TimedSession()
    if user and password:
        session.auth = (user, password)
    client = DICOMwebClientX(
        url=url,
        session=session,
        qido_url_prefix=settings.MONAI_LABEL_QIDO_PREFIX,
        wado_url_prefix=settings.MONAI_LABEL_WADO_PREFIX,
        stow_url_prefix=settings.MONAI_LABEL_STOW_PREFIX,
    )
    client.set_http_retry_params(retry=False)  # annotators wait for the answer, and the outbox tries again
    return GuardedDicomWebStore(
        client=client,
        search_filter=settings.MONAI_LABEL_DICOMWEB_SEARCH_FILTER,
        cache_path=settings.MONAI_LABEL_DICOMWEB_CACHE_PATH.strip() or None,
        fetch_by_frame=settings.MONAI_LABEL_DICOMWEB_FETCH_BY_FRAME,
        convert_to_nifti=settings.MONAI_LABEL_DICOMWEB_CONVERT_TO_NIFTI,
        geometry_of=geometry_of,
        fresh_s=settings.MONAI_LABEL_DICOMWEB_CACHE_EXPIRY,
    )


def _origin(record: LabelVersion) -> LabelOrigin:
    return LabelOrigin(
        record.author or "unknown",
        record.model_version or None,
        record.version,
        note=str(record.review.get("comment", "")),
        made=datetime.fromisoformat(record.submitted or record.time),
    )


def _name(image: str, number: int) -> str:
    """What a version is called in the log."""
    return f"{version_tag(number)} of {image}"


def _note(document: Dataset) -> dict[str, str]:
    uids = {name: str(document.get(name)) for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")}
    return {**uids, "made": content_time(document)}


def _with_waiting(note: Mapping[str, Any], waiting: Mapping[str, str]) -> dict[str, Any]:
    """What was noted of a SEG or SR, with ``waiting`` as it is now and not as it was when that was noted."""
    known = {key: value for key, value in note.items() if key != "waiting"}
    reason = waiting.get(known.get("SOPInstanceUID", ""))
    return {**known, "waiting": reason} if reason else known


def _made(info: Mapping[str, Any]) -> str:
    """When a label here was made, as :func:`content_time` writes it; empty without a label."""
    made = (info.get("dicom_seg") or {}).get("made")
    if made:
        return str(made)
    return datetime.fromtimestamp(info["ts"]).strftime("%Y%m%d%H%M%S.%f") if info.get("ts") else ""
