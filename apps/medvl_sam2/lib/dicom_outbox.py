"""DICOM objects on their way to the server: on disk before the first attempt, gone from there when they arrived."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pydicom
import requests
from pydicom.dataset import Dataset

from medvl_sam2.files import atomic_writer

logger = logging.getLogger(__name__)

_UID = re.compile(r"[0-9.]{1,64}")


class Outbox:
    """A folder of objects to send. One thread sends at a time; sending an object twice does no harm."""

    def __init__(self, folder: Path, store: Callable[[list[Dataset]], Dataset]) -> None:
        """``store``: STOW-RS, the reply as a dataset; raises :class:`requests.RequestException`."""
        self._folder = folder
        self._store = store
        self._lock = threading.Lock()
        self._reasons: dict[str, str] = {}

    def send(self, document: Dataset) -> str | None:
        """Keep the object, then send it; returns why it still waits, or None when the server has it."""
        file = self._file(str(document.SOPInstanceUID))
        with atomic_writer(file) as stream:
            document.save_as(stream, write_like_original=False)
        with self._lock:
            return self._attempt(file)

    def retry(self) -> int:
        """Send what waits; returns how much still does. Does nothing while another thread sends."""
        if not self._lock.acquire(blocking=False):
            return len(self.waiting())
        try:
            for file in self._files():
                self._attempt(file)
        finally:
            self._lock.release()
        return len(self.waiting())

    def waiting(self) -> dict[str, str]:
        """Reason by SOPInstanceUID of every object the server does not have yet."""
        return {file.stem: self._reasons.get(file.stem, "not sent yet") for file in self._files()}

    def read(self, instance: str) -> Dataset | None:
        """A waiting object without its pixels."""
        file = self._file(instance)
        return pydicom.dcmread(file, stop_before_pixels=True) if file.is_file() else None

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
        try:
            reply = self._store([pydicom.dcmread(file)])
        except requests.RequestException as error:
            return f"the DICOMweb server did not take it: {error}"
        failed = reply.get("FailedSOPSequence")
        if failed:
            return f"the DICOMweb server refused it with failure reason {failed[0].get('FailureReason', 'unknown')}"
        return None

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("*.dcm"), key=lambda file: file.stat().st_mtime)

    def _file(self, instance: str) -> Path:
        if not _UID.fullmatch(instance):
            raise ValueError(f"{instance!r} is no DICOM UID")
        return self._folder / f"{instance}.dcm"
