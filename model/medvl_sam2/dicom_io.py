"""One DICOM series as a grid: headers through pydicom, pixels through SimpleITK (GDCM decodes and rescales).

Slices are stacked in the order SimpleITK's series reader gives (position along row x column, ascending), so the array
equals that reader's image, or the NIfTI file written from it, voxel by voxel.
"""

from __future__ import annotations

import math
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.errors import InvalidDicomError

from medvl_sam2.errors import VolumeError
from medvl_sam2.types import Geometry

MAX_TILT_DEG = 2.0
"""Angle between slice normal and stacking direction, or off a right angle, that is still taken for a straight grid."""
_MAX_ZIP_BYTES = 16 * 2**30
NOT_IMAGES = frozenset({"SEG", "SR", "PR", "KO", "RTSTRUCT", "RTPLAN", "RTDOSE", "REG", "DOC"})
"""Values of DICOM ``Modality`` whose objects are no images to read here."""
_TAGS = (
    "SeriesInstanceUID", "SeriesDescription", "Modality", "ImageType", "Rows", "Columns", "NumberOfFrames",
    "SamplesPerPixel", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices",
    "ImagePositionPatient", "ImageOrientationPatient",
)  # fmt: skip


@dataclass(frozen=True)
class DicomSlice:
    """Header of one slice; ``position`` and the rows of ``orientation`` (2, 3) in DICOM LPS mm."""

    path: Path
    series: str
    label: str
    modality: str
    size: tuple[int, int]
    spacing_rows_columns: tuple[float, float]
    thickness: float
    position: np.ndarray
    orientation: np.ndarray
    localizer: bool

    @property
    def normal(self) -> np.ndarray:
        """Unit normal, rows x columns."""
        return np.cross(self.orientation[0], self.orientation[1])


@dataclass(frozen=True)
class DicomGrid:
    """A series before its pixels are read: ``slices`` in stacking order, on ``geometry`` (column, row, slice)."""

    slices: tuple[DicomSlice, ...]
    geometry: Geometry


@dataclass(frozen=True)
class DicomStack:
    """A decoded series: ``array`` (column, row, slice) rescaled, ``affine`` to RAS+ mm, DICOM ``Modality`` value."""

    array: np.ndarray
    affine: np.ndarray
    modality: str


def is_dicom(path: Path) -> bool:
    """True for a file with the DICOM part 10 preamble."""
    try:
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read_dicom_zip(path: Path) -> DicomStack:
    """Read the one series inside a zip archive. Members are unpacked under own names, never under theirs."""
    try:
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
            members = [m for m in archive.infolist() if not m.is_dir() and "__MACOSX" not in m.filename]
            total = sum(m.file_size for m in members)
            if total > _MAX_ZIP_BYTES:
                raise VolumeError(f"{path} unpacks to {total / 2**30:.1f} GiB; give one series per archive")
            for number, member in enumerate(members):
                Path(folder, f"{number:06d}").write_bytes(archive.read(member))
            return read_dicom_files(sorted(Path(folder).iterdir()), path)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, RuntimeError, NotImplementedError, OSError, EOFError) as error:
        raise VolumeError(f"{path} is not a readable zip archive ({error}); zip the series again") from error


def read_dicom_directory(path: Path) -> DicomStack:
    """Read the one series in a directory and its subdirectories, whatever the files are called."""
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith(".") and p.name != "DICOMDIR"]
    return read_dicom_files(files, path)


def read_dicom_files(files: Iterable[Path], source: Path) -> DicomStack:
    """Stack the slices among ``files``. ``source`` is what messages name.

    Raises :class:`VolumeError` as :func:`read_dicom_grid`, and when pixels cannot be decoded.
    """
    grid = read_dicom_grid(files, source)
    rows, columns = grid.slices[0].size
    images = [_pixels(s) for s in grid.slices]
    kinds = {image.dtype for image in images}
    dtype = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
    array = np.empty(grid.geometry.shape, dtype=dtype, order="F")
    for k, image in enumerate(images):
        if image.shape != (rows, columns):
            raise VolumeError(
                f"{grid.slices[k].path} decodes to {image.shape}, its header says {(rows, columns)}; export it again"
            )
        array[:, :, k] = image.T
    return DicomStack(array, grid.geometry.affine, grid.slices[0].modality)


def read_dicom_grid(files: Iterable[Path], source: Path) -> DicomGrid:
    """The slices among ``files`` in stacking order and where they lie; pixels are not read.

    Raises :class:`VolumeError` when there is no image, more than one series, no position, a time series, gantry tilt,
    or an uneven slice distance.
    """
    headers = [_header(path) for path in files if is_dicom(path)]
    if headers and not any(headers):
        raise VolumeError(
            f"{source} holds DICOM objects but no image slices (segmentations or reports); give a CT or MR series"
        )
    slices = _one_series([header for header in headers if header is not None], source)
    first = slices[0]
    slices = sorted(slices, key=lambda s: float(s.position @ first.normal))
    affine = np.eye(4)
    affine[:3, 0] = first.orientation[0] * first.spacing_rows_columns[1]
    affine[:3, 1] = first.orientation[1] * first.spacing_rows_columns[0]
    affine[:3, 2] = _stack_step(slices, source)
    affine[:3, 3] = slices[0].position
    shape = (first.size[1], first.size[0], len(slices))
    return DicomGrid(tuple(slices), Geometry(shape, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine))


def _header(path: Path) -> DicomSlice | None:
    """Header of an image file; None for objects that are no images (segmentations, reports, plans)."""
    try:
        data = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_TAGS))
    except (InvalidDicomError, OSError, EOFError, ValueError, AttributeError, KeyError, NotImplementedError) as error:
        raise VolumeError(f"{path} has a broken DICOM header ({error}); export the series again") from error
    modality = str(data.get("Modality", "") or "").upper()
    if modality in NOT_IMAGES or data.get("Rows") is None:
        return None
    if int(data.get("NumberOfFrames", 1) or 1) > 1:
        raise VolumeError(
            f"{path} is a multi-frame object of {data.NumberOfFrames} frames, whose slice positions are not read here; "
            "export single-frame DICOM or convert it to NIfTI"
        )
    if int(data.get("SamplesPerPixel", 1) or 1) != 1:
        raise VolumeError(f"{path} is a colour image ({data.SamplesPerPixel} samples a pixel); give a CT or MR series")
    spacing = _numbers(data, "PixelSpacing", 2, path)
    orientation = _numbers(data, "ImageOrientationPatient", 6, path).reshape(2, 3)
    position = _numbers(data, "ImagePositionPatient", 3, path)
    lengths = np.linalg.norm(orientation, axis=1)
    if spacing.min() <= 0 or abs(lengths - 1).max() > 0.01 or abs(orientation[0] @ orientation[1]) > 0.01:
        raise VolumeError(
            f"{path} has pixel spacing {spacing.tolist()} and orientation {orientation.ravel().tolist()}, "
            "which is no right-angled grid; repair the header"
        )
    thickness = data.get("SpacingBetweenSlices") or data.get("SliceThickness") or 1.0
    return DicomSlice(
        path=path,
        series=str(data.get("SeriesInstanceUID", "") or ""),
        label=str(data.get("SeriesDescription", "") or ""),
        modality=modality,
        size=(int(data.Rows), int(data.Columns)),
        spacing_rows_columns=(float(spacing[0]), float(spacing[1])),
        thickness=abs(float(thickness)),
        position=position,
        orientation=orientation / lengths[:, None],
        localizer="LOCALIZER" in [str(part).upper() for part in (data.get("ImageType") or [])],
    )


def _numbers(data: Any, name: str, count: int, path: Path) -> np.ndarray:
    value = data.get(name)
    try:
        numbers = np.asarray([float(v) for v in value], dtype=np.float64)
    except (TypeError, ValueError):
        numbers = np.zeros(0)
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise VolumeError(
            f"{path} has {name} {value!r}, so its pixels have no place in space; export the series with its geometry"
        )
    return numbers


def _one_series(slices: Sequence[DicomSlice], source: Path) -> list[DicomSlice]:
    """The slices of the only series, scout views dropped; all of one size, spacing and orientation."""
    kept = [s for s in slices if not s.localizer] or list(slices)
    if not kept:
        raise VolumeError(f"{source} holds no DICOM image; give a directory or zip archive with one CT or MR series")
    series: dict[str, list[DicomSlice]] = defaultdict(list)
    for item in kept:
        series[item.series].append(item)
    if len(series) > 1:
        names = "; ".join(f"{uid or 'no UID'} ({items[0].label}, {len(items)} slices)" for uid, items in series.items())
        raise VolumeError(f"{source} holds {len(series)} series: {names}; keep one of them")
    first = kept[0]
    for item in kept:
        turned = abs(item.orientation - first.orientation).max() > 1e-3
        spacing = np.subtract(item.spacing_rows_columns, first.spacing_rows_columns)
        if turned or item.size != first.size or abs(spacing).max() > 1e-3:
            raise VolumeError(
                f"{item.path} differs from {first.path.name} in size, pixel spacing or orientation "
                f"({item.size} against {first.size}); keep the slices of one acquisition"
            )
    return kept


def _stack_step(slices: Sequence[DicomSlice], source: Path) -> np.ndarray:
    """Vector (3,) LPS mm from one slice to the next, checked to be the same everywhere and along the normal."""
    first = slices[0]
    if len(slices) == 1:
        return first.normal * first.thickness
    steps = np.diff(np.stack([s.position for s in slices]), axis=0)
    distances = steps @ first.normal
    middle = float(np.median(distances))
    if distances.min() < 1e-3:
        raise VolumeError(
            f"{source} holds several slices at one position (a time or phase series, or copies); keep one phase"
        )
    mean = (slices[-1].position - first.position) / (len(slices) - 1)
    tilt = math.degrees(math.atan2(float(np.linalg.norm(np.cross(mean, first.normal))), float(mean @ first.normal)))
    uneven = float(np.abs(distances - middle).max()) > max(0.1 * middle, 0.01)
    reasons = []
    if tilt > MAX_TILT_DEG:
        reasons.append(f"the gantry is tilted by {tilt:.1f} degrees")
    if uneven:
        reasons.append(
            f"slice distances vary from {distances.min():.2f} to {distances.max():.2f} mm (a missing slice?)"
        )
    if reasons:
        raise VolumeError(
            f"{source}: {' and '.join(reasons)}, so the slices are no straight even grid and a mask could not be "
            "placed; correct and resample the series (for example with dcm2niix) or complete it"
        )
    return mean


def _pixels(item: DicomSlice) -> np.ndarray:
    """Rescaled pixels (rows, columns) of one file."""
    try:
        image = sitk.ReadImage(str(item.path))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise VolumeError(
            f"{item.path} has no pixels that can be decoded ({reason}); export it uncompressed"
        ) from error
    pixels = sitk.GetArrayFromImage(image)
    if pixels.dtype.kind not in "iuf":
        raise VolumeError(f"{item.path} decodes to {pixels.dtype} pixels; give a CT or MR series")
    return np.asarray(pixels[0] if pixels.ndim == 3 else pixels)
