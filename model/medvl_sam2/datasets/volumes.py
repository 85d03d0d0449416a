"""A manifest record as image, geometry and named masks.

Whatever the source stores, a case comes back in the package's own frames: stored voxels (I, J, K) with an affine to
RAS+ mm. Nothing is resampled but a mask whose grid differs from its image's, and no voxel is ever mirrored.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import sparse

from medvl_sam2.datasets.label_layers import LabelLayers, LayerBuilder, side_votes
from medvl_sam2.datasets.m3d_seg import mask_shape
from medvl_sam2.datasets.manifest import CaseRecord, Grid, ImageFile, LabelFile
from medvl_sam2.errors import DataError, VolumeError
from medvl_sam2.types import Geometry, Volume
from medvl_sam2.volume_io import Stated, read_mask, read_volume, volume_of

_ARRAYS = (".npy", ".npz")
_ARRAY_ERRORS = (OSError, EOFError, ValueError, KeyError, MemoryError, zipfile.BadZipFile)
_PICTURES = (".png", ".jpg", ".jpeg")
_LUMA = (0.299, 0.587, 0.114)  # grey of a colour picture, ITU-R BT.601
_DIRECTIONS = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
_MIRROR = np.diag([-1.0, 1.0, 1.0, 1.0])


@dataclass(frozen=True)
class LoadedCase:
    """A case in memory. ``labels`` is None where the record has none.

    ``sides_known``: left and right are stated by the source, or proven by labels that have a side. Where it is False,
    do not train on words or names with a side.
    """

    record: CaseRecord
    volume: Volume
    labels: LabelLayers | None
    sides_known: bool


def read_case(record: CaseRecord, root: Path) -> LoadedCase:
    """Read one case below ``root``.

    Labels with a side must lie on that side. Where the orientation was only assumed they decide it: the affine is
    mirrored, the voxels are not.

    Raises :class:`VolumeError` for a file that cannot be read, and :class:`DataError` for masks off the image's grid
    and for labels whose sides contradict the orientation the file states.
    """
    volume = _read_image(record, Path(root))
    labels = _read_labels(record, Path(root), volume.geometry) if record.labels else None
    votes = 0 if labels is None else side_votes(labels, volume.geometry)
    assumed = record.image.grid is not None and record.image.grid.assumed
    if votes < 0:
        if not assumed:
            raise DataError(
                f"case {record.id!r}: its left and right labels lie on the other side; image or labels are mirrored"
            )
        geometry = Geometry(volume.geometry.shape, _MIRROR @ volume.geometry.affine)
        volume = replace(volume, geometry=geometry)
    return LoadedCase(record, volume, labels, sides_known=not assumed or votes != 0)


def grid_affine(grid: Grid) -> np.ndarray:
    """Affine (4, 4) to RAS+ mm of a stated grid; its first voxel is the origin."""
    affine = np.eye(4)
    affine[:3, :3] = np.array([_DIRECTIONS[axis] for axis in grid.axes]).T * (grid.spacing or (1.0, 1.0, 1.0))
    return affine


def _read_image(record: CaseRecord, root: Path) -> Volume:
    file = record.image
    path = root / file.path
    affine = None if file.grid is None else grid_affine(file.grid)
    if path.suffix in _ARRAYS or path.is_dir():
        if affine is None:
            raise DataError(f"case {record.id!r}: {file.path} states no orientation; give its record a grid")
        array = _read_pictures(path) if path.is_dir() else _read_array(path, file)
        return volume_of(array, affine, path, record.modality)
    silent = affine is None and file.rescale is None and file.index is None
    return read_volume(path, record.modality, None if silent else Stated(affine, file.rescale, file.index))


def _read_array(path: Path, file: ImageFile) -> np.ndarray:
    """The 3D array (I, J, K) of a ``.npy`` or of a member of a ``.npz``."""
    try:
        array = np.load(path, allow_pickle=False) if path.suffix == ".npy" else _member(path, str(file.member))
        if file.index is not None:
            array = array[file.index]
    except (*_ARRAY_ERRORS, IndexError) as error:
        raise VolumeError(f"{path} is not a readable array ({error!r}); download or prepare it again") from error
    array = array[0] if array.ndim == 4 and array.shape[0] == 1 else array
    if array.ndim != 3 or array.dtype.kind not in "biuf":
        raise VolumeError(f"{path} holds {array.dtype} of shape {array.shape}; it must be one 3D grey image")
    return array


@lru_cache(maxsize=2)
def _member(path: Path, name: str) -> np.ndarray:
    """An array of a ``.npz``, kept because the next case is in it too."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return arrays[name]


def _read_pictures(folder: Path) -> np.ndarray:
    """Numbered pictures as grey slices: (slice, row, column) float32."""
    files = [path for path in folder.iterdir() if path.suffix.lower() in _PICTURES]
    if not files or not all(path.stem.isdecimal() for path in files):
        raise VolumeError(f"{folder} holds no pictures named by number (1.png, 2.png, ...)")
    slices = [_grey(path) for path in sorted(files, key=lambda path: int(path.stem))]
    shapes = sorted({array.shape for array in slices})
    if len(shapes) > 1:
        raise VolumeError(f"{folder} holds pictures of several sizes {shapes}; remove those that are no slice")
    return np.stack(slices)


def _grey(path: Path) -> np.ndarray:
    try:
        array = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).astype(np.float32)
    except RuntimeError as error:
        raise VolumeError(f"{path} is not a readable picture ({str(error).splitlines()[-1]})") from error
    return array if array.ndim == 2 else array[..., :3] @ np.array(_LUMA, dtype=np.float32)


def _read_labels(record: CaseRecord, root: Path, geometry: Geometry) -> LabelLayers:
    builder = LayerBuilder(geometry.shape, record.label_names)
    for file in record.labels:
        for name, voxels in _voxels(root / file.path, file, geometry):
            builder.add(voxels, name)
    return builder.built()


def _voxels(path: Path, file: LabelFile, geometry: Geometry) -> Iterator[tuple[str, np.ndarray]]:
    """Every name of a label file with the flat indices (C order in I, J, K) of its voxels on ``geometry``."""
    if path.suffix == ".npz":
        rows = _sparse_rows(path, geometry)
        if max(file.names) > rows.shape[0]:
            raise DataError(f"{path} holds {rows.shape[0]} classes, the record names {max(file.names)}")
        for value, name in file.names.items():
            row = rows[value - 1]
            yield name, row.indices[row.data != 0]
        return
    if path.suffix == ".npy":
        labels = _read_array(path, ImageFile(file.path))
        if labels.shape != geometry.shape:
            raise DataError(f"{path} of shape {labels.shape} is not on the image grid {geometry.shape}")
    else:
        labels, _ = read_mask(path, geometry)
    for value, name in file.names.items():
        yield name, np.flatnonzero(labels == value)


def _sparse_rows(path: Path, geometry: Geometry) -> sparse.csr_matrix:
    """M3D-Seg's masks: (C, I*J*K) with one row a class."""
    shape = mask_shape(path.name)
    if shape[1:] != geometry.shape:
        raise DataError(f"{path.name} is not on the image grid {geometry.shape}")
    try:
        with path.open("rb") as file:
            rows = sparse.load_npz(file).tocsr()
    except _ARRAY_ERRORS as error:
        raise VolumeError(f"{path} is not a readable sparse matrix ({error!r}); download it again") from error
    if rows.shape != (shape[0], int(np.prod(shape[1:]))):
        raise DataError(f"{path} holds a matrix of shape {rows.shape}, its name says {shape}")
    return rows
