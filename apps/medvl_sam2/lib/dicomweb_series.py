"""One series from a DICOMweb server to files, and from files to a volume."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import nibabel as nib
from dicomweb_client import DICOMwebClient
from monailabel.datastore.utils.dicom import dicom_web_download_series

from lib.dicomweb_catalog import SeriesRecord
from medvl_sam2.errors import VolumeError
from medvl_sam2.volume_io import read_volume

_AS_STORED = (("application/dicom", "*"),)
"""Any transfer syntax: servers need not decompress, the reader here does."""


def fetch_series(client: DICOMwebClient, record: SeriesRecord, folder: Path, by_frame: bool = False) -> None:
    """Fetch all instances of a series; ``folder`` appears when they are complete.

    Raises:
        requests.RequestException: the server did not send them.
        VolumeError: it sent none.
    """
    partial = Path(tempfile.mkdtemp(prefix=".fetch-", dir=folder.parent))
    try:
        if by_frame:
            dicom_web_download_series(record.study, record.series, str(partial), client, frame_fetch=True)
        for number, instance in enumerate(
            () if by_frame else client.iter_series(record.study, record.series, media_types=_AS_STORED)
        ):
            instance.save_as(partial / f"{number:06d}.dcm", write_like_original=False)
        if not any(partial.iterdir()):
            raise VolumeError(f"series {record.series} has no instance on the server; send it again")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        folder.chmod(0o755)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def series_files(folder: Path) -> list[Path]:
    """The files of a fetched series."""
    return sorted(folder.iterdir()) if folder.is_dir() else []


def series_to_nifti(folder: Path, target: Path) -> None:
    """Write a series as NIfTI: voxels in the order viewers stack the slices, the grid exactly as the headers state it.

    Raises:
        VolumeError: why the series is no volume that masks could be placed on (gantry tilt, gaps, no image, ...).
    """
    volume = read_volume(folder)
    image = nib.Nifti1Image(volume.array, volume.geometry.affine)
    image.set_sform(volume.geometry.affine, code=1)
    image.set_qform(volume.geometry.affine, code=1)
    nib.save(image, target)
