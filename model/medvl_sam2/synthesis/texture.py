"""From a tissue map to a CT-like image in HU: attenuation, texture, partial volume, noise and artefacts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medvl_sam2.synthesis.fields import smooth_field
from medvl_sam2.synthesis.tissues import Tissue

Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class Scanner:
    """Acquisition of one study."""

    noise: float
    """Standard deviation of the acquisition noise, HU."""
    grain: float
    """0: white noise; 1: noise smoothed as by a soft kernel."""
    blur: tuple[float, float]
    """Standard deviation of the point spread in voxels, along z and in plane."""
    streaks: float
    """Amplitude of horizontal streaks, HU."""
    table: bool

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Scanner:
        """Random scanner."""
        return cls(
            noise=float(rng.uniform(5, 25)),
            grain=float(rng.uniform(0, 1)),
            blur=(float(rng.uniform(0.2, 0.5)), float(rng.uniform(0.35, 0.65))),
            streaks=float(rng.uniform(8, 22)) if rng.random() < 0.15 else 0.0,
            table=bool(rng.random() < 0.5),
        )


def smooth3(array: np.ndarray, sigma: tuple[float, float, float]) -> np.ndarray:
    """Blur a float array (Z, Y, X) with a three-tap kernel an axis; ``sigma`` in voxels, each at most 0.7."""
    for axis, s in enumerate(sigma):
        side = np.float32(min(s, 0.7) ** 2 / 2)
        if side < 1e-3 or array.shape[axis] < 2:
            continue
        moved = np.moveaxis(array, axis, 0)
        out = moved * (1 - 2 * side)
        out[1:] += side * moved[:-1]
        out[:-1] += side * moved[1:]
        out[0] += side * moved[0]
        out[-1] += side * moved[-1]
        array = np.moveaxis(out, 0, axis)
    return np.ascontiguousarray(array)


def paint_hu(
    rng: np.random.Generator, tissue: np.ndarray, means: np.ndarray, amplitudes: np.ndarray, spacing: Spacing
) -> np.ndarray:
    """Noise-free HU (Z, Y, X) float32: mean of each tissue, correlated texture, vessels in lungs and liver."""
    fine = smooth_field(rng, tissue.shape, spacing, 6.0)
    coarse = smooth_field(rng, tissue.shape, spacing, 22.0)
    hu = means[tissue]
    hu += amplitudes[tissue] * (np.float32(0.75) * fine + np.float32(0.6) * coarse)
    a = smooth_field(rng, tissue.shape, spacing, 26.0)
    b = smooth_field(rng, tissue.shape, spacing, 26.0)
    # The zero set of two smooth fields is a bundle of curves: vessels without drawing a tree.
    curve = a * a + b * b
    lung = (tissue == Tissue.LUNG_RIGHT) | (tissue == Tissue.LUNG_LEFT)
    np.copyto(hu, np.float32(-60) - 8000 * curve, where=lung & (curve < 0.035))
    contrast = means[Tissue.VEIN] - means[Tissue.LIVER]
    strength = np.clip(1 - curve / 0.03, 0, 1) * np.float32(np.clip(contrast, -22, 40))
    np.add(hu, strength, out=hu, where=tissue == Tissue.LIVER)
    return hu


def acquire(rng: np.random.Generator, hu: np.ndarray, scanner: Scanner, spacing: Spacing) -> np.ndarray:
    """Blur, streaks and noise on a noise-free HU array (Z, Y, X): int16, clipped to [-1024, 3071]."""
    image = smooth3(hu, (scanner.blur[0], scanner.blur[1], scanner.blur[1]))
    if scanner.streaks:
        streak = smooth_field(rng, hu.shape, spacing, (7.0, 7.0, 160.0))
        image += np.float32(scanner.streaks) * streak * (hu > -500)
    noise = rng.standard_normal(hu.shape, dtype=np.float32)
    if scanner.grain > 0.3:
        noise = smooth3(noise, (0.0, 0.7 * scanner.grain, 0.7 * scanner.grain))
        noise *= np.float32(1 / max(float(noise[:, ::4, ::4].std()), 1e-3))
    image += np.float32(scanner.noise) * noise
    np.clip(image, -1024, 3071, out=image)
    return image.astype(np.int16)


def add_table(tissue: np.ndarray, y: np.ndarray, x: np.ndarray, back: float) -> None:
    """Paint the patient table as a thin arc behind the body, in place; y (Y,), x (X,) and ``back`` in mm."""
    surface = back + 6 - (x[None, :] / 190.0) ** 2 * 26
    arc = (np.abs(y[:, None] - surface) < 3.5) & (np.abs(x)[None, :] < 210)
    air = tissue == Tissue.AIR
    tissue[air & arc[None]] = Tissue.TABLE
