"""Image series of a DICOMweb server as volumes in a cache on disk.

MONAI Label's own conversion is not used: the ITK reader behind it loses gantry tilt and missing slices without a word.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import requests
from dicomweb_client import DICOMwebClient
from fastapi import HTTPException
from monailabel.datastore.dicom import DICOMWebDatastore
from pydicom.dataset import Dataset

from lib.datastore import GeometryOf, GuardedStore
from lib.dicom_objects import is_uid, source_headers
from lib.dicomweb_catalog import Catalog
from lib.dicomweb_series import fetch_series, series_files, series_to_nifti
from lib.dicomweb_session import briefly, is_brief
from lib.result_writing import http_error
from medvl_sam2.dicom_io import DicomGrid, read_dicom_grid
from medvl_sam2.errors import VolumeError

logger = logging.getLogger(__name__)


class SeriesStore(GuardedStore, DICOMWebDatastore):
    """Lists series by the catalogue, fetches them when they are asked for, and remembers why some cannot be used."""

    def __init__(
        self,
        *,
        client: DICOMwebClient,
        search_filter: Mapping[str, Any],
        geometry_of: GeometryOf,
        fresh_s: float,
        **kwargs: Any,
    ) -> None:
        """``fresh_s``: seconds for which what the server said of its contents is believed."""
        self._catalog = Catalog(client, search_filter, fresh_s)
        self._fetching: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._refused: dict[str, VolumeError] = {}
        super().__init__(client=client, search_filter=search_filter, geometry_of=geometry_of, **kwargs)

    def list_images(self) -> list[str]:
        with reachable():
            return list(self._catalog.images())

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """What is kept of an image, its DICOM SEGs on the server (newest first), and why it is ``refused``, if so."""
        info: dict[str, Any] = super().get_image_info(image_id)
        _, segmentations = self._catalog.last_known(image_id)
        if segmentations:
            info["segmentations"] = [asdict(seg) for seg in segmentations]
        refusal = self._refusal(image_id)
        if refusal:
            info["refused"] = str(refusal)
        return info

    def get_image_uri(self, image_id: str) -> str:
        """Path of the series in the cache, fetched when needed; empty for what is no series of the server.

        Raises:
            HTTPException: 415 with the reason why the series cannot be used, 502 the server fails.
        """
        if not is_uid(image_id):
            return ""
        with self._fetching[image_id]:
            self._drop_outgrown(image_id)
            volume = self.folder / f"{image_id}.nii.gz"
            if self._convert_to_nifti and volume.is_file():
                return str(volume)
            folder = self._series_folder(image_id)
            if folder is None or not self._convert_to_nifti:
                return str(folder or "")
            with tempfile.TemporaryDirectory() as temporary:
                converted = Path(temporary, volume.name)
                try:
                    series_to_nifti(folder, converted)
                except VolumeError as error:
                    plain = VolumeError(str(error).replace(str(folder), f"series {image_id}"))
                    self._refused[image_id] = plain
                    raise http_error(plain) from error
                self._refused.pop(image_id, None)
                self.add_image(image_id, str(converted), self._dicom_info(image_id))
            return str(volume)

    def may_have(self, image_id: str) -> bool:
        """Whether it is a series that was listed or fetched here; of another one, what the server says.

        One that does not answer soon may have it.
        """
        if not is_uid(image_id):
            return False
        listed, _ = self._catalog.last_known(image_id)
        if listed is not None or image_id in self._datastore.objects or series_files(self.folder / image_id):
            return True
        try:
            with briefly():
                return self._catalog.find(image_id) is not None
        except requests.RequestException as error:
            logger.warning("Whether there is a series %s is not known: %s", image_id, error)
            return True

    def remove_image(self, image_id: str) -> None:
        """Refused (409): the series would be listed again at once, and its labels taken over from the server anew."""
        remedy = "delete it there, and labels with DELETE /datastore/label"
        raise HTTPException(409, f"series {image_id!r} lies on the DICOMweb server; {remedy}")

    def source_headers(self, image_id: str) -> list[Dataset]:
        """Headers of a series' slices in the order they are stacked, without pixels.

        Raises:
            VolumeError: the series is no volume. DataError: its headers lack an identifier.
            HTTPException: 404 no such series, 502 the server fails, 503 it is not here yet and somebody waits.
        """
        return source_headers(item.path for item in self._grid(image_id).slices)

    def _grid(self, image_id: str) -> DicomGrid:
        if is_brief() and not series_files(self.folder / image_id):
            raise HTTPException(503, f"series {image_id} is not fetched yet")
        with self._fetching[image_id]:
            folder = self._series_folder(image_id)
        if folder is None:
            raise HTTPException(404, f"series {image_id!r} is not on the DICOMweb server")
        return read_dicom_grid(series_files(folder), Path(f"series {image_id}"))

    def _series_folder(self, image_id: str) -> Path | None:
        """The series' files in the cache, fetched when needed; None when the server does not know it."""
        folder = self.folder / image_id
        if series_files(folder):
            return folder
        with reachable():
            record = self._catalog.find(image_id)
            if record is None:
                return None
            fetch_series(self._client, record, folder, by_frame=self._fetch_by_frame)
        return folder

    def _drop_outgrown(self, image_id: str) -> None:
        """Forget a series that was fetched while slices were still arriving, unless it has labels by now."""
        record, _ = self._catalog.last_known(image_id)
        folder = self.folder / image_id
        have = len(series_files(folder))
        if record is None or record.instances is None or not 0 < have < record.instances:
            return
        if self.get_labels_by_image_id(image_id):
            logger.warning(
                "Series %s grew from %d to %d slices after it was labelled", image_id, have, record.instances
            )
            return
        shutil.rmtree(folder)
        (self.folder / f"{image_id}.nii.gz").unlink(missing_ok=True)

    def _refusal(self, image_id: str) -> VolumeError | None:
        """Why a series cannot be used; None again when slices were added since."""
        record, _ = self._catalog.last_known(image_id)
        grown = record and record.instances and record.instances > len(series_files(self.folder / image_id))
        return None if grown else self._refused.get(image_id)


@contextmanager
def reachable() -> Iterator[None]:
    """Failures of the server as HTTP errors with a reason."""
    try:
        yield
    except VolumeError as error:
        raise http_error(error) from error
    except requests.RequestException as error:
        raise HTTPException(502, f"the DICOMweb server failed or cannot be reached: {error}") from error
