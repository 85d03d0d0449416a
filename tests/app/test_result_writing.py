"""Masks as files: the same bytes whatever order they lie in memory in, read back by other programs on the same grid."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from lib.result_writing import write_label_map
from medvl_sam2.types import Geometry

SHAPE = (150, 7, 31)
"""More than two of the blocks that are turned at a time, and a part of one."""


def _grid() -> Geometry:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", (20, -35, 70), degrees=True).as_matrix() @ np.diag([0.7, 1.3, 2.9])
    affine[:3, 3] = (-40.0, 25.0, 310.0)
    return Geometry(SHAPE, affine)


@pytest.mark.parametrize("extension", [".nrrd", ".nii.gz"])
@pytest.mark.parametrize("compress", [True, False])
def test_memory_order_makes_no_difference(extension: str, compress: bool) -> None:
    mask = np.random.default_rng(3).integers(0, 200, SHAPE).astype(np.uint8)
    wide = np.zeros((300, 7, 31), np.uint8)
    wide[::2] = mask
    orders = mask, np.asfortranarray(mask), wide[::2], mask.astype(np.int64)
    contents = []
    for labels in orders:
        path = Path(write_label_map(labels, _grid(), extension, compress))
        contents.append(_read(path))
        path.unlink()
    for voxels, affine in contents:
        assert (voxels == mask).all()
        assert np.allclose(affine, _grid().affine, atol=1e-4)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels and voxel to RAS+ mm, by a library that did not write the file."""
    if path.name.endswith(".nii.gz"):
        image = nib.load(path)
        return np.asarray(image.dataobj), image.affine
    read = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.array(read.GetDirection()).reshape(3, 3) @ np.diag(read.GetSpacing())
    affine[:3, 3] = read.GetOrigin()
    return sitk.GetArrayFromImage(read).T, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
