"""MONAI Label's datastores, made safe to write to.

What the stock ones do and these do not: accept any bytes as a label, let a tag name a folder outside the store,
overwrite a submitted label without a trace, drop the labels of an image that is sent again, and let a process that
scores images write its stale copy of the index over what the server saved meanwhile.
"""

from __future__ import annotations

import filecmp
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import requests
from dicomweb_client.session_utils import create_session_from_user_pass
from fastapi import HTTPException
from filelock import FileLock
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMwebClientX, DICOMWebDatastore
from monailabel.datastore.local import LocalDatastore

from lib.request_parsing import UnknownImageError
from lib.result_writing import http_errors
from medvl_sam2.errors import GeometryError, PromptError, VolumeError
from medvl_sam2.types import Geometry
from medvl_sam2.volume_io import read_mask

logger = logging.getLogger(__name__)

GeometryOf = Callable[[Path], Geometry]

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,127}")
_SERIES_UID = re.compile(r"[0-9.]{1,64}")
_LABEL_SUFFIXES = (".nii.gz", ".nii", ".nrrd")
_STATUS_FRESH_S = 30.0


class KnownImage(NamedTuple):
    """What the store says of an image and, by tag, of its labels. Not to be changed."""

    info: Mapping[str, Any]
    labels: Mapping[str, Mapping[str, Any]]


class GuardedStore(LocalDatastore):
    """Checks before writing, writes under one lock of all processes, and re-reads the index before changing it."""

    def __init__(self, *args: Any, geometry_of: GeometryOf, **kwargs: Any) -> None:
        self._geometry_of = geometry_of
        self._thread_lock = threading.RLock()
        self._process_lock: FileLock | None = None
        super().__init__(*args, **kwargs)

    @property
    def folder(self) -> Path:
        """Where images and labels lie: the studies, or the cache of a DICOMweb server."""
        return Path(self._datastore_path)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer among all threads and processes, seeing the newest index.

        Not MONAI Label's own ``.lock``: its methods take that one inside, and it does not nest.
        """
        with self._thread_lock:
            if self._process_lock is None:
                self._process_lock = FileLock(str(Path(self._datastore_path) / ".medvl.lock"), timeout=60)
            with self._process_lock:
                self._init_from_datastore_file()
                yield

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: Any, *more: Any) -> str:
        """Store a label after checking that it is one and lies on the image's grid; keep what it replaces.

        Raises:
            HTTPException: 404 unknown image, 400 unsafe tag, 415 not a label map, 422 another grid.
        """
        with http_errors(f"Saving the label of {image_id!r}"):
            _check_name("tag", str(label_tag))
            self._check_label(image_id, Path(label_filename))
            with self._writing():
                self._keep_replaced(image_id, str(label_tag))
                return super().save_label(image_id, label_filename, label_tag, label_info, *more)

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Store an image; the same image again changes nothing, another one under a taken id is refused (409)."""
        with http_errors(f"Saving the image {image_id!r}"):
            if image_id:
                _check_name("image id", image_id)
            with self._writing():
                known = self._datastore.objects.get(image_id)
                path = Path(LocalDatastore.get_image_uri(self, image_id)) if known else None
                if path is None or not path.is_file():
                    return super().add_image(image_id, image_filename, image_info)
                if not filecmp.cmp(path, image_filename, shallow=False):
                    raise HTTPException(409, f"image {image_id!r} exists with other content; send it under another id")
                return image_id

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        with self._writing():
            super().update_image_info(image_id, info)

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        with self._writing():
            super().update_label_info(label_id, label_tag, info)

    def remove_image(self, image_id: str) -> None:
        with self._writing():
            super().remove_image(image_id)

    def remove_label(self, label_id: str, label_tag: str) -> None:
        with self._writing():
            super().remove_label(label_id, label_tag)

    def refresh(self) -> None:
        with self._writing():
            super().refresh()

    def json(self) -> dict[str, Any]:
        with self._thread_lock:  # not while another thread changes it
            index: dict[str, Any] = super().json()
            return index

    def known_images(self) -> dict[str, KnownImage]:
        """What is known of every image, by its id; from memory, or by one query for all."""
        with self._thread_lock:
            return {
                image: KnownImage(entry.image.info, {tag: label.info for tag, label in entry.labels.items()})
                for image, entry in self._datastore.objects.items()
            }

    def _on_modify_event(self, event: Any) -> None:
        with self._thread_lock:
            super()._on_modify_event(event)

    def _check_label(self, image_id: str, file: Path) -> None:
        image = self.get_image_uri(image_id)
        if not image:
            raise UnknownImageError(f"image {image_id!r} is not in the datastore; its label was not saved")
        geometry = self._geometry_of(Path(image))
        if file.name.endswith(".bin"):
            voxels = int(np.prod(geometry.shape))
            if file.stat().st_size != voxels:
                raise GeometryError(f"raw label has {file.stat().st_size} bytes, the image has {voxels} voxels")
            return
        if not file.name.endswith(_LABEL_SUFFIXES):
            raise VolumeError(f"label file of kind {''.join(file.suffixes) or 'unknown'}; use one of {_LABEL_SUFFIXES}")
        try:
            _, grid = read_mask(file)
        except VolumeError as error:
            raise VolumeError(f"{str(error).replace(str(file), 'the label')}; nothing was saved") from error
        if grid.shape != geometry.shape:
            raise GeometryError(
                f"label of shape {grid.shape} does not fit image {image_id!r} of shape {geometry.shape}; nothing was "
                "saved: export the label on the grid of the image"
            )
        if not grid.matches(geometry, tolerance_mm=max(geometry.spacing)):
            raise GeometryError(
                f"label and image {image_id!r} have the same shape but lie apart in space by more than a voxel; "
                "nothing was saved: export the label with the orientation and origin of the image"
            )

    def _keep_replaced(self, image_id: str, tag: str) -> None:
        """Copy a label that is about to be overwritten to ``.history/<tag>/<image>/`` of the store."""
        record = self._datastore.label(image_id, tag)
        if record is None:
            return
        old = Path(self._datastore.label_path(tag)) / self._filename(image_id, record.ext)
        if old.is_file():
            folder = Path(self._datastore_path) / ".history" / tag / image_id
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy2(old, folder / f"{time.time_ns()}{record.ext}")


class GuardedLocalStore(GuardedStore):
    """A folder of images."""

    def status(self) -> dict[str, Any]:
        with self._thread_lock:  # the folder's watcher changes the index in another thread
            return super().status()


class GuardedDicomWebStore(GuardedStore, DICOMWebDatastore):
    """A DICOMweb server with a local cache. Queries take one lock: their cache is not made for threads."""

    def __init__(self, *args: Any, geometry_of: GeometryOf, **kwargs: Any) -> None:
        self._query_lock = threading.RLock()
        self._status: dict[str, Any] = {"total": 0, "completed": 0, "label_tags": {}}
        self._status_at = float("-inf")
        self._status_running = threading.Lock()
        super().__init__(*args, geometry_of=geometry_of, **kwargs)

    def list_images(self) -> list[str]:
        with self._query_lock:
            return super().list_images()

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        with self._query_lock:
            return super().get_labeled_images(label_tag, labels)

    def known_images(self) -> dict[str, KnownImage]:
        """As far as series were fetched; of the others the series is known."""
        known = super().known_images()
        return {image: known.get(image, KnownImage({"SeriesInstanceUID": image}, {})) for image in self.list_images()}

    def get_image_uri(self, image_id: str) -> str:
        """Path of the series in the cache, fetched when needed; empty for what is no series of the server."""
        if not _SERIES_UID.fullmatch(image_id):
            return ""
        try:
            return super().get_image_uri(image_id)
        except requests.HTTPError as error:
            if error.response is not None and error.response.status_code == 404:
                return ""
            raise HTTPException(502, f"the DICOMweb server failed on series {image_id}: {error}") from error
        except requests.RequestException as error:
            raise HTTPException(502, f"the DICOMweb server cannot be reached: {error}") from error

    def status(self) -> dict[str, Any]:
        """Counts at most :data:`_STATUS_FRESH_S` old plus one query: ``/info/`` must not wait for the DICOM server."""
        if time.monotonic() - self._status_at > _STATUS_FRESH_S and self._status_running.acquire(blocking=False):
            threading.Thread(target=self._refresh_status, name="dicomweb-status", daemon=True).start()
        return dict(self._status)

    def _refresh_status(self) -> None:
        try:
            self._status = super().status()
        except Exception:
            logger.exception("The DICOMweb server cannot be queried; the last known counts are shown")
        finally:
            self._status_at = time.monotonic()
            self._status_running.release()


def open_local_store(folder: str, geometry_of: GeometryOf) -> GuardedLocalStore:
    """A store over a folder, with MONAI Label's settings."""
    return GuardedLocalStore(
        folder,
        geometry_of=geometry_of,
        extensions=settings.MONAI_LABEL_DATASTORE_FILE_EXT,
        auto_reload=settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
        read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
    )


def open_dicomweb_store(url: str, geometry_of: GeometryOf) -> GuardedDicomWebStore:
    """A store over a DICOMweb server, with MONAI Label's settings."""
    user, password = settings.MONAI_LABEL_DICOMWEB_USERNAME, settings.MONAI_LABEL_DICOMWEB_PASSWORD
    client = DICOMwebClientX(
        url=url,
        session=create_session_from_user_pass(user, password) if user and password else None,
        qido_url_prefix=settings.MONAI_LABEL_QIDO_PREFIX,
        wado_url_prefix=settings.MONAI_LABEL_WADO_PREFIX,
        stow_url_prefix=settings.MONAI_LABEL_STOW_PREFIX,
    )
    return GuardedDicomWebStore(
        client=client,
        search_filter=settings.MONAI_LABEL_DICOMWEB_SEARCH_FILTER,
        cache_path=settings.MONAI_LABEL_DICOMWEB_CACHE_PATH.strip() or None,
        fetch_by_frame=settings.MONAI_LABEL_DICOMWEB_FETCH_BY_FRAME,
        convert_to_nifti=settings.MONAI_LABEL_DICOMWEB_CONVERT_TO_NIFTI,
        geometry_of=geometry_of,
    )


def _check_name(what: str, name: str) -> None:
    if not _SAFE_NAME.fullmatch(name) or ".." in name:
        raise PromptError(f"{what} {name!r} is no plain name; use letters, digits, '.', '_', '-' and blanks")
