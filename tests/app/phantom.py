"""An asymmetric phantom in every axis order, as NIfTI, DICOM and what a viewer shows of it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from lib.dicom_objects import source_headers
from medvl_sam2.dicom_io import read_dicom_grid
from medvl_sam2.types import Geometry
from orthanc import WrittenSeries, write_series
from volume_files import turned

SHAPE = (7, 9, 5)
SPACING = (0.7, 1.1, 2.5)
ORDERS = [(axes, flips) for axes in itertools.permutations(range(3)) for flips in itertools.product((1, -1), repeat=3)]
"""All 48 ways to store one volume."""


@dataclass(frozen=True)
class Phantom:
    """``image`` and ``labels`` (I, J, K) on one grid, ``affine`` to RAS+ mm. No symmetry, no two sizes alike."""

    image: np.ndarray
    labels: np.ndarray
    affine: np.ndarray

    @property
    def geometry(self) -> Geometry:
        i, j, k = self.image.shape
        return Geometry((i, j, k), self.affine)

    def stored(self, axes: tuple[int, ...], flips: tuple[int, ...]) -> Phantom:
        """The same phantom in space with its axes permuted, then flipped."""
        to_old = np.zeros((4, 4))
        to_old[3, 3] = 1
        for new, (axis, flip) in enumerate(zip(axes, flips, strict=True)):
            to_old[axis, new] = flip
            to_old[axis, 3] = 0 if flip > 0 else self.image.shape[axis] - 1
        index = tuple(slice(None, None, flip) for flip in flips)
        return Phantom(self.image.transpose(axes)[index], self.labels.transpose(axes)[index], self.affine @ to_old)

    def displayed(self) -> Phantom:
        """As viewers stack its DICOM slices: by position along row x column, so a left-handed grid turns over."""
        if np.linalg.det(self.affine[:3, :3]) > 0:
            return self
        return self.stored((0, 1, 2), (1, 1, -1))

    def at(self, grid: Geometry, array: np.ndarray) -> np.ndarray:
        """Values of ``array`` on ``grid`` where this phantom's voxels lie, which must be voxel centres there."""
        index = np.stack(np.meshgrid(*(np.arange(n) for n in self.image.shape), indexing="ij"), axis=-1).reshape(-1, 3)
        voxels = grid.world_to_voxel(self.geometry.voxel_to_world(index))
        np.testing.assert_allclose(voxels, np.rint(voxels), atol=1e-3)
        i, j, k = np.rint(voxels).astype(int).T
        return array[i, j, k].reshape(self.image.shape)


def phantom(oblique: bool = True) -> Phantom:
    image = np.random.default_rng(5).integers(-1000, 1200, SHAPE).astype(np.int16)
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:3, 2:5, 1] = 5  # liver
    labels[1:2, 2:6, 2] = 5
    labels[4:6, 3:8, 3:5] = 2  # kidney_right
    labels[0, 0, 4] = 17  # lesion
    affine = np.eye(4)
    affine[:3, :3] = (turned() if oblique else np.eye(3)) * SPACING
    affine[:3, 3] = [11.0, -23.0, 31.0]
    return Phantom(image, labels, affine)


def write(folder: Path, one: Phantom, **tags: object) -> tuple[WrittenSeries, list[Dataset], Geometry]:
    """The phantom as a DICOM series: its files, their headers as stacked, and the grid they make."""
    series = write_series(folder, one.image, one.affine, **tags)
    grid = read_dicom_grid(series.files, folder)
    return series, source_headers(item.path for item in grid.slices), grid.geometry
