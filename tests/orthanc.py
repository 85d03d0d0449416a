"""A real Orthanc for tests, DICOM series to fill it with, and the way in (STOW-RS).

The server comes from the Debian packages ``orthanc`` and ``orthanc-dicomweb``; without them :func:`running_orthanc`
skips the test and says so.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import requests
from dicomweb_client import DICOMwebClient
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid
from pydicom.valuerep import DSfloat

_PLUGINS = (
    Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so"),
    Path("/usr/lib/orthanc/libOrthancDicomWeb.so"),
)
_START_S = 30.0
_TO_LPS = np.diag([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class Orthanc:
    """A running server: ``url`` is its root, ``dicomweb`` what ``--studies`` takes."""

    url: str
    folder: Path

    @property
    def dicomweb(self) -> str:
        return f"{self.url}/dicom-web"

    @property
    def client(self) -> DICOMwebClient:
        return DICOMwebClient(url=self.dicomweb)

    def store(self, files: Sequence[Path]) -> None:
        """STOW files; raises when the server does not take every one of them."""
        stow(self.dicomweb, files)

    def series(self, modality: str = "SEG") -> list[str]:
        """SeriesInstanceUIDs of one modality."""
        found = self.client.search_for_series(search_filters={"Modality": modality})
        return [str(pydicom.Dataset.from_json(item).SeriesInstanceUID) for item in found]

    def instances(self, series: str) -> list[pydicom.Dataset]:
        """The whole instances of a series."""
        meta = self.client.search_for_series(search_filters={"SeriesInstanceUID": series})
        study = str(pydicom.Dataset.from_json(meta[0]).StudyInstanceUID)
        return list(self.client.retrieve_series(study, series))


@dataclass(frozen=True)
class WrittenSeries:
    """A series on disk. ``files`` lie in the order of the array's slices, their names run against it."""

    study: str
    series: str
    instances: tuple[str, ...]
    files: tuple[Path, ...]


def orthanc_missing() -> str | None:
    """Why Orthanc cannot be started here, or None."""
    if shutil.which("Orthanc", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
        return "Orthanc is not installed; apt-get install orthanc orthanc-dicomweb"
    if not any(plugin.exists() for plugin in _PLUGINS):
        return "Orthanc's DICOMweb plugin is not installed; apt-get install orthanc-dicomweb"
    return None


@contextmanager
def running_orthanc(folder: Path, port: int | None = None) -> Iterator[Orthanc]:
    """Start Orthanc on a loopback port with its storage in ``folder``; stop it at the end.

    Skips the test when it is not installed, fails when it does not answer within 30 s.
    """
    reason = orthanc_missing()
    if reason:
        pytest.skip(reason)
    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    settings = {
        "Name": "test",
        "Plugins": [str(plugin) for plugin in _PLUGINS if plugin.exists()][:1],
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "index"),
        "HttpPort": port,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomServerEnabled": False,
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    config = folder / "orthanc.json"
    config.write_text(json.dumps(settings, indent=1))
    program = shutil.which("Orthanc", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    with open(folder / "orthanc.log", "wb") as log:
        process = subprocess.Popen([str(program), str(config)], stdout=log, stderr=log, cwd=folder)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(url, process, folder / "orthanc.log")
        yield Orthanc(url, folder)
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            if requests.get(f"{url}/dicom-web/studies", timeout=2).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.05)
    pytest.fail(f"Orthanc does not answer at {url}; its log ends:\n{log.read_text()[-2000:]}")


def free_port() -> int:
    """A loopback port nobody listens on.

    Drawn from below those that systems give to connections and to servers that ask for any port: another process would
    be given one of them again before the server here listens on it.
    """
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", 20_000 + secrets.randbelow(12_000)))
            except OSError:
                continue
            return int(probe.getsockname()[1])


def stow(dicomweb: str, files: Sequence[Path]) -> None:
    """Send DICOM files to a DICOMweb server; raises AssertionError for what it refuses."""
    reply = DICOMwebClient(url=dicomweb).store_instances([pydicom.dcmread(file) for file in files])
    stored = len(reply.get("ReferencedSOPSequence", []))
    assert stored == len(files), f"stored {stored} of {len(files)}: {reply}"


def write_series(
    folder: Path,
    array: np.ndarray,
    affine: np.ndarray,
    modality: str = "CT",
    study: str | None = None,
    frame_of_reference: str | None = None,
    **tags: Any,
) -> WrittenSeries:
    """Write one single-frame file a slice: array (I, J, K) of whole numbers, affine (4, 4) stored voxel to RAS+ mm.

    ``i`` runs along the columns, ``j`` down the rows, ``k`` from slice to slice, whatever the affine's handedness: a
    reader that sorts by position along row x column sees ``k`` reversed for a left-handed one. Axes must be at right
    angles. ``tags`` override or, with None, remove attributes of every slice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    study, series = study or generate_uid(), generate_uid()
    frame_of_reference = frame_of_reference or generate_uid()
    axes, origin = _TO_LPS @ affine[:3, :3], _TO_LPS @ affine[:3, 3]
    spacing = np.linalg.norm(axes, axis=0)
    rows_columns = [_ds(v) for v in (axes[:, :2] / spacing[:2]).T.ravel()]
    sop_class = {"CT": CTImageStorage, "MR": MRImageStorage}[modality]
    instances, files = [], []
    for k in range(array.shape[2]):
        uid = generate_uid()
        values: dict[str, Any] = {
            "SOPClassUID": sop_class, "SOPInstanceUID": uid, "Modality": modality,
            "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
            "StudyInstanceUID": study, "SeriesInstanceUID": series, "FrameOfReferenceUID": frame_of_reference,
            "StudyDate": "20240102", "StudyTime": "030405", "StudyID": "1", "AccessionNumber": "",
            "SeriesNumber": 1, "InstanceNumber": k + 1, "SeriesDescription": f"phantom {modality}",
            "PatientID": "phantom", "PatientName": "Phantom^Test", "PatientBirthDate": "19700101", "PatientSex": "O",
            "ReferringPhysicianName": "", "Manufacturer": "test", "PositionReferenceIndicator": "",
            "Rows": array.shape[1], "Columns": array.shape[0], "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15,
            "PixelRepresentation": 1, "PixelSpacing": [_ds(spacing[1]), _ds(spacing[0])],
            "SliceThickness": _ds(spacing[2]), "ImagePositionPatient": [_ds(v) for v in origin + k * axes[:, 2]],
            "ImageOrientationPatient": rows_columns,
            "PixelData": np.ascontiguousarray(array[:, :, k].T.astype("<i2")).tobytes(),
        }  # fmt: skip
        if modality == "CT":
            values |= {"RescaleSlope": 1, "RescaleIntercept": 0, "KVP": "120", "WindowCenter": 40, "WindowWidth": 400}
        files.append(folder / f"IM{array.shape[2] - k:04d}.dcm")
        _save(files[-1], {**values, **tags})
        instances.append(uid)
    return WrittenSeries(study, series, tuple(instances), tuple(files))


def _save(path: Path, values: dict[str, Any]) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = values["SOPClassUID"]
    meta.MediaStorageSOPInstanceUID = values["SOPInstanceUID"]
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.is_little_endian, data.is_implicit_VR = True, False
    for name, value in values.items():
        if value is not None:
            setattr(data, name, value)
    data.save_as(path, write_like_original=False)


def _ds(value: float) -> DSfloat:
    """A decimal string of at most 16 characters, as DICOM allows."""
    return DSfloat(float(value), auto_format=True)
