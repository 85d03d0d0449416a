"""What is evaluated: generated cases of seeds no training uses, and the unseen real cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medvl_sam2.errors import DataError
from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.synthesis.case import GeneratorConfig, generate_case
from medvl_sam2.synthesis.records import Case
from medvl_sam2.training.real_cases import UNSEEN_REAL, RealCase, RealSource, load_cases
from medvl_sam2.types import Volume
from medvl_sam2.vocabulary import CLASSES

FIRST_SEED = 2_000_000
"""Generated evaluation cases start here; training seeds lie below."""
MIN_VOXELS = 500
"""Smaller structures are left out of the interactive loop (and counted)."""


@dataclass(frozen=True)
class EvaluationCase:
    """A volume with its truth on the stored grid.

    ``objects``: (structure name, bool (I, J, K)) pairs for the interactive loop; ``classes``: bool masks by vocabulary
    class; ``known``: classes whose presence or absence is decided. ``generated`` keeps the generator's record (text).
    ``patient`` is the unit of the bootstrap. ``left_out``: structures below the voxel limit.
    """

    name: str
    patient: str
    label_origin: str
    volume: Volume
    objects: tuple[tuple[str, np.ndarray], ...]
    classes: Mapping[str, np.ndarray]
    known: tuple[str, ...]
    left_out: tuple[str, ...]
    generated: Case | None = None

    @property
    def split(self) -> str:
        """``generated`` or ``real``."""
        return "real" if self.generated is None else "generated"


def generated_cases(
    count: int, first_seed: int = FIRST_SEED, min_voxels: int = MIN_VOXELS, config: GeneratorConfig | None = None
) -> Iterator[EvaluationCase]:
    """``count`` generated cases of seeds ``first_seed`` onwards; seeds below 2 000 000 raise :class:`DataError`."""
    if first_seed < FIRST_SEED:
        raise DataError(f"seed {first_seed} may have been trained on; evaluate from seed {FIRST_SEED} on")
    for seed in range(first_seed, first_seed + count):
        yield from_generated(generate_case(seed, config), min_voxels)


def from_generated(case: Case, min_voxels: int = MIN_VOXELS) -> EvaluationCase:
    """A generated case as an evaluation case; every lesion is an object of its own named ``lesion``."""
    volume = case.volume()
    stored = CanonicalTransform(volume.geometry).inverse_array
    organs, lesions = stored(case.organs), stored(case.lesions)
    classes = {name: organs == value for value, name in enumerate(CLASSES, 1) if name != "lesion"}
    classes = {name: mask for name, mask in classes.items() if mask.any()}
    pairs = list(classes.items())
    pairs += [("lesion", lesions == value) for value in np.unique(lesions).tolist() if value > 0]
    if lesions.any():
        classes["lesion"] = lesions > 0
    objects, left_out = _large(pairs, min_voxels)
    name = f"generated_{case.seed}"
    return EvaluationCase(
        name, name, "generator's ground truth", volume, objects, classes, tuple(CLASSES), left_out, case
    )


def real_cases(
    data: Path, sources: tuple[RealSource, ...] = UNSEEN_REAL, min_voxels: int = MIN_VOXELS
) -> Iterator[EvaluationCase]:
    """The real cases of ``sources`` below the folder ``data``."""
    for case in load_cases(data, sources):
        yield from_real(case, min_voxels)


def from_real(case: RealCase, min_voxels: int = MIN_VOXELS) -> EvaluationCase:
    """A real case as an evaluation case."""
    objects, left_out = _large(list(case.masks.items()), min_voxels)
    return EvaluationCase(
        case.name,
        case.source.patient,
        case.source.label_origin,
        case.volume,
        objects,
        case.classes(),
        tuple(case.known_classes()),
        left_out,
    )


def _large(
    pairs: list[tuple[str, np.ndarray]], min_voxels: int
) -> tuple[tuple[tuple[str, np.ndarray], ...], tuple[str, ...]]:
    """Structures of at least ``min_voxels`` voxels, and the names of the others."""
    kept = tuple((name, mask) for name, mask in pairs if int(mask.sum()) >= min_voxels)
    return kept, tuple(name for name, mask in pairs if int(mask.sum()) < min_voxels)
