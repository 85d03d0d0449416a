"""DICOM objects on their way to the server: on disk before the first attempt, gone from there when they arrived."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pydicom
import requests
from pydicom.dataset import Dataset

from lib.dicom_objects import is_uid
from lib.result_writing import reason_of
from medvl_sam2.files import atomic_writer

logger = logging.getLogger(__name__)

_PATIENCE_S = 2.0
"""How long a new object waits for the one that is being sent; then it follows at the next retry."""
_ANSWER_S = 5.0
"""How long its sender waits for the server: an annotator does not wait for one that hangs."""
_DUPLICATE = str(0x0111)
"""Failure reason (PS3.4 table C.2-2): the server has an object of this UID. The client leaves those in XML as text."""


class Outbox:
    """A folder of objects to send. One thread sends at a time.

    Sending an object twice does no harm, also to a server that refuses duplicates: it has arrived, then.
    """

    def __init__(self, folder: Path, store: Callable[[list[Dataset]], Dataset], has: Callable[[Dataset], bool]) -> None:
        """``store``: STOW-RS, the reply as a dataset; ``has``: whether the server holds an object.

        Both raise :class:`requests.RequestException`.
        """
        self._folder = folder
        self._store, self._has = store, has
        self._lock = threading.Lock()
        self._reasons: dict[str, str] = {}
        self._reached = True  # by the last attempt

    def send(self, document: Dataset) -> str | None:
        """Keep the object, then send it; returns why it still waits, or None when the server has it."""
        file = self._file(str(document.SOPInstanceUID))
        with atomic_writer(file) as stream:
            document.save_as(stream, write_like_original=False)
        told: list[str | None] = []
        sender = threading.Thread(target=lambda: told.append(self._send(file)), name="dicom-outbox", daemon=True)
        sender.start()
        sender.join(_PATIENCE_S + _ANSWER_S)
        if told:
            return told[0]
        reason = "the DICOMweb server has not answered yet; it is sent again if need be"
        return self._reasons.setdefault(file.stem, reason)

    def _send(self, file: Path) -> str | None:
        if not self._lock.acquire(timeout=_PATIENCE_S):
            return "another object is being sent; this one follows"
        try:
            return self._attempt(file)
        finally:
            self._lock.release()

    def retry(self) -> int:
        """Send what waits, up to the first failure to connect; returns how much still waits.

        Does nothing while another thread sends.
        """
        if not self._lock.acquire(blocking=False):
            return len(self.waiting())
        try:
            for file in self._files():
                self._attempt(file)
                if not self._reached:
                    break
        finally:
            self._lock.release()
        return len(self.waiting())

    def waiting(self) -> dict[str, str]:
        """Reason by SOPInstanceUID of every object the server does not have yet."""
        return {file.stem: self._reasons.get(file.stem, "not sent yet") for file in self._folder.glob("*.dcm")}

    def read(self, instance: str) -> Dataset | None:
        """A waiting object without its pixels."""
        file = self._file(instance)
        try:
            return pydicom.dcmread(file, stop_before_pixels=True)
        except FileNotFoundError:
            return None

    def _attempt(self, file: Path) -> str | None:
        reason = self._refusal(file)
        if reason is None:
            file.unlink(missing_ok=True)
            self._reasons.pop(file.stem, None)
        else:
            self._reasons[file.stem] = reason
            logger.warning("DICOM object %s waits to be sent: %s", file.stem, reason)
        return reason

    def _refusal(self, file: Path) -> str | None:
        self._reached = True
        try:
            document = pydicom.dcmread(file)
        except FileNotFoundError:
            return None  # another process was quicker
        try:
            reply = self._store([document])
        except requests.RequestException as error:
            self._reached = not isinstance(error, requests.ConnectionError | requests.Timeout)
            if error.response is not None and error.response.status_code == requests.codes.conflict:
                # Why, servers say in many ways; whether it has the object is what counts.
                return None if self._arrived(document) else f"the DICOMweb server refused it: {error}"
            return f"the DICOMweb server did not take it: {error}"
        except Exception as error:  # whatever a server answers, the label is kept and the object waits
            logger.exception("DICOM object %s cannot be sent", file.stem)
            return f"the DICOMweb server's answer was not understood: {reason_of(error)}"
        reasons = [str(item.get("FailureReason", "unknown")) for item in reply.get("FailedSOPSequence") or ()]
        refused = next((reason for reason in reasons if reason != _DUPLICATE), None)
        return None if refused is None else f"the DICOMweb server refused it with failure reason {refused}"

    def _arrived(self, document: Dataset) -> bool:
        try:
            return self._has(document)
        except (requests.RequestException, LookupError, ValueError) as error:  # mostly that there is none: 404
            logger.warning("Whether the server has DICOM object %s is not known: %s", document.SOPInstanceUID, error)
            return False

    def _files(self) -> list[Path]:
        """What waits, the oldest first."""
        return sorted(self._folder.glob("*.dcm"), key=_written)

    def _file(self, instance: str) -> Path:
        if not is_uid(instance):
            raise ValueError(f"{instance!r} is no DICOM UID")
        return self._folder / f"{instance}.dcm"


def _written(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:  # sent since it was listed
        return 0.0
