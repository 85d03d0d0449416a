"""DICOM SEG to a label map on an image's grid: frames by position, segments by name.

Whoever wrote the object: frames may come in any order, cover part of the volume or lie on another grid; segments are
numbered as their writer pleased (OHIF: alphabetically). A name the vocabulary knows gets its value, every other name
the next free value, in alphabetical order; equal names are one structure. Where segments overlap the one with the
higher number wins, and the loss is reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from pydicom.dataset import Dataset

from lib.dicom_codes import segment_name
from medvl_sam2.errors import DataError, GeometryError
from medvl_sam2.geometry import resample_to
from medvl_sam2.types import Geometry
from medvl_sam2.vocabulary import CLASSES

_MAX_VALUE = 255
_ALIGNED_VOXELS = 0.05
"""How far off a voxel's centre a frame may lie and still be taken for that voxel's slice."""
_GROUPS = (
    "PlaneOrientationSequence", "PixelMeasuresSequence", "PlanePositionSequence", "SegmentIdentificationSequence",
)  # fmt: skip
_TO_RAS = np.diag([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class SegLabels:
    """``mask`` (I, J, K) uint8 on the image's grid, ``names`` by value, and what a person should know."""

    mask: np.ndarray
    names: dict[int, str]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Frame:
    """``origin`` (3,) of the first pixel and ``axes`` (3, 2), the step to the next column and row, in RAS+ mm."""

    index: int
    segment: int
    origin: np.ndarray
    axes: np.ndarray


def read_segmentation(document: Dataset, geometry: Geometry) -> SegLabels:
    """The label map of a DICOM SEG on ``geometry``.

    Raises:
        DataError: no SEG, no pixels, a kind that cannot be read, or more than 255 structures.
        GeometryError: frames without a place, or a place that is not the image's.
    """
    names, value_of = _values(document)
    frames = sorted(_frames(document), key=lambda frame: frame.segment)
    pixels = _Pixels(document)
    inverse = np.linalg.inv(geometry.affine)
    if all(_is_aligned(frame, inverse) for frame in frames):
        mask, warnings = _paint(frames, pixels, value_of, geometry)
    else:
        grid = _own_grid(frames, document, geometry)
        own, warnings = _paint(frames, pixels, value_of, grid)
        mask = resample_to(own, grid, geometry)
        warnings.append("the segmentation lies on another grid and was resampled to the image's")
    if not mask.any():
        raise GeometryError("the segmentation has no voxel inside the image; it belongs to another series")
    if document.SegmentationType == "FRACTIONAL":
        warnings.append("fractions of at least one half were taken as inside")
    return SegLabels(mask, names, tuple(warnings))


def _values(document: Dataset) -> tuple[dict[int, str], dict[int, int]]:
    """Name of each mask value in use, and mask value of each segment number."""
    segments = document.get("SegmentSequence")
    if document.get("Modality") != "SEG" or not segments:
        raise DataError("the object is no DICOM SEG with segments")
    name_of = {int(item.SegmentNumber): segment_name(item) for item in segments}
    unknown = sorted({name for name in name_of.values() if name not in CLASSES}, key=str.casefold)
    values = {name: value for value, name in enumerate([*CLASSES, *unknown], start=1)}
    used = {values[name]: name for name in name_of.values()}
    if max(used) > _MAX_VALUE:
        raise DataError(f"{len(unknown)} structures outside the vocabulary do not fit {_MAX_VALUE} values; split it")
    return dict(sorted(used.items())), {number: values[name] for number, name in name_of.items()}


class _Pixels:
    """Frames one by one, so that many segments need the memory of one frame.

    Bits of a frame begin where those of the frame before end, also within a byte (PS3.5 section 8.1.1).
    """

    def __init__(self, document: Dataset) -> None:
        kind = document.get("SegmentationType", "missing")
        if kind not in ("BINARY", "FRACTIONAL") or "PixelData" not in document:
            raise DataError(f"segmentation type {kind} cannot be read; export it as binary DICOM SEG")
        syntax = getattr(getattr(document, "file_meta", None), "TransferSyntaxUID", None)
        if kind == "BINARY" and syntax is not None and syntax.is_encapsulated:
            raise DataError(f"binary segmentations compressed as {syntax.name} cannot be read; export it uncompressed")
        self._shape = (int(document.Rows), int(document.Columns))
        self._bits = np.frombuffer(document.PixelData, np.uint8) if kind == "BINARY" else None
        # Fractions are rare; pydicom decodes them whole, also compressed ones.
        self._fractions = None if kind == "BINARY" else document.pixel_array.reshape(-1, *self._shape)
        self._least = float(document.get("MaximumFractionalValue", 1)) / 2

    def frame(self, index: int) -> np.ndarray:
        """Inside or not, bool (rows, columns)."""
        if self._bits is None:
            return np.asarray(self._fractions[index] >= self._least)
        count = self._shape[0] * self._shape[1]
        first, offset = divmod(index * count, 8)
        bits = np.unpackbits(self._bits[first : (index * count + count + 7) // 8], bitorder="little")
        return bits[offset : offset + count].astype(bool).reshape(self._shape)


def _frames(document: Dataset) -> Iterator[_Frame]:
    shared = (document.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    for index, own in enumerate(document.get("PerFrameFunctionalGroupsSequence") or []):
        found = {name: own.get(name) or shared.get(name) for name in _GROUPS}
        missing = [name for name, value in found.items() if not value]
        if missing:
            raise GeometryError(f"frame {index + 1} has no {missing[0]}, so it has no place; export it again")
        orientation, measures, position, segment = (found[name][0] for name in _GROUPS)
        rows_columns = np.array(orientation.ImageOrientationPatient, float).reshape(2, 3)
        down, across = (float(v) for v in measures.PixelSpacing)
        axes = _TO_RAS @ (rows_columns * [[across], [down]]).T
        origin = _TO_RAS @ np.array(position.ImagePositionPatient, float)
        yield _Frame(index, int(segment.ReferencedSegmentNumber), origin, axes)


def _is_aligned(frame: _Frame, inverse: np.ndarray) -> bool:
    """True when the frame's pixels are voxels of the image: whole steps, on whole places."""
    steps = inverse[:3, :3] @ frame.axes
    start = inverse[:3, :3] @ frame.origin + inverse[:3, 3]
    units = np.rint(steps)
    whole = np.abs(steps - units).max() < 1e-3 and (np.abs(units).sum(axis=0) == 1).all()
    return bool(whole and np.abs(start - np.rint(start)).max() < _ALIGNED_VOXELS)


def _paint(
    frames: Sequence[_Frame], pixels: _Pixels, value_of: dict[int, int], grid: Geometry
) -> tuple[np.ndarray, list[str]]:
    """Write every frame into a mask on ``grid``, which its pixels are voxels of."""
    mask = np.zeros(grid.shape, np.uint8)
    inverse = np.linalg.inv(grid.affine)
    outside = overlap = 0
    for frame in frames:
        value = value_of.get(frame.segment)
        if value is None:
            raise DataError(f"frame {frame.index + 1} belongs to segment {frame.segment}, which is not described")
        row, column = np.nonzero(pixels.frame(frame.index))
        steps = np.rint(inverse[:3, :3] @ frame.axes).astype(np.int64)
        start = np.rint(inverse[:3, :3] @ frame.origin + inverse[:3, 3]).astype(np.int64)
        voxels = start[:, None] + steps @ np.stack([column, row])
        inside = ((voxels >= 0) & (voxels < np.array(grid.shape)[:, None])).all(axis=0)
        outside += int((~inside).sum())
        i, j, k = voxels[:, inside]
        before = mask[i, j, k]
        overlap += int(((before != 0) & (before != value)).sum())
        mask[i, j, k] = value
    warnings = []
    if overlap:
        warnings.append(f"segments overlap in {overlap} voxels; the one with the higher number was kept there")
    if outside:
        warnings.append(f"{outside} voxels lie outside the image and were dropped")
    return mask, warnings


def _own_grid(frames: Sequence[_Frame], document: Dataset, image: Geometry) -> Geometry:
    """The grid the frames of a SEG span; slices without a frame are part of it."""
    first = frames[0]
    if any(np.abs(frame.axes - first.axes).max() > 1e-3 for frame in frames):
        raise GeometryError("frames of the segmentation differ in orientation or pixel size; export it again")
    normal = np.cross(first.axes[:, 0], first.axes[:, 1])
    normal /= np.linalg.norm(normal)
    offsets = np.array([(frame.origin - first.origin) @ normal for frame in frames])
    beside = np.array([frame.origin - first.origin for frame in frames]) - offsets[:, None] * normal
    if np.abs(beside).max() > 1e-2:
        raise GeometryError("frames of the segmentation are shifted against each other; export it again")
    places = np.unique(np.round(offsets, 3))
    step = float(np.diff(places).min()) if len(places) > 1 else _thickness(document, image)
    indices = (places - places[0]) / step
    if np.abs(indices - np.rint(indices)).max() > _ALIGNED_VOXELS:
        raise GeometryError("slices of the segmentation lie unevenly and beside those of the image; export it again")
    count = round(indices[-1]) + 1
    affine = np.eye(4)
    affine[:3, :2], affine[:3, 2] = first.axes, normal * step
    affine[:3, 3] = first.origin + places[0] * normal
    return Geometry((int(document.Columns), int(document.Rows), count), affine)


def _thickness(document: Dataset, image: Geometry) -> float:
    shared = (document.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    measures = (shared.get("PixelMeasuresSequence") or [Dataset()])[0]
    stated = measures.get("SpacingBetweenSlices") or measures.get("SliceThickness")
    return float(stated) if stated else max(image.spacing)
