"""New training volumes from label maps: synthesised intensities (SynthSeg) and augmented real volumes.

``synthesise_from_labels`` follows Billot et al., "SynthSeg: Segmentation of brain MRI scans of any contrast and
resolution without retraining", Medical Image Analysis 2023 (arXiv 2107.09559): deform the labels, draw a Gaussian
intensity a class, add bias, blur and noise. Left and right are never mirrored: sides are names here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import ndimage

from medvl_sam2.errors import DataError
from medvl_sam2.synthesis.fields import smooth_displacement, smooth_field
from medvl_sam2.synthesis.texture import Scanner, acquire
from medvl_sam2.synthesis.tissues import PHASES, TISSUE_CLASS, draw_attenuation
from medvl_sam2.vocabulary import CLASSES

_PARCELS = 6
"""Smooth random regions that stand in for what the label map leaves unlabelled."""
_PARCEL_HU = (-105, -95, 40, 55, 70, -850)
_PARCEL_PROBABILITY = (0.3, 0.2, 0.15, 0.15, 0.12, 0.08)
_LEAST_KEPT = 0.6
"""A random crop keeps at least this part of every axis."""

Spacing = tuple[float, float, float]


def synthesise_from_labels(
    labels: np.ndarray,
    spacing: Spacing,
    seed: int,
    names: Mapping[int, str] | None = None,
    body: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """A CT-like volume that fits a randomly deformed label map.

    :param labels: (Z, Y, X) canonical integer labels, 0 is background.
    :param spacing: (sz, sy, sx) mm of the voxels.
    :param seed: the same seed gives the same result.
    :param names: class name by label. A name of the vocabulary gets an attenuation near its real one in half of the
        draws; every other label, and the other half, gets a random intensity.
    :param body: optional (Z, Y, X) bool, True inside the patient; outside becomes air. Without it all is inside.
    :return: image int16 HU and labels of the input's dtype, both cropped alike: at least 60 % of each axis is kept.
    :raises DataError: labels that are no 3D integer array.
    """
    labels = _checked(labels)
    rng = np.random.default_rng([seed, 0x1ABE1])
    coordinates = _warp(rng, labels.shape, spacing, stretch=0.12, amplitude=3.5, turn=0.12)
    moved = _nearest(labels, coordinates)
    hu = _parcelled_background(rng, moved.shape, spacing)
    if body is not None:
        hu[_nearest(body.astype(np.uint8), coordinates) == 0] = -1000
    fine = smooth_field(rng, moved.shape, spacing, 6.0)
    coarse = smooth_field(rng, moved.shape, spacing, 20.0)
    means = _class_means(rng, names or {})
    for value in np.unique(moved):
        if value == 0:
            continue
        mean = means.get(int(value), float(rng.uniform(-60, 260)))
        amplitude = np.float32(rng.uniform(3, 18))
        inside = moved == value
        hu[inside] = mean + amplitude * (np.float32(0.8) * fine[inside] + np.float32(0.6) * coarse[inside])
    hu *= 1 + np.float32(rng.uniform(0, 0.04)) * smooth_field(rng, moved.shape, spacing, 150.0)
    image = acquire(rng, hu, Scanner.draw(rng), spacing)
    crop = _random_crop(rng, image.shape)
    return image[crop].copy(), moved[crop].copy()


def augment_real(
    image: np.ndarray,
    labels: np.ndarray,
    spacing: Spacing,
    seed: int,
    per_class: bool = True,
    names: Mapping[int, str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Deform, crop and re-contrast a real volume with its labels, both (Z, Y, X) canonical. No left-right flips.

    Intensities are jittered in the volume's own units: gain, offset, gamma between the 0.5 and 99.5 percentile, noise
    and, with ``per_class``, a small constant offset a class (another contrast phase). Values at or below the padding
    (minimum of the volume) stay there. ``names`` (class name by label, of an unenhanced CT) lets contrast agent reach
    the organs in half of the draws.

    :return: float32 image in the input's units and labels of the input's dtype, at least 60 % of each axis kept.
    :raises DataError: shapes differ, or labels are no 3D integer array.
    """
    labels = _checked(labels)
    if image.shape != labels.shape:
        raise DataError(f"image {image.shape} and labels {labels.shape} differ in shape; resample the labels first")
    rng = np.random.default_rng([seed, 0xA46])
    coordinates = _warp(rng, labels.shape, spacing, stretch=0.1, amplitude=3.0, turn=0.1)
    crop = _random_crop(rng, labels.shape)
    coordinates = [np.ascontiguousarray(c[crop]) for c in coordinates]
    moved = _nearest(labels, coordinates)
    source = image.astype(np.float32)
    out = ndimage.map_coordinates(source, coordinates, order=1, mode="nearest", output=np.float32)
    low, high = (float(v) for v in np.percentile(source[:: max(1, len(source) // 40)], (0.5, 99.5)))
    span = max(high - low, 1e-3)
    padding = out <= source.min()
    unit = np.clip((out - low) / span, 0, 1)
    curved = low + span * unit ** np.float32(rng.uniform(0.85, 1.18))
    inside = (out > low) & (out < high)
    middle = (low + high) / 2
    out = np.where(inside, curved, out)
    # Soft tissue contrast is what a scanner changes; a CT's gain stays within a few per cent.
    out = middle + (out - middle) * np.float32(rng.uniform(0.94, 1.06)) + np.float32(rng.normal(0, 0.006) * span)
    if per_class and rng.random() < 0.6:
        for value in np.unique(moved):
            if value:
                out[moved == value] += np.float32(np.clip(rng.normal(0, 0.012), -0.03, 0.03) * span)
    if names and rng.random() < 0.5:
        out += _enhancement(rng, moved, names)
    out += np.float32(rng.uniform(0, 0.008) * span) * rng.standard_normal(out.shape, dtype=np.float32)
    out[padding] = source.min()
    return out, moved


def _checked(labels: np.ndarray) -> np.ndarray:
    if labels.ndim != 3 or not np.issubdtype(labels.dtype, np.integer) or min(labels.shape) < 2:
        raise DataError(
            f"labels of shape {labels.shape} and type {labels.dtype} must be a 3D integer array, two voxels an axis"
        )
    return labels


def _warp(
    rng: np.random.Generator, shape: tuple[int, ...], spacing: Spacing, stretch: float, amplitude: float, turn: float
) -> list[np.ndarray]:
    """Source voxel coordinates for every target voxel: rotation, scaling and smooth displacement about the centre.

    ``stretch`` relative, ``amplitude`` mm, ``turn`` radians (largest).
    """
    nz, ny, nx = shape
    mm = np.asarray(spacing, dtype=np.float32)
    centre = (np.asarray(shape, dtype=np.float32) - 1) / 2
    rotation = np.eye(3)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        angle = rng.uniform(-turn, turn)
        step = np.eye(3)
        step[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        rotation = rotation @ step
    matrix = (
        rotation * (1 + rng.uniform(-stretch, stretch, 3) * 0.6) * (1 + rng.uniform(-stretch, stretch) * 0.6)
    ).astype(np.float32)
    grids = np.ogrid[:nz, :ny, :nx]
    offsets = [(g - c).astype(np.float32) * s for g, c, s in zip(grids, centre, mm, strict=True)]
    moves = smooth_displacement(rng, (nz, ny, nx), spacing, amplitude, 45.0)
    out = []
    for axis in range(3):
        place = sum(matrix[axis, k] * offsets[k] for k in range(3)) + moves[axis]
        out.append(np.asarray(place / mm[axis] + centre[axis], dtype=np.float32))
    return out


def _nearest(labels: np.ndarray, coordinates: list[np.ndarray]) -> np.ndarray:
    """Labels at the nearest source voxel; beyond the volume is 0."""
    index, valid = [], np.ones(coordinates[0].shape, dtype=bool)
    for c, n in zip(coordinates, labels.shape, strict=True):
        nearest = np.rint(c).astype(np.int32)
        valid &= (nearest >= 0) & (nearest < n)
        index.append(np.clip(nearest, 0, n - 1))
    return np.where(valid, labels[tuple(index)], labels.dtype.type(0))


def _parcelled_background(rng: np.random.Generator, shape: tuple[int, ...], spacing: Spacing) -> np.ndarray:
    """Unlabelled tissue as smooth random regions of fat, muscle, bowel and air: float32 HU."""
    fields = np.stack([smooth_field(rng, shape, spacing, float(rng.uniform(18, 60))) for _ in range(_PARCELS)])
    region = fields.argmax(0)
    levels = rng.choice(np.array(_PARCEL_HU), size=_PARCELS, p=_PARCEL_PROBABILITY) + rng.normal(0, 15, _PARCELS)
    texture = smooth_field(rng, shape, spacing, 7.0) * np.float32(rng.uniform(4, 16))
    return np.asarray(levels.astype(np.float32)[region] + texture, dtype=np.float32)


def _class_means(rng: np.random.Generator, names: Mapping[int, str]) -> dict[int, float]:
    """Attenuation near the real one for labels that the vocabulary knows, in half of the draws."""
    if rng.random() < 0.5:
        return {}
    by_class = _drawn_by_class(rng, str(rng.choice(PHASES)))
    return {value: by_class[name] + float(rng.normal(0, 10)) for value, name in names.items() if name in by_class}


def _drawn_by_class(rng: np.random.Generator, phase: str) -> dict[str, float]:
    """One patient's mean HU by class name; a class of several tissues has that of its first."""
    means, _ = draw_attenuation(rng, phase)
    return {CLASSES[TISSUE_CLASS[t] - 1]: float(means[t]) for t in reversed(range(len(means))) if TISSUE_CLASS[t]}


def _enhancement(rng: np.random.Generator, labels: np.ndarray, names: Mapping[int, str]) -> np.ndarray:
    """HU that contrast agent adds to the named organs: float32 (Z, Y, X), blurred at their borders."""
    plain = _drawn_by_class(rng, PHASES[0])
    enhanced = _drawn_by_class(rng, str(rng.choice(PHASES[1:])))
    added = np.zeros(labels.shape, dtype=np.float32)
    for value, name in names.items():
        if name in plain and name not in ("lung_right", "lung_left", "stomach", "colon"):  # filled with air or food
            added[labels == value] = enhanced[name] - plain[name]
    return np.asarray(ndimage.gaussian_filter(added, 0.7), dtype=np.float32)


def _random_crop(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """In two of three draws a random part of each axis, else the whole volume."""
    if rng.random() < 1 / 3:
        return tuple(slice(0, n) for n in shape)
    out = []
    for n in shape:
        kept = max(2, round(n * float(rng.uniform(_LEAST_KEPT, 1.0))), int(np.ceil(n * _LEAST_KEPT)))
        start = int(rng.integers(0, n - kept + 1))
        out.append(slice(start, start + kept))
    return tuple(out)
