"""Labelled volumes as training sees them, whatever they came from (generated, label map, real, corrected by a user)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from medvl_sam2.errors import DataError
from medvl_sam2.training.run_settings import digest
from medvl_sam2.types import Modality
from medvl_sam2.vocabulary import CLASSES

LESION_ORGANS = ("liver", "spleen", "kidney_right", "kidney_left", "lung_right", "lung_left", "pancreas")
"""Organs whose lesions have a concept of their own (``lesion_in_<organ>``)."""

CONCEPTS: tuple[str, ...] = (*CLASSES, *(f"lesion_in_{organ}" for organ in LESION_ORGANS))
"""What a stand-in language token can mean before the language model supplies it."""


@dataclass(frozen=True)
class Target:
    """One object: ``values`` of label map number ``map``. ``concept`` is None for objects without a known name.

    ``members``: the structures that an object is made of which has no name of its own.
    """

    name: str
    map: int
    values: tuple[int, ...]
    members: tuple[str, ...] = ()

    @property
    def concept(self) -> int | None:
        """Index into :data:`CONCEPTS`, or None."""
        return CONCEPTS.index(self.name) if self.name in CONCEPTS else None


@dataclass(frozen=True, eq=False)
class LabelledVolume:
    """``image`` (Z, Y, X) canonical (HU for CT), ``spacing`` mm (z, y, x), integer ``maps`` (Z, Y, X) and targets.

    ``known`` names every concept whose absence from the maps means absence from the image; other concepts are
    unlabelled here and must not be trained as background. ``patient`` is the unit of every split. ``lesion_kinds`` maps
    values of the ``lesion`` target to their kind, where that is known.
    """

    image: np.ndarray
    spacing: tuple[float, float, float]
    modality: Modality
    maps: tuple[np.ndarray, ...]
    targets: tuple[Target, ...]
    known: frozenset[str]
    patient: str
    lesion_kinds: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for labels in self.maps:
            if labels.shape != self.image.shape:
                raise DataError(f"label map {labels.shape} does not fit image {self.image.shape} of {self.patient}")

    def mask(self, target: Target, z: int | slice | np.ndarray) -> np.ndarray:
        """Bool mask of one slice (Y, X) or of several (N, Y, X)."""
        labels = self.maps[target.map][z]
        if len(target.values) == 1:
            return np.asarray(labels == target.values[0])
        return np.isin(labels, target.values)

    def find(self, name: str) -> Target | None:
        """The target of that name, if this volume has it."""
        return next((t for t in self.targets if t.name == name), None)

    @cached_property
    def areas(self) -> dict[str, np.ndarray]:
        """Voxels per slice (Z,) of every target."""
        result: dict[str, np.ndarray] = {}
        for number, labels in enumerate(self.maps):
            top = int(labels.max()) + 1
            counts = np.stack([np.bincount(plane.ravel(), minlength=top) for plane in labels])
            for target in self.targets:
                if target.map == number:
                    result[target.name] = counts[:, [v for v in target.values if v < top]].sum(axis=1)
        return result


def volumes_digest(volumes: Sequence[LabelledVolume], weights: Sequence[float]) -> str:
    """Digest of which volumes are drawn and how often: patients, sizes, targets and weights, not voxels."""
    facts = [(v.patient, v.image.shape, v.spacing, sorted(t.name for t in v.targets), sorted(v.known)) for v in volumes]
    return digest(facts, [round(float(weight), 12) for weight in weights])


def from_masks(
    image: np.ndarray,
    spacing: tuple[float, float, float],
    modality: Modality,
    masks: dict[str, np.ndarray],
    patient: str,
    known: frozenset[str] = frozenset(),
) -> LabelledVolume:
    """Pack named bool masks (Z, Y, X), possibly overlapping, into as few label maps as they need."""
    maps: list[np.ndarray] = []
    targets: list[Target] = []
    for name, mask in masks.items():
        if not mask.any():
            continue
        free = [n for n, labels in enumerate(maps) if not labels[mask].any()]
        number = free[0] if free else len(maps)
        if not free:
            maps.append(np.zeros(image.shape, dtype=np.uint8))
        value = int(maps[number].max()) + 1
        maps[number][mask] = value
        targets.append(Target(name, number, (value,)))
    if not targets:
        raise DataError(f"{patient} has no labelled voxel; nothing can be trained on it")
    return LabelledVolume(
        image, spacing, modality, tuple(maps), tuple(targets), known | {t.name for t in targets}, patient
    )
