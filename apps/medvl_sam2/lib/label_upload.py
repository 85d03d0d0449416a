"""An uploaded label: is it one, and does it lie on the image's grid?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.result_writing import write_label_map
from lib.version_files import MASKS
from medvl_sam2.errors import GeometryError, VolumeError
from medvl_sam2.types import Geometry
from medvl_sam2.volume_io import count_labels, label_counts


@dataclass(frozen=True)
class CheckedLabel:
    """A label ``file`` with its ``extension`` and the ``voxels`` of each value but 0."""

    file: Path
    extension: str
    voxels: Mapping[int, int]


def is_raw(file: Path) -> bool:
    """Whether these are bare voxels; :func:`check_label` makes a file of its own of them, to be removed."""
    return file.name.endswith(".bin")


def check_label(image: str, file: Path, geometry: Geometry) -> CheckedLabel:
    """Check a label of ``image``; one that is good is stored byte for byte, only raw voxels get a file format.

    ``.bin`` is one byte a voxel, first axis fastest, on the image's grid.

    Raises:
        VolumeError: it is no label map. GeometryError: it lies on another grid.
    """
    if is_raw(file):
        return _raw(file, geometry)
    extension = next((known for known in MASKS if file.name.endswith(known)), None)
    if extension is None:
        raise VolumeError(f"label file of kind {''.join(file.suffixes) or 'unknown'}; use one of {MASKS} or .bin")
    try:
        voxels, grid = count_labels(file)
    except VolumeError as error:
        raise VolumeError(f"{str(error).replace(str(file), 'the label')}; nothing was saved") from error
    if grid.shape != geometry.shape:
        raise GeometryError(
            f"label of shape {grid.shape} does not fit image {image!r} of shape {geometry.shape}; nothing was saved: "
            "export the label on the grid of the image"
        )
    if not grid.matches(geometry, tolerance_mm=max(geometry.spacing)):
        raise GeometryError(
            f"label and image {image!r} have the same shape but lie apart in space by more than a voxel; nothing was "
            "saved: export the label with the orientation and origin of the image"
        )
    return CheckedLabel(file, extension, voxels)


def _raw(file: Path, geometry: Geometry) -> CheckedLabel:
    voxels = int(np.prod(geometry.shape))
    if file.stat().st_size != voxels:
        raise GeometryError(f"raw label has {file.stat().st_size} bytes, the image has {voxels} voxels")
    labels = np.fromfile(file, np.uint8).reshape(geometry.shape, order="F")
    made = write_label_map(labels, geometry, ".nii.gz", compress=True)
    return CheckedLabel(Path(made), ".nii.gz", label_counts(labels))
