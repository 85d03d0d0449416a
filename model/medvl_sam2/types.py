"""Typed records that cross module borders.

Frames used everywhere in this package:

* **stored voxel** ``(i, j, k)``: index into the array exactly as the file (or ITK) orders it, ``i`` fastest.
  Clients speak this frame; masks go back on this grid.
* **world**: RAS+ millimetres (NIfTI convention), reached from stored voxels through a 4x4 affine.
* **canonical voxel** ``(z, y, x)``: the stored array with axes permuted and flipped (never resampled) so that
  ``z`` grows to Superior, ``y`` to Posterior and ``x`` to the patient's Left. The model works in this frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

import numpy as np

from medvl_sam2.errors import GeometryError, PromptError
from medvl_sam2.strokes import Plane, Stroke

MAX_POINTS = 1_000
MAX_STROKES = 200


class Modality(StrEnum):
    """Decides the intensity mapping: CT is windowed in HU, everything else by percentiles."""

    CT = "CT"
    MR = "MR"
    OTHER = "OTHER"


@dataclass(frozen=True)
class Geometry:
    """A voxel grid in space: ``shape`` (I, J, K) and ``affine`` (4, 4), stored voxel to RAS+ mm."""

    shape: tuple[int, int, int]
    affine: np.ndarray

    def __post_init__(self) -> None:
        affine = np.asarray(self.affine, dtype=np.float64)
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise GeometryError(f"shape {self.shape} is not a 3D grid; give three positive sizes (I, J, K)")
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise GeometryError(f"affine {affine.tolist()} is not an invertible 4x4 matrix; repair the image header")
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "affine", affine)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel edge lengths in mm along (i, j, k)."""
        edges = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(edges[0]), float(edges[1]), float(edges[2])

    def voxel_to_world(self, points: np.ndarray) -> np.ndarray:
        """Stored voxel (N, 3) to RAS+ mm (N, 3). Inverse: :meth:`world_to_voxel`."""
        return np.asarray(points, dtype=np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def world_to_voxel(self, points: np.ndarray) -> np.ndarray:
        """RAS+ mm (N, 3) to stored voxel (N, 3), not rounded. Inverse of :meth:`voxel_to_world`."""
        offset = np.asarray(points, dtype=np.float64) - self.affine[:3, 3]
        return offset @ np.linalg.inv(self.affine[:3, :3]).T

    def matches(self, other: Geometry, tolerance_mm: float = 1e-2) -> bool:
        """True when both grids put every voxel at the same place (corner distance below ``tolerance_mm``)."""
        if self.shape != other.shape:
            return False
        corner = np.array([[0, 0, 0], [self.shape[0] - 1, self.shape[1] - 1, self.shape[2] - 1]])
        return bool(np.abs(self.voxel_to_world(corner) - other.voxel_to_world(corner)).max() < tolerance_mm)


@dataclass(frozen=True)
class Volume:
    """An image: ``array`` (I, J, K) in stored order (HU for CT), its geometry and modality."""

    array: np.ndarray
    geometry: Geometry
    modality: Modality
    source: Path | None = None

    def __post_init__(self) -> None:
        if tuple(self.array.shape) != self.geometry.shape:
            raise GeometryError(f"array shape {self.array.shape} differs from geometry shape {self.geometry.shape}")


@dataclass(frozen=True)
class Prompt:
    """What an annotator asks for. All coordinates are stored voxels (i, j, k).

    ``points`` (N, 3) with ``labels`` (N,): 1 foreground, 0 background, in the order they were placed.
    ``box`` (2, 3): lowest and highest stored voxel, both inclusive; it may reach beyond the volume. One voxel thick
    along one axis, it bounds the object's outline on that plane, and how far the object goes beyond the plane is found.
    ``mask`` (I, J, K) bool on the stored grid: an earlier mask to start from.
    ``text``: free text naming the object; its mask is the one to start from when there is neither mask nor box.
    ``strokes``: scribbles and lassos in the order they were drawn. Where edits contradict each other the last one wins:
    those that an object has already came before those that are new, and of the new ones points come before strokes.
    ``accepted``: planes that stay as they are until something is placed on them; with the first prompt they stay as its
    answer shows them.
    ``propagate``: afterwards carry everything prompted through the whole object again; without it an edit stays local.
    """

    points: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))
    labels: np.ndarray = field(default_factory=lambda: np.zeros((0,), dtype=np.int64))
    box: np.ndarray | None = None
    mask: np.ndarray | None = None
    text: str | None = None
    strokes: tuple[Stroke, ...] = ()
    accepted: tuple[Plane, ...] = ()
    propagate: bool = False

    @property
    def names_only(self) -> bool:
        """True when nothing is placed in the volume."""
        return len(self.points) == 0 and self.box is None and self.mask is None and not self.strokes

    def well_formed(self) -> Prompt:
        """Return self with arrays normalised, or raise :class:`PromptError` for what is wrong in any volume."""
        if len(self.points) > MAX_POINTS or len(self.strokes) > MAX_STROKES:
            given = f"{len(self.points)} points and {len(self.strokes)} strokes"
            raise PromptError(f"{given}; give at most {MAX_POINTS} and {MAX_STROKES}")
        points = np.asarray(self.points, dtype=np.float64).reshape(-1, 3)
        labels = np.asarray(self.labels, dtype=np.int64).reshape(-1)
        if len(points) != len(labels):
            raise PromptError(f"{len(points)} points but {len(labels)} labels; give one label (1 or 0) a point")
        if len(points) and not np.isin(labels, (0, 1)).all():
            raise PromptError(f"point labels {sorted(set(labels.tolist()))} must be 1 (object) or 0 (background)")
        if not np.isfinite(points).all():
            raise PromptError("a point is not finite, so it lies outside the volume; give voxel numbers")
        box = self.box
        if box is not None:
            box = np.asarray(box, dtype=np.float64)
            if box.shape != (2, 3) or not np.isfinite(box).all():
                raise PromptError(f"box {np.asarray(self.box).tolist()} must be two corners (2, 3) of finite numbers")
            if (box[0] > box[1]).any():
                raise PromptError(f"box {box.tolist()} is inverted; give its lowest voxel first, then its highest")
        return replace(
            self, points=points, labels=labels, box=box, strokes=tuple(s.well_formed() for s in self.strokes)
        )

    def validated(self, shape: tuple[int, int, int]) -> Prompt:
        """Return self with arrays normalised, or raise :class:`PromptError` naming the value that does not fit."""
        whole = self.well_formed()
        upper = np.asarray(shape, dtype=np.float64)
        outside = np.flatnonzero(((whole.points < -0.5) | (whole.points > upper - 0.5)).any(axis=1))
        if len(outside):
            worst = whole.points[outside[0]].tolist()
            raise PromptError(f"point {worst} lies outside the volume of {shape} voxels (index from 0)")
        box = whole.box
        if box is not None and ((box[1] < 0).any() or (box[0] > upper - 1).any()):
            raise PromptError(f"box {box.tolist()} lies outside the volume of {shape} voxels")
        mask = self.mask
        if mask is not None:
            mask = np.asarray(mask)
            if tuple(mask.shape) != tuple(shape):
                raise PromptError(f"mask of shape {mask.shape} does not fit the image of shape {shape}")
            mask = mask > 0
        strokes = tuple(stroke.within(shape) for stroke in whole.strokes)
        accepted = tuple(dict.fromkeys(plane.within(shape) for plane in self.accepted))
        return replace(whole, mask=mask, strokes=strokes, accepted=accepted)


@dataclass(frozen=True)
class Segmentation:
    """A label map on the stored grid.

    ``mask`` (I, J, K) uint8: 0 background, value ``n`` belongs to ``names[n - 1]``; values are contiguous 1..N.
    ``scores``: the model's own confidence in [0, 1] per name (predicted IoU), not a measured accuracy.
    ``text``: what the language model said, when it was asked.
    """

    mask: np.ndarray
    geometry: Geometry
    names: Sequence[str]
    scores: Mapping[str, float] = field(default_factory=dict)
    text: str | None = None


@dataclass(frozen=True)
class Evidence:
    """A structure that a text names, as the map shows it that the text was made from.

    ``name``: an organ class or ``lesion_N``, to ask for the mask by; ``voxels`` of that mask on the stored grid, 0 when
    the map does not show it; ``centroid``: its centre as stored voxel (i, j, k); ``why``: how it was found.
    """

    name: str
    voxels: int
    centroid: tuple[float, float, float] | None
    why: str


@dataclass(frozen=True)
class Sentence:
    """A sentence and the structures it names."""

    text: str
    evidence: tuple[Evidence, ...]


@dataclass(frozen=True)
class Answer:
    """A text answer and the plain notice of what the answering weights were trained on.

    ``sentences``: the text's, each with its evidence; empty where the model has no map.
    """

    question: str
    text: str
    notice: str
    sentences: tuple[Sentence, ...] = ()

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """Every structure once, in the order in which the sentences name them."""
        found: dict[str, Evidence] = {}
        for sentence in self.sentences:
            found |= {item.name: item for item in sentence.evidence if item.name not in found}
        return tuple(found.values())
