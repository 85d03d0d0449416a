"""Where pretraining volumes come from: the generator, label maps dressed in random intensities, and real volumes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.synthesis import Case, augment_real, generate_case, synthesise_from_labels
from medvl_sam2.synthesis.case import GeneratorConfig
from medvl_sam2.training.real_cases import TRAINABLE_REAL, RealCase, load_cases
from medvl_sam2.training.samples import CONCEPTS, LESION_ORGANS, LabelledVolume, Target, from_masks
from medvl_sam2.types import Modality
from medvl_sam2.vocabulary import CLASSES

_CACHE_VERSION = 3
_BODY_HU = -300
"""Above this a voxel belongs to the patient or the table; lungs are filled slice by slice."""

_UNENHANCED_HU = 80
"""Blood without contrast agent has 30 to 60 HU."""

HELD_OUT_SEED = 1_000_000
"""First seed of the held-out generated cases; training counts from 0, evaluation from 2,000,000."""
UNSEEN_SEED = 600
"""The scene phase trains on generated cases below, language and joint phase on those from here: they are to learn how
far the scene can be trusted on cases it has not seen."""
LESION_RICH = GeneratorConfig(lesion_counts=(0.0, 0.0, 0.0, 0.0, 0.25, 0.25, 0.25, 0.25))
"""Four to seven lesions a case: from the usual few, lesions are learned far later than organs."""
LESION_RICH_SEED = 3_000_000
"""First seed of the lesion-rich cases."""

LEFT_FOR_THE_LOOP = frozenset(f"hippocampus-{number}" for number in ("001", "003", "004", "006"))
"""Trainable patients that pretraining leaves out, so that the demo loop has a structure the weights do not know."""


@dataclass(frozen=True)
class SourceConfig:
    """How many volumes of each kind. ``real`` is the folder with the trainable real cases, None for none."""

    generated: int = 240
    lesion_rich: int = 0
    """Generated cases with several lesions each; they take half of the generated share."""
    generated_share: float = 0.45
    """Of all draws, when there are real volumes too."""
    real: Path | None = None
    real_copies: int = 16
    """Deformed copies of every named real volume (organ classes), on top of the original."""
    label_copies: int = 24
    """Volumes synthesised from every real label map with organ classes."""
    cache: Path | None = None
    seed: int = 0


def training_volumes(config: SourceConfig) -> tuple[list[LabelledVolume], list[float]]:
    """Volumes and their sampling weights: generated, lesion-rich, and real-derived ones when real data is given."""
    seeds = range(config.seed, config.seed + config.generated)
    rich_seeds = range(LESION_RICH_SEED + config.seed, LESION_RICH_SEED + config.seed + config.lesion_rich)
    generated = [_generated(seed, config.cache) for seed in tqdm(seeds, desc="generated cases")]
    rich = [_generated(seed, config.cache, LESION_RICH) for seed in tqdm(rich_seeds, desc="lesion-rich cases")]
    share = config.generated_share / (2 if generated and rich else 1)
    groups: list[tuple[float, list[LabelledVolume]]] = [(share, generated), (share, rich)]
    if config.real is not None:
        groups += [((1 - config.generated_share) * part, members) for part, members in _real_groups(config)]
    volumes: list[LabelledVolume] = []
    weights: list[float] = []
    for weight, members in groups:
        if members:
            volumes += members
            weights += [weight / len(members)] * len(members)
    return volumes, weights


def from_case(case: Case) -> LabelledVolume:
    """A generated case with organ targets, ``lesion`` and ``lesion_in_<organ>``; nothing in it is unlabelled."""
    present = set(np.unique(case.organs).tolist())
    targets = [Target(name, 0, (n + 1,)) for n, name in enumerate(CLASSES) if n + 1 in present]
    if case.findings:
        targets.append(Target("lesion", 1, tuple(f.value for f in case.findings)))
    for organ in LESION_ORGANS:
        values = tuple(f.value for f in case.findings if f.organ == organ)
        if values:
            targets.append(Target(f"lesion_in_{organ}", 1, values))
    return LabelledVolume(
        case.image,
        case.spacing,
        case.modality,
        (case.organs, case.lesions),
        tuple(targets),
        frozenset(CONCEPTS),
        f"generated-{case.seed}",
        {f.value: f.kind for f in case.findings},
    )


def from_real(case: RealCase) -> LabelledVolume:
    """A real case in canonical order: its own structure names, plus merged vocabulary classes."""
    transform = CanonicalTransform(case.volume.geometry)

    def canonical(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(transform.forward_array(array))

    masks = {name: canonical(mask) for name, mask in case.classes().items()}
    for name, mask in case.masks.items():
        if name not in CLASSES and mask.sum() >= 50:
            masks[name] = canonical(mask)
    image = canonical(case.volume.array)
    kind = np.int16 if case.volume.modality is Modality.CT else np.float32
    known = frozenset(case.known_classes())
    return from_masks(image.astype(kind), transform.spacing, case.volume.modality, masks, case.source.patient, known)


def _generated(seed: int, cache: Path | None, generator: GeneratorConfig | None = None) -> LabelledVolume:
    """Generate a case, or read its arrays back (texts are not kept here)."""
    kind = "case" if generator is None else "rich"
    path = None if cache is None else cache / f"{kind}-v{_CACHE_VERSION}-{seed}.npz"
    if path is not None and path.exists():
        with np.load(path) as stored:
            values = [tuple(int(v) for v in row if v) for row in stored["values"]]
            names = [str(n) for n in stored["names"]]
            targets = tuple(Target(n, int(m), v) for n, m, v in zip(names, stored["maps"], values, strict=True))
            sz, sy, sx = (float(s) for s in stored["spacing"])
            maps = (stored["organs"], stored["lesions"])
            return LabelledVolume(
                stored["image"],
                (sz, sy, sx),
                Modality.CT,
                maps,
                targets,
                frozenset(CONCEPTS),
                f"generated-{seed}",
                {n + 1: str(kind) for n, kind in enumerate(stored["kinds"]) if kind},
            )
    volume = from_case(generate_case(seed, generator))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        width = max(len(t.values) for t in volume.targets)
        temporary = path.with_name(f".{os.getpid()}.{path.name}")  # processes of one training may write it at once
        with temporary.open("wb") as file:
            np.savez(
                file,
                image=volume.image,
                organs=volume.maps[0],
                lesions=volume.maps[1],
                spacing=volume.spacing,
                names=[t.name for t in volume.targets],
                maps=[t.map for t in volume.targets],
                kinds=[volume.lesion_kinds.get(n + 1, "") for n in range(max(volume.lesion_kinds, default=0))],
                values=[[*t.values, *[0] * (width - len(t.values))] for t in volume.targets],
            )
        temporary.replace(path)
    return volume


def _real_groups(config: SourceConfig) -> list[tuple[float, list[LabelledVolume]]]:
    assert config.real is not None
    sources = [source for source in TRAINABLE_REAL if source.patient not in LEFT_FOR_THE_LOOP]
    originals = [from_real(case) for case in load_cases(config.real, sources)]
    organs = [v for v in originals if sum(t.concept is not None for t in v.targets) >= 5]
    deformed, dressed = [], []
    for number, volume in enumerate(tqdm(organs, desc="real variants")):
        for copy in range(config.real_copies):
            deformed.append(_deformed(volume, config.seed + 1000 * number + copy))
        for copy in range(config.label_copies):
            dressed.append(_dressed(volume, config.seed + 500_000 + 1000 * number + copy))
    return [(0.36, originals), (0.36, deformed), (0.28, dressed)]


def _deformed(volume: LabelledVolume, seed: int) -> LabelledVolume:
    """A deformed copy: all maps ride along as one stacked label."""
    codes, table = _stacked(volume)
    names = _class_names(volume, table) if is_unenhanced(volume) else None
    image, labels = augment_real(volume.image, codes, volume.spacing, seed, names=names)
    return _unstacked(volume, image, labels, table, volume.modality)


def is_unenhanced(volume: LabelledVolume) -> bool:
    """Whether a CT was made without contrast agent, told by its aorta; without one nothing is claimed."""
    aorta = volume.find("aorta")
    if volume.modality is not Modality.CT or aorta is None:
        return False
    return float(np.median(volume.image[np.isin(volume.maps[aorta.map], aorta.values)])) < _UNENHANCED_HU


def _dressed(volume: LabelledVolume, seed: int) -> LabelledVolume:
    """The label map deformed and dressed in random intensities (contrast-free anatomy)."""
    codes, table = _stacked(volume)
    names = _class_names(volume, table)
    body = None
    if volume.modality is Modality.CT:
        body = np.stack([ndimage.binary_fill_holes(plane) for plane in volume.image > _BODY_HU])
    image, labels = synthesise_from_labels(codes, volume.spacing, seed, names, body)
    return _unstacked(volume, image, labels, table, Modality.CT)


def _class_names(volume: LabelledVolume, table: np.ndarray) -> dict[int, str]:
    """Vocabulary class by code of :func:`_stacked`."""
    names = {}
    for target in volume.targets:
        if target.name in CLASSES:
            rows = np.flatnonzero(np.isin(table[:, target.map], target.values))
            names.update({int(row): target.name for row in rows})
    return names


def _stacked(volume: LabelledVolume) -> tuple[np.ndarray, np.ndarray]:
    """One code a combination of label values: codes (Z, Y, X) and their rows (codes, maps)."""
    stack = np.stack([m.ravel() for m in volume.maps], axis=1)
    table, codes = np.unique(stack, axis=0, return_inverse=True)
    return codes.reshape(volume.image.shape).astype(np.int32), table


def _unstacked(
    volume: LabelledVolume, image: np.ndarray, codes: np.ndarray, table: np.ndarray, modality: Modality
) -> LabelledVolume:
    maps = tuple(table[codes, n].astype(np.uint8) for n in range(table.shape[1]))
    kind = np.int16 if modality is Modality.CT else np.float32
    return LabelledVolume(
        image.astype(kind), volume.spacing, modality, maps, volume.targets, volume.known, volume.patient
    )
