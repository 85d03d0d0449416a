"""Lesions put into painted organs, with the facts that the texts tell about them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from medvl_sam2.synthesis.fields import smooth_field
from medvl_sam2.synthesis.organs import Layout
from medvl_sam2.synthesis.records import Finding
from medvl_sam2.vocabulary import CLASSES, spoken

KINDS: tuple[str, ...] = ("cyst", "hypodense lesion", "hyperdense lesion", "nodule")
LESION_ORGANS: tuple[str, ...] = (
    "liver", "spleen", "kidney_right", "kidney_left", "pancreas", "lung_right", "lung_left",
)  # fmt: skip
_ORGAN_WEIGHT = {"liver": 3.0, "spleen": 1.3, "kidney_right": 1.3, "kidney_left": 1.3, "pancreas": 1.0}

# Kinds that stand out by at least 40 HU: (without contrast agent, with it).
_ALLOWED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "liver": (("cyst", "hyperdense lesion"), ("cyst", "hypodense lesion", "hyperdense lesion")),
    "spleen": (("cyst", "hyperdense lesion"), ("cyst", "hypodense lesion", "hyperdense lesion")),
    "kidney_right": (("hyperdense lesion",), ("cyst", "hypodense lesion")),
    "kidney_left": (("hyperdense lesion",), ("cyst", "hypodense lesion")),
    "pancreas": (("cyst",), ("cyst", "hypodense lesion")),
    "lung_right": (("nodule",), ("nodule",)),
    "lung_left": (("nodule",), ("nodule",)),
}


@dataclass(frozen=True)
class LesionPlan:
    """How many lesions and how large (diameter in mm) a study gets."""

    count: int
    diameter_mm: tuple[float, float]


def place_lesions(
    rng: np.random.Generator,
    plan: LesionPlan,
    organs: np.ndarray,
    hu: np.ndarray,
    means: dict[str, float],
    spacing: tuple[float, float, float],
    phase: str,
    axes: tuple[np.ndarray, np.ndarray, np.ndarray],
    layout: Layout,
) -> tuple[np.ndarray, tuple[Finding, ...]]:
    """Draw lesions into ``hu`` (in place). Returns the id map (Z, Y, X) uint8 and the findings, ids 1..n.

    ``organs`` holds vocabulary values, ``means`` the HU of each organ. In about half of the studies with several
    lesions two share an organ. An organ too small in the view for a lesion is passed over.
    """
    lesions = np.zeros(organs.shape, dtype=np.uint8)
    counts = np.bincount(organs.ravel(), minlength=len(CLASSES) + 1)
    voxel = float(np.prod(spacing))
    roomy = [n for n in LESION_ORGANS if counts[CLASSES.index(n) + 1] * voxel > (15e3 if n == "pancreas" else 40e3)]
    findings: list[Finding] = []
    share = rng.random() < 0.5
    for turn in range(plan.count):
        if not roomy:
            break
        if turn == 1 and share and findings:
            organ = findings[0].organ
        else:
            weights = np.array([_ORGAN_WEIGHT.get(n, 0.9) for n in roomy])
            organ = roomy[rng.choice(len(roomy), p=weights / weights.sum())]
        kinds = _ALLOWED[organ][0 if phase == "non-contrast" else 1]
        if phase == "arterial" and organ == "liver":
            kinds = ("cyst", "hyperdense lesion")
        kind = kinds[rng.integers(len(kinds))]
        made = _grow(rng, organs == CLASSES.index(organ) + 1, lesions, spacing, plan.diameter_mm)
        if made is None:
            continue
        mask, box = made
        value = len(findings) + 1
        lesions[box][mask] = value
        _shade(rng, hu[box], mask, kind, means[organ], spacing)
        volume = np.count_nonzero(mask) * voxel
        where = np.argwhere(mask).mean(0) + [s.start for s in box]
        centre = tuple(float(c) for c in where)
        place = np.array([np.interp(c, np.arange(len(a)), a) for c, a in zip(centre, axes, strict=True)])
        findings.append(
            Finding(organ, kind, float((6 * volume / np.pi) ** (1 / 3)), (centre[0], centre[1], centre[2]),
                    spoken_location(organ, place, layout), value)
        )  # fmt: skip
    return lesions, tuple(findings)


def _grow(
    rng: np.random.Generator,
    organ: np.ndarray,
    lesions: np.ndarray,
    spacing: tuple[float, float, float],
    diameter_mm: tuple[float, float],
) -> tuple[np.ndarray, tuple[slice, slice, slice]] | None:
    """An irregular ball inside the organ: (mask over box, box), or None when no ball of the least size fits."""
    found = ndimage.find_objects(organ.view(np.uint8))[0]
    free = np.pad(organ[found] & (lesions[found] == 0), 1)
    if lesions.any():
        free &= ~ndimage.binary_dilation(np.pad(lesions[found] > 0, 1), iterations=2)
    depth = ndimage.distance_transform_edt(free, sampling=spacing)[1:-1, 1:-1, 1:-1]
    low, high = diameter_mm
    low = max(low, 2.6 * max(spacing))
    # A lesion may bulge out by a fifth of its radius; it is cut at the border of the organ.
    largest = min(high, 2 * float(depth.max()) / 0.8)
    if largest < low:
        return None
    radius = float(rng.uniform(low, largest)) / 2
    seeds = np.argwhere(depth >= 0.8 * radius)
    seed = seeds[rng.integers(len(seeds))] + [s.start for s in found]
    reach = [int(np.ceil(1.5 * radius / s)) for s in spacing]
    box = tuple(
        slice(max(0, int(c) - r), min(n, int(c) + r + 1)) for c, r, n in zip(seed, reach, organ.shape, strict=True)
    )
    grids = np.ogrid[box]
    stretch = rng.uniform(0.85, 1.15, 3)
    stretch /= np.prod(stretch) ** (1 / 3)
    square = sum(((g - c) * s / e) ** 2 for g, c, s, e in zip(grids, seed, spacing, stretch, strict=True))
    distance = np.sqrt(np.asarray(square))
    wobble = smooth_field(rng, distance.shape, spacing, max(radius, 5.0)) * (0.10 * radius)
    mask = (distance + wobble < radius) & organ[box] & (lesions[box] == 0)
    if np.count_nonzero(mask) < 12:
        return None
    return mask, (box[0], box[1], box[2])


def _shade(
    rng: np.random.Generator,
    hu: np.ndarray,
    mask: np.ndarray,
    kind: str,
    organ_hu: float,
    spacing: tuple[float, float, float],
) -> None:
    """Write the attenuation of a lesion into ``hu`` (a view), at least 40 HU off its organ."""
    texture = smooth_field(rng, hu.shape, spacing, 7.0)
    if kind == "cyst":
        value, amplitude = min(float(rng.uniform(-4, 8)), organ_hu - 40), 2.0
    elif kind == "hypodense lesion":
        # Solid tissue: clearly denser than a cyst, clearly darker than the organ.
        value, amplitude = float(np.clip(organ_hu - rng.uniform(42, 70), 32, organ_hu - 40)), 8.0
    elif kind == "hyperdense lesion":
        value, amplitude = organ_hu + float(rng.uniform(55, 100)), 10.0
    else:
        value, amplitude = float(rng.uniform(20, 70)), 14.0
    hu[mask] = value + amplitude * texture[mask]


def spoken_location(organ: str, place: np.ndarray, layout: Layout) -> str:
    """Where in the organ a reference point (z, y, x) mm lies, as a person says it."""
    name = f"the {spoken(organ)}"
    if organ == "liver":
        side = "left" if place[2] > -26 else "right"
        return f"{side} lobe of {name}"
    if organ.startswith("kidney"):
        height = (place[0] - layout.centres[organ][0]) / layout.radii[organ][0]
        part = "upper pole" if height > 0.25 else "lower pole" if height < -0.25 else "middle part"
        return f"{part} of {name}"
    if organ.startswith("lung"):
        # The oblique fissure climbs from the front of the base to the back of the apex.
        return f"{'upper' if place[0] - 0.9 * place[1] > 165 else 'lower'} lobe of {name}"
    if organ == "pancreas":
        part = "head" if place[2] < -4 else "tail" if place[2] > 42 else "body"
        return f"{part} of {name}"
    return spoken(organ)
