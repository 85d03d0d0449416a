"""Labels of one image beside each other, structure by structure: how far they agree, and one made of several.

Structures are matched by name, as two labels may number the same organs differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from lib.label_versions import LabelVersion
from medvl_sam2.errors import GeometryError, PromptError
from medvl_sam2.evaluation.metrics import overlap
from medvl_sam2.evaluation.surface import surface_dice
from medvl_sam2.volume_io import read_mask

NSD_TOLERANCE_MM = 2.0
MAX_STRUCTURES = 255
"""A mask made here has one byte a voxel."""
_STAPLE_ITERATIONS = 50


class Method(StrEnum):
    """How several labels become one."""

    MAJORITY = "majority"
    STAPLE = "staple"


@dataclass(frozen=True, eq=False)
class NamedMask:
    """A label map (I, J, K), the values each structure has in it, and voxel edges in mm along the axes."""

    array: np.ndarray
    values: dict[str, list[int]]
    spacing: tuple[float, float, float]

    def of(self, name: str) -> np.ndarray:
        """Bool mask (I, J, K) of a structure; empty when this label has none of that name."""
        mask = np.zeros(self.array.shape, bool)
        for value in self.values.get(name, ()):
            mask |= self.array == value
        return mask


@dataclass(frozen=True)
class StructureAgreement:
    """Dice and normalised surface Dice (2 mm) of one structure in two labels, and its voxels in each."""

    name: str
    dice: float
    nsd: float
    voxels_a: int
    voxels_b: int


@dataclass(frozen=True)
class PairAgreement:
    """Two versions, by number, and how far their structures agree."""

    a: int
    b: int
    structures: tuple[StructureAgreement, ...]


def read_named(record: LabelVersion, path: Path) -> NamedMask:
    """A version's mask with the names of its structures."""
    array, geometry = read_mask(path)
    values: dict[str, list[int]] = {}
    for structure in record.structures:
        values.setdefault(structure.name, []).append(structure.value)
    return NamedMask(array, values, geometry.spacing)


def compare(a: NamedMask, b: NamedMask) -> tuple[StructureAgreement, ...]:
    """Every structure that either label has, by name; one that the other lacks scores 0.

    Raises:
        GeometryError: they lie on different grids.
    """
    _check_grids([a, b])
    found = []
    for name in sorted(a.values.keys() | b.values.keys()):
        one, other = a.of(name), b.of(name)
        counts = overlap(one, other)
        nsd = surface_dice(one.T, other.T, a.spacing[::-1], NSD_TOLERANCE_MM)
        found.append(StructureAgreement(name, counts.dice or 0.0, nsd or 0.0, counts.truth, counts.prediction))
    return tuple(found)


def pairwise(masks: dict[int, NamedMask]) -> tuple[PairAgreement, ...]:
    """Every two of the versions."""
    return tuple(PairAgreement(a, b, compare(masks[a], masks[b])) for a, b in combinations(masks, 2))


def consensus(masks: Sequence[NamedMask], method: Method) -> tuple[np.ndarray, list[str]]:
    """One label map (I, J, K) uint8 of several, and the names of its values from 1 on.

    A label votes background where it has nothing, also for a structure it does not know. Majority: a voxel gets what
    most labels say, a tie stays background. STAPLE (Warfield 2004, for several structures Rohlfing 2003) weighs each
    label by how reliable it is found to be. Votes are taken in the box round all structures; outside all agree on
    background, which would only make every label look more reliable to STAPLE.

    Raises:
        PromptError: fewer than two labels, or too many structures. GeometryError: they lie on different grids.
    """
    if len(masks) < 2:
        raise PromptError(f"a consensus needs at least two versions, got {len(masks)}")
    _check_grids(masks)
    names = sorted({name for mask in masks for name in mask.values})
    if len(names) > MAX_STRUCTURES:
        raise PromptError(f"the versions have {len(names)} structures; a mask holds at most {MAX_STRUCTURES}")
    result = np.zeros(masks[0].array.shape, np.uint8)
    box = _box(masks)
    if box is None:
        return result, names
    votes = [sitk.GetImageFromArray(_renumbered(mask, names, box).T) for mask in masks]
    if method is Method.STAPLE:
        staple = sitk.MultiLabelSTAPLEImageFilter()
        staple.SetLabelForUndecidedPixels(0)
        staple.SetMaximumNumberOfIterations(_STAPLE_ITERATIONS)
        voted = staple.Execute(votes)
    else:
        voted = sitk.LabelVoting(votes, 0)
    result[box] = sitk.GetArrayViewFromImage(voted).T
    return result, names


def _check_grids(masks: Sequence[NamedMask]) -> None:
    shapes = {mask.array.shape for mask in masks}
    if len(shapes) > 1:
        raise GeometryError(
            f"versions of shapes {sorted(shapes)} cannot be compared; the image was replaced between them"
        )


def _box(masks: Sequence[NamedMask]) -> tuple[slice, ...] | None:
    """The smallest box round all structures of all labels."""
    spans = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        hits = np.flatnonzero(np.any([mask.array.any(axis=others) for mask in masks], axis=0))
        if not len(hits):
            return None
        spans.append(slice(int(hits[0]), int(hits[-1]) + 1))
    return tuple(spans)


def _renumbered(mask: NamedMask, names: Sequence[str], box: tuple[slice, ...]) -> np.ndarray:
    """The part of a label in ``box`` with values by place in ``names``, from 1 on."""
    part = mask.array[box]
    table = np.zeros(int(part.max()) + 1, np.uint8)
    for place, name in enumerate(names, start=1):
        for value in mask.values.get(name, ()):
            if value < len(table):
                table[value] = place
    return table[part]
