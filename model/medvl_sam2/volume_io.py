"""Volumes and masks from and to files, on the grid the file states.

Reads NIfTI (.nii, .nii.gz, .hdr/.img pair), NRRD, MetaImage and one DICOM series (directory, zip archive, file).
What cannot be placed in space or is not one 3D grey image raises :class:`~medvl_sam2.errors.VolumeError` with the
reason; nothing is guessed silently. Voxels that are NaN or infinite become air (-1024 HU) in CT and 0 elsewhere.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from isal import igzip, isal_zlib
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from medvl_sam2.dicom_io import MAX_TILT_DEG, is_dicom, read_dicom_directory, read_dicom_files, read_dicom_zip
from medvl_sam2.errors import GeometryError, VolumeError
from medvl_sam2.geometry import resample_to
from medvl_sam2.intensity import guess_modality, replace_non_finite
from medvl_sam2.types import Geometry, Modality, Volume

_NIFTI = (".nii", ".nii.gz", ".hdr", ".img")
_ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
_KINDS = ".nii, .nii.gz, .nrrd, .mha, .dcm, a zip archive or directory with one DICOM series"
_UNPACKING: type[Exception] = isal_zlib.error  # type: ignore[assignment]  # its stub calls the class an instance
_UNREADABLE = (OSError, EOFError, ValueError, OverflowError, MemoryError, zlib.error, _UNPACKING)
_NIFTI_ERRORS = (*_UNREADABLE, ImageFileError, HeaderDataError)
_PIECE = 1 << 18
"""Bytes of a large file worked on at a time; fits the processor's cache."""
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Stated:
    """What a data set's table says about a NIfTI file whose header is silent or wrong.

    ``affine`` (4, 4), stored voxel to RAS+ mm, replaces the header's. ``rescale`` (slope, intercept) turns stored
    values into HU. ``frame``: the one entry of the fourth axis that is meant.
    """

    affine: np.ndarray | None = None
    rescale: tuple[float, float] | None = None
    frame: int | None = None


def read_volume(path: Path | str, modality: Modality | None = None, stated: Stated | None = None) -> Volume:
    """Read one 3D image: stored array (I, J, K) as int16 where that is exact, else float32; affine to RAS+ mm.

    ``modality`` overrides what the DICOM header says or the values suggest (see ``intensity.guess_modality``);
    ``stated`` (NIfTI only) what the header says.

    Raises :class:`VolumeError`: missing or broken file, unknown kind, 4D, colour or complex voxels, no content,
    no orientation in the header, axes more than 2 degrees off a right angle, tilted or uneven DICOM slices.
    """
    path = Path(path)
    array, affine, hint = _read(path, stated)
    if stated is not None and stated.rescale is not None:
        slope, intercept = stated.rescale
        array = array * np.float32(slope) + np.float32(intercept)
    return volume_of(array, affine, path, modality or guess_modality(array, hint))


def read_geometry(path: Path | str) -> Geometry:
    """Grid of an image; of a NIfTI file only the header is read.

    Raises :class:`VolumeError` as :func:`read_volume`, for what was read.
    """
    path = Path(path)
    if not path.is_file() or _suffix(path) not in _NIFTI:
        return read_volume(path).geometry
    image = _open_nifti(path, Stated())
    return _geometry(_shape3(image.shape, path), np.asarray(image.affine, dtype=np.float64), path)


def volume_of(array: np.ndarray, affine: np.ndarray, path: Path, kind: Modality) -> Volume:
    """A volume from an array (I, J, K) and its affine to RAS+ mm; ``path`` is where it came from.

    Raises :class:`VolumeError` as :func:`read_volume`: no content, not one finite voxel, axes not at right angles.
    """
    geometry = _geometry(array.shape, affine, path)
    try:
        array = _compact(replace_non_finite(array, kind))
    except VolumeError as error:
        raise VolumeError(f"{path}: {error}") from error
    if array.min() == array.max():
        raise VolumeError(f"{path} is empty: every voxel is {array.flat[0]}; export the image again")
    return Volume(array, geometry, kind, path)


def read_mask(path: Path | str, like: Geometry | None = None) -> tuple[np.ndarray, Geometry]:
    """Read a label map (I, J, K) uint16 and its grid; with ``like``, placed on that grid by the affines.

    Raises :class:`VolumeError` as :func:`read_volume`, and for values that are no labels or a mask beside ``like``.
    """
    labels, geometry = read_labels(path)
    labels = labels.astype(np.uint16, copy=False)
    if like is None:
        return labels, geometry
    placed = resample_to(labels, geometry, like)
    if labels.any() and not placed.any():
        raise VolumeError(f"{path} does not meet the image in space; give the mask that belongs to the image")
    return placed, like


def read_labels(path: Path | str) -> tuple[np.ndarray, Geometry]:
    """As :func:`read_mask` on its own grid, but uint8 where the file has that: half the memory and time."""
    path = Path(path)
    array, affine, _ = _read(path)
    geometry = _geometry(array.shape, affine, path)
    labels = _labels(array)
    if labels is None:
        raise VolumeError(f"{path} is not a label map: values must be whole numbers from 0 to 65535")
    return labels, geometry


def count_labels(path: Path | str) -> tuple[dict[int, int], Geometry]:
    """Voxels of every value but 0 in a label map, and its grid.

    A gzipped NIfTI file of small unsigned integers, which is what clients send, passes through in pieces that stay in
    the processor's cache: a third of the time of reading and counting it, or less. To its very end, so that its
    checksum is verified.

    Raises :class:`VolumeError` as :func:`read_mask`.
    """
    path = Path(path)
    if path.exists() and _suffix(path) == ".nii.gz":
        image = _open_nifti(path, Stated())
        dtype, proxy = image.get_data_dtype(), image.dataobj
        small = dtype.kind == "u" and dtype.itemsize <= 2
        if small and isinstance(proxy, ArrayProxy) and (proxy.slope, proxy.inter) == (1.0, 0.0):
            geometry = _geometry(_shape3(image.shape, path), np.asarray(image.affine, dtype=np.float64), path)
            return _count_pieces(path, proxy.offset, int(np.prod(geometry.shape)), dtype), geometry
    labels, geometry = read_labels(path)
    return label_counts(labels), geometry


def label_counts(labels: np.ndarray) -> dict[int, int]:
    """Voxels of every value but 0 in an array of unsigned integers."""
    flat = labels.ravel(order="K")
    counts = np.bincount(flat[flat != 0])
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}


def write_mask(path: Path | str, mask: np.ndarray, geometry: Geometry) -> None:
    """Write labels (I, J, K) as uint8 on ``geometry`` to ``.nrrd`` (gzip, LPS space, same voxel order) or NIfTI.

    The file appears whole or not at all. Raises :class:`VolumeError` for another suffix, a mask off the grid, or
    labels beyond 255.
    """
    path = Path(path)
    suffix = _suffix(path)
    if suffix not in (".nrrd", ".nii", ".nii.gz"):
        raise VolumeError(f"cannot write a mask to {path.name}; use .nrrd, .nii or .nii.gz")
    mask = np.asarray(mask)
    if tuple(mask.shape) != geometry.shape:
        raise VolumeError(f"mask of shape {mask.shape} is not on the image grid {geometry.shape}")
    if mask.dtype.kind not in "biu" or int(mask.min()) < 0 or int(mask.max()) > 255:
        raise VolumeError(f"mask of {mask.dtype} values {mask.min()}..{mask.max()} must be whole labels from 0 to 255")
    labels = mask.astype(np.uint8)
    if not path.parent.is_dir():
        raise VolumeError(f"directory {path.parent} does not exist; create it first")
    handle, name = tempfile.mkstemp(suffix=suffix, prefix=".mask-", dir=path.parent)
    os.close(handle)
    try:
        if suffix == ".nrrd":
            sitk.WriteImage(_sitk_image(labels, geometry), name, useCompression=True)
        else:
            image = nib.Nifti1Image(labels, geometry.affine)
            image.set_sform(geometry.affine, code=1)
            image.set_qform(geometry.affine, code=1)
            nib.save(image, name)
        os.chmod(name, 0o644)  # mkstemp makes it private, a viewer may run as another user
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _read(path: Path, stated: Stated | None = None) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Stored array (I, J, K), affine to RAS+ mm, and the DICOM modality if the file states one."""
    if not path.exists():
        raise VolumeError(f"{path} does not exist; check the path")
    suffix = _suffix(path)
    if stated is not None and suffix not in _NIFTI:
        raise VolumeError(f"{path.name} is no NIfTI file; only there may a table stand in for the header")
    if path.is_dir() or suffix in (".zip", ".dcm") or (suffix not in (*_NIFTI, *_ITK) and is_dicom(path)):
        if path.is_dir():
            stack = read_dicom_directory(path)
        elif suffix == ".zip":
            stack = read_dicom_zip(path)
        else:
            stack = read_dicom_files([path], path)
        return stack.array, stack.affine, stack.modality or None
    if suffix in _NIFTI:
        return (*_read_nifti(path, stated or Stated()), None)
    if suffix in _ITK:
        return (*_read_itk(path), None)
    raise VolumeError(f"{path.name} is of no kind that can be read; give {_KINDS}")


def _read_nifti(path: Path, stated: Stated) -> tuple[np.ndarray, np.ndarray]:
    try:
        image = _open_nifti(path, stated)
        source = image.dataobj
        if stated.frame is not None:
            source = _frame(image, stated.frame, path)
        shape = _shape3(tuple(int(n) for n in source.shape), path)
        array = np.asarray(source).reshape(shape)
    except _NIFTI_ERRORS as error:
        raise VolumeError(f"{path} is not a readable NIfTI file ({error}); export it again") from error
    return array, np.asarray(image.affine if stated.affine is None else stated.affine, dtype=np.float64)


def _open_nifti(path: Path, stated: Stated) -> nib.Nifti1Pair:
    """The file's header, checked; voxels are not read."""
    try:
        image = nib.load(path)
        if not isinstance(image, (nib.Nifti1Pair, nib.Nifti2Pair)):
            raise VolumeError(f"{path} is an Analyze file, which states no orientation; convert it to NIfTI")
        unplaced = int(image.header["sform_code"]) == 0 and int(image.header["qform_code"]) == 0
        if unplaced and stated.affine is None:
            raise VolumeError(
                f"{path} states no orientation (sform and qform code are 0), so left and right are unknown; set one"
            )
        dtype = image.get_data_dtype()
        if dtype.kind not in "iuf":
            raise VolumeError(f"{path} has {dtype} voxels (colour or complex); give one grey value a voxel")
    except _NIFTI_ERRORS as error:
        raise VolumeError(f"{path} is not a readable NIfTI file ({error}); export it again") from error
    return image


def _count_pieces(path: Path, offset: int, voxels: int, dtype: np.dtype) -> dict[int, int]:
    """Voxels of every value but 0 behind the header of a gzipped file."""
    counts, left = np.zeros(65536, np.int64), voxels * dtype.itemsize
    try:
        with igzip.open(path) as file:
            file.seek(offset)
            while left:
                piece = file.read(min(left, _PIECE))
                if not piece:
                    raise EOFError(f"{left} bytes of its voxels are missing")
                left -= len(piece)
                flat = np.frombuffer(piece, dtype, len(piece) // dtype.itemsize)
                found = np.bincount(flat[flat != 0])
                counts[: len(found)] += found
            while file.read(_PIECE):  # to the end, where the checksum is
                pass
    except _NIFTI_ERRORS as error:
        raise VolumeError(f"{path} is not a readable NIfTI file ({error}); export it again") from error
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}


def _frame(image: nib.Nifti1Pair, frame: int, path: Path) -> np.ndarray:
    """One entry (I, J, K) of the fourth axis."""
    if len(image.shape) != 4 or not 0 <= frame < image.shape[3]:
        raise VolumeError(f"{path} of shape {image.shape} has no frame {frame}; give a 4D file or another frame")
    return np.asarray(image.dataobj[..., frame])


def _read_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        size = tuple(int(n) for n in reader.GetSize())
        shape = _shape3(size, path)
        kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
        if reader.GetNumberOfComponents() != 1 or "complex" in kind or "vector" in kind:
            raise VolumeError(f"{path} has {kind} voxels; give one grey value a voxel")
        if _suffix(path) in (".nrrd", ".nhdr") and not reader.HasMetaDataKey("NRRD_space"):
            raise VolumeError(f"{path} states no space, so left and right are unknown; add a 'space' field")
        image = reader.Execute()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise VolumeError(f"{path} is not a readable image ({reason}); export it again") from error
    rank = len(size)
    affine = np.eye(4)
    direction = np.asarray(image.GetDirection()).reshape(rank, rank)[:3, :3]
    used = min(rank, 3)
    affine[:used, :used] = direction * np.asarray(image.GetSpacing())[:used]
    affine[:used, 3] = np.asarray(image.GetOrigin())[:used]
    return sitk.GetArrayFromImage(image).T.reshape(shape), _LPS @ affine


def _labels(array: np.ndarray) -> np.ndarray | None:
    """The array as uint16, or as it is if that is uint8; None when a value would change."""
    if array.dtype.kind == "u" and array.dtype.itemsize <= 2:
        return array
    if not np.isfinite(array).all() or array.min() < 0 or array.max() >= 65536:
        return None
    labels = array.astype(np.uint16)
    return labels if np.array_equal(labels, array) else None


def _sitk_image(labels: np.ndarray, geometry: Geometry) -> sitk.Image:
    image = sitk.GetImageFromArray(np.ascontiguousarray(labels.T))
    affine = _LPS @ geometry.affine
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / np.asarray(geometry.spacing)).ravel().tolist())
    return image


def _shape3(shape: tuple[int, ...], path: Path) -> tuple[int, int, int]:
    """The three sizes of a 2D or 3D image, or of one whose further axes hold one entry each."""
    if len(shape) < 2 or any(n < 1 for n in shape):
        raise VolumeError(f"{path} has shape {shape}, which holds no image; export it again")
    if len(shape) > 3 and any(n != 1 for n in shape[3:]):
        raise VolumeError(f"{path} has shape {shape}: {len(shape)}D, a time or channel series; save one 3D frame of it")
    i, j, k = (*shape, 1)[:3]
    return i, j, k


def _geometry(shape: tuple[int, ...], affine: np.ndarray, path: Path) -> Geometry:
    """The grid, refused when its axes are not at right angles."""
    i, j, k = shape
    try:
        geometry = Geometry((i, j, k), affine)
    except GeometryError as error:
        raise VolumeError(f"{path}: {error}") from error
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosines = np.abs((axes.T @ axes)[np.triu_indices(3, 1)])
    skew = float(np.degrees(np.arcsin(min(1.0, float(cosines.max())))))
    if skew > MAX_TILT_DEG:
        raise VolumeError(
            f"{path} has a sheared grid (axes {skew:.1f} degrees off a right angle), which viewers and mask formats "
            "do not keep; resample it to a right-angled grid"
        )
    return geometry


def _compact(array: np.ndarray) -> np.ndarray:
    """int16 where every value survives it, else float32."""
    bounds = np.iinfo(np.int16)
    low, high = array.min(), array.max()
    if bounds.min <= low and high <= bounds.max:
        small = array.astype(np.int16)
        if array.dtype.kind in "iu" or np.array_equal(small, array):
            return small
    return array.astype(np.float32)


def _suffix(path: Path) -> str:
    """Lower-case suffix, ``.nii.gz`` as one."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix
