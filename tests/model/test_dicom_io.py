"""DICOM series to volumes: the grid the ITK series reader gives, or a reason."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from medvl_sam2.errors import VolumeError
from medvl_sam2.types import Modality
from medvl_sam2.volume_io import read_mask, read_volume
from volume_files import hounsfield, itk_affine, turned


def save_slice(path: Path, pixels: np.ndarray, position: np.ndarray, rows: np.ndarray, **tags: object) -> None:
    """One CT slice, ``pixels`` (rows, columns) HU, ``rows`` (2, 3) the image orientation; a tag of None is left out."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.is_little_endian, data.is_implicit_VR = True, False
    values: dict[str, object] = {
        "SOPClassUID": CTImageStorage, "SOPInstanceUID": meta.MediaStorageSOPInstanceUID, "Modality": "CT",
        "SeriesInstanceUID": "1.2.3", "Rows": pixels.shape[0], "Columns": pixels.shape[1], "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15,
        "PixelRepresentation": 0, "RescaleSlope": 1, "RescaleIntercept": -1024, "PixelSpacing": [1.1, 0.7],
        "SliceThickness": 9, "ImagePositionPatient": [round(float(v), 6) for v in position],
        "ImageOrientationPatient": [round(float(v), 8) for v in rows.ravel()],
        "PixelData": (pixels.astype(np.int32) + 1024).astype(np.uint16).tobytes(),
    }  # fmt: skip
    for name, value in {**values, **tags}.items():
        if value is not None:
            setattr(data, name, value)
    data.save_as(path, write_like_original=False)


def save_series(folder: Path, offsets: list[float], tilt: float = 0.0, **tags: object) -> np.ndarray:
    """An oblique series of 7 x 5 pixel slices at ``offsets`` mm along the normal; names run against the positions."""
    folder.mkdir(exist_ok=True)
    rows = turned()[:, :2].T
    stacking = np.cross(rows[0], rows[1]) + np.tan(np.radians(tilt)) * rows[1]
    pixels = hounsfield((len(offsets), 7, 5))
    for n, offset in enumerate(offsets):
        position = np.array([-80.0, -90.0, 33.0]) + offset * stacking
        save_slice(folder / f"IM{len(offsets) - n:03d}", pixels[n], position, rows, **tags)
    return pixels


@pytest.mark.parametrize("uid", ["1.2.3", "", None], ids=["uid", "empty", "absent"])
@pytest.mark.parametrize("packed", [False, True], ids=["directory", "zip"])
def test_series_is_what_the_itk_series_reader_gives(tmp_path: Path, packed: bool, uid: str | None) -> None:
    pixels = save_series(tmp_path / "series", [0, 2.5, 5, 7.5], SeriesInstanceUID=uid, StudyInstanceUID=uid)
    (tmp_path / "series" / "notes.txt").write_text("no image")
    path = tmp_path / "series"
    if packed:
        path = tmp_path / "series.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted((tmp_path / "series").iterdir()):
                archive.write(file, f"deep/../../{file.name}")
    volume = read_volume(path)
    assert volume.modality is Modality.CT
    assert volume.array.dtype == np.int16
    assert np.array_equal(volume.array, pixels.transpose(2, 1, 0))
    assert volume.geometry.spacing == pytest.approx((0.7, 1.1, 2.5), abs=1e-4)

    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(p) for p in sorted((tmp_path / "series").glob("IM*"), reverse=True)])
    image = reader.Execute()
    assert np.array_equal(volume.array, sitk.GetArrayFromImage(image).T)
    np.testing.assert_allclose(volume.geometry.affine, itk_affine(image), atol=1e-3)
    sitk.WriteImage(image, str(tmp_path / "converted.nii.gz"))
    assert read_volume(tmp_path / "converted.nii.gz").geometry.matches(volume.geometry)


def test_single_file_is_one_slice(tmp_path: Path) -> None:
    pixels = save_series(tmp_path / "s", [4])
    volume = read_volume(tmp_path / "s" / "IM001")
    assert np.array_equal(volume.array[:, :, 0], pixels[0].T)
    assert volume.geometry.spacing == pytest.approx((0.7, 1.1, 9.0))


@pytest.mark.parametrize(
    ("offsets", "tilt", "tags", "reason"),
    [
        ([0, 2, 4, 8, 10], 0, {}, r"slice distances vary from 2.00 to 4.00 mm"),
        ([0, 2, 4, 6], 12, {}, r"gantry is tilted by 12.0 degrees"),
        ([0, 2, 2, 4], 0, {}, "several slices at one position"),
        ([0, 2, 4], 0, {"PixelSpacing": None}, "PixelSpacing"),
        ([0, 2, 4], 0, {"ImagePositionPatient": None}, "ImagePositionPatient"),
        ([0, 2, 4], 0, {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "no right-angled grid"),
        ([0, 2, 4], 0, {"NumberOfFrames": 3}, "multi-frame object of 3 frames"),
        ([0, 2, 4], 0, {"SamplesPerPixel": 3}, "colour"),
        ([0, 2, 4], 0, {"Modality": "SR"}, "no image slices"),
        ([0, 2, 4], 0, {"PixelData": None}, "no pixels that can be decoded"),
    ],
)
def test_series_that_cannot_be_placed(
    tmp_path: Path, offsets: list[float], tilt: float, tags: dict[str, object], reason: str
) -> None:
    save_series(tmp_path / "s", offsets, tilt, **tags)
    with pytest.raises(VolumeError, match=reason):
        read_volume(tmp_path / "s")


def test_two_series_are_named_and_scouts_dropped(tmp_path: Path) -> None:
    pixels = save_series(tmp_path / "s", [0, 2, 4], SeriesDescription="venous")
    rows = np.array([[1.0, 0, 0], [0, 0, -1.0]])
    scout = {"SeriesInstanceUID": "1.2.4", "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    save_slice(tmp_path / "s" / "scout", hounsfield((4, 4)), np.zeros(3), rows, **scout)
    assert np.array_equal(read_volume(tmp_path / "s").array, pixels.transpose(2, 1, 0))
    save_slice(tmp_path / "s" / "other", hounsfield((7, 5)), np.zeros(3), rows, SeriesInstanceUID="1.2.5")
    with pytest.raises(VolumeError, match=r"2 series: .*venous.*keep one"):
        read_volume(tmp_path / "s")


@pytest.mark.shared_data
def test_dicom_series_with_empty_uids_agrees_with_its_mask(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "ts_ct_dicom20"
    volume = read_volume(folder / "dicom")
    assert volume.array.shape == (512, 512, 20)
    # Label 5 of the class map is the liver: contrast-filled soft tissue wherever the mask is placed right.
    stored, grid = read_mask(folder / "seg_total_fast.nii.gz")
    placed, _ = read_mask(folder / "seg_total_fast.nii.gz", like=volume.geometry)
    assert not grid.matches(volume.geometry)
    assert np.array_equal(placed, stored[:, ::-1])
    assert np.mean((volume.array[placed == 5] > 0) & (volume.array[placed == 5] < 250)) > 0.95
    reader = sitk.ImageSeriesReader()
    names = sorted((folder / "dicom").iterdir(), key=lambda p: pydicom.dcmread(p).ImagePositionPatient[2])
    reader.SetFileNames([str(p) for p in names])
    image = reader.Execute()
    assert np.array_equal(volume.array, sitk.GetArrayFromImage(image).T)
    np.testing.assert_allclose(volume.geometry.affine, itk_affine(image), atol=1e-3)


@pytest.mark.shared_data
def test_transfer_syntaxes_decode_to_one_slice(shared_data: Path) -> None:
    folder = shared_data / "hard_dicom_transfer_syntaxes"
    reference = pydicom.dcmread(next(folder.glob("*1.2.840.10008.1.2.1.dcm")))
    hu = reference.pixel_array * float(reference.RescaleSlope) + float(reference.RescaleIntercept)
    files = sorted(folder.glob("CTImage*"))
    assert len(files) == 9
    for path in files:
        array = read_volume(path).array[:, :, 0].T
        lossy = "JPEG2000Transfer" in path.name or "Process2_4" in path.name
        assert np.abs(array - hu).mean() <= (5.0 if lossy else 0.0), path.name
