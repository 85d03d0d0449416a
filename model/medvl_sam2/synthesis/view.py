"""Field of view of a generated study: which part of the trunk is scanned, on which grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medvl_sam2.synthesis.anatomy import Patient

_ORGAN_CROPS: tuple[str, ...] = ("liver", "spleen", "kidney_right", "kidney_left", "pancreas", "gallbladder")


@dataclass(frozen=True)
class FieldOfView:
    """The scanned box. ``axes`` are the reference mm of the voxel centres along (z, y, x); ``spacing`` is real mm."""

    axes: tuple[np.ndarray, np.ndarray, np.ndarray]
    spacing: tuple[float, float, float]
    region: str
    """Spoken body region, e.g. ``chest and abdomen``."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(Z, Y, X)."""
        return len(self.axes[0]), len(self.axes[1]), len(self.axes[2])


REGIONS: tuple[str, ...] = ("chest", "abdomen", "chest and abdomen", "abdomen and pelvis", "chest, abdomen and pelvis")


def spoken_region(low: float, high: float) -> str:
    """Name of the body region between two reference heights (mm)."""
    chest = high > 150
    pelvis = low < -190
    abdomen = min(high, 70) - max(low, -80) > 60 or not (chest or pelvis)
    parts = [name for name, seen in (("chest", chest), ("abdomen", abdomen), ("pelvis", pelvis)) if seen]
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]


def draw_view(
    rng: np.random.Generator,
    patient: Patient,
    organ_centres: dict[str, np.ndarray],
    slab_probability: float,
    crop_probability: float,
) -> FieldOfView:
    """Random height range and in-plane window.

    Heights cover chest and abdomen, abdomen, abdomen and pelvis or all three; or a slab of 15 to 30 slices. With
    ``crop_probability`` the window is a square of 130 to 220 mm around one organ instead of the whole body.
    """
    sz, sy, sx = patient.scale
    if rng.random() < slab_probability:
        spacing_z = float(rng.uniform(2.5, 6))
        count = int(rng.integers(15, 31))
        middle = float(rng.uniform(-40, 110))
        half = count * spacing_z / sz / 2
        low, high = middle - half, middle + half
    else:
        spans = ((-105, 262), (-95, 130), (-285, 125), (-290, 268), (10, 265))
        low, high = spans[rng.choice(len(spans), p=(0.27, 0.31, 0.2, 0.1, 0.12))]
        low += rng.uniform(-15, 25) if low > -250 else rng.uniform(-5, 30)
        high += rng.uniform(-25, 15) if high < 200 else rng.uniform(-35, 8)
        extent = (high - low) * sz
        spacing_z = float(np.clip(extent / rng.integers(42, 92), 2.5, 6.0))
        count = int(np.clip(extent / spacing_z, 12, 100))
    z = low + np.arange(count) * (spacing_z / sz)

    if rng.random() < crop_probability:
        centre = organ_centres[_ORGAN_CROPS[rng.integers(len(_ORGAN_CROPS))]]
        extents = rng.uniform(130, 220, 2) * np.array([1, rng.uniform(1.0, 1.15)])
        spacing = float(rng.uniform(1.8, 2.8))
        mid_y, mid_x = centre[1] * sy + rng.uniform(-25, 25), centre[2] * sx + rng.uniform(-25, 25)
    else:
        body = 2 * (124 + patient.wall + 1.1 * patient.fat)
        width = (body + (150 if patient.arms and rng.random() < 0.6 else 0)) * sx * rng.uniform(0.97, 1.15)
        height = width if rng.random() < 0.6 else min(width, (body - 70) * sy * rng.uniform(1.02, 1.2))
        extents = np.array([height, width])
        spacing = float(np.clip(width / rng.integers(94, 126), 2.4, 4.2))
        mid_y, mid_x = rng.uniform(-12, 16), rng.uniform(-14, 14)
    ny, nx = (round(float(e) / spacing) for e in extents)
    y = (mid_y + (np.arange(ny) - (ny - 1) / 2) * spacing) / sy
    x = (mid_x + (np.arange(nx) - (nx - 1) / 2) * spacing) / sx
    region = spoken_region(float(z[0]), float(z[-1]))
    return FieldOfView((z, y, x), (spacing_z, spacing, spacing), region)
