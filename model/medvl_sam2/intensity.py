"""Intensity mappings: what the slice encoder and the global encoder see of a volume.

CT is mapped by fixed windows in Hounsfield units, so scanner padding (-2000, -3024, ...) merely clips to black.
Everything else is mapped by percentiles of its non-zero voxels, because MR units carry no meaning.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from medvl_sam2.errors import VolumeError
from medvl_sam2.types import Modality

CT_WINDOWS: tuple[tuple[float, float], ...] = ((-160.0, 240.0), (-1250.0, 250.0), (-500.0, 1300.0))
"""Lowest and highest HU of the three slice channels: soft tissue (W400 L40), lung (W1500 L-500), bone (W1800 L400)."""
CT_KNOTS: tuple[tuple[float, float], ...] = ((-1000.0, 0.0), (-120.0, 0.1), (-30.0, 0.2), (200.0, 0.9), (1000.0, 1.0))
"""HU and value of the global CT channel: soft tissue, 230 of 2000 HU, gets 70 % of the range. With less, a lesion 40 HU
off its organ drowns in the step from air to tissue."""
PERCENTILES: tuple[float, float] = (0.5, 99.5)
"""Percentiles of the non-zero voxels that map to black and white outside CT."""
AIR_HU = -1024.0
"""What a missing CT voxel is taken for."""
_SAMPLE = 1_000_000  # voxels that percentiles are taken from; more do not move them


@dataclass(frozen=True)
class IntensityRange:
    """Black and white of a non-CT volume, taken once from the whole volume so that slices agree."""

    low: float
    high: float

    @classmethod
    def of(cls, array: np.ndarray) -> IntensityRange:
        """Percentiles of the non-zero finite voxels (a regular subsample of a large array)."""
        values = _subsample(array)
        values = values[np.isfinite(values) & (values != 0)]
        if values.size == 0:
            return cls(0.0, 1.0)
        low, high = (float(v) for v in np.percentile(values, PERCENTILES))
        if high <= low:  # one value on a zero background: keep the two apart
            low, high = min(low, 0.0), max(high, 0.0)
        return cls(low, high)


def slice_channels(
    array: np.ndarray, modality: Modality, limits: IntensityRange | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Canonical slices (Z, Y, X), HU for CT, to (Z, 3, Y, X) in [-1, 1].

    CT: the three :data:`CT_WINDOWS`. Otherwise one percentile-mapped channel three times. Give ``limits`` (from the
    whole volume) when ``array`` is only some of its slices; CT ignores it.
    """
    values = _tensor(array, modality)
    if modality is Modality.CT:
        channels = [_ramp(values, low, high).to(dtype) for low, high in CT_WINDOWS]
        return torch.stack(channels, dim=1).mul_(2).sub_(1)
    limits = limits or IntensityRange.of(array)
    channel = _ramp(values, limits.low, limits.high).mul_(2).sub_(1).to(dtype)
    return channel[:, None].repeat(1, 3, 1, 1)


def global_channel(array: np.ndarray, modality: Modality, limits: IntensityRange | None = None) -> torch.Tensor:
    """Canonical volume (Z, Y, X) to float32 (Z, Y, X) in [0, 1]: CT through :data:`CT_KNOTS`, else percentiles."""
    values = _tensor(array, modality)
    if modality is not Modality.CT:
        limits = limits or IntensityRange.of(array)
        return _ramp(values, limits.low, limits.high)
    out = torch.zeros_like(values)
    for (low, start), (high, end) in itertools.pairwise(CT_KNOTS):
        out += _ramp(values, low, high).mul_(end - start)
    return out.clamp_(0.0, 1.0)


def guess_modality(array: np.ndarray, hint: str | None = None) -> Modality:
    """Modality from a DICOM ``Modality`` value when there is one, else CT or OTHER from the voxel values.

    CT by values: Hounsfield-like. Either air or lung (below -200 HU) with soft tissue beside it and little below
    -1100 HU except one padding value, or a crop without air whose values are whole numbers around 0 with fat below
    -40 HU. CT already windowed to 0..255 is OTHER, which is how it must be mapped. Values cannot tell MR from the rest.
    """
    if hint:
        name = hint.strip().upper()
        if name in ("CT", "MR"):
            return Modality(name)
        return Modality.MR if name == "MRI" else Modality.OTHER
    values = _subsample(array)
    values = values[np.isfinite(values)]
    if values.size == 0:
        return Modality.OTHER
    below = values[values < -1100]
    impossible = np.count_nonzero(below != below.min()) if below.size else 0
    if impossible > 0.02 * values.size or float(values.max()) > 40_000:
        return Modality.OTHER
    tissue = np.mean((values > -150) & (values < 300))
    if np.mean(values < -200) > 0.001 and tissue > 0.005:
        return Modality.CT
    whole = bool(np.all(values == np.round(values)))
    if whole and np.percentile(values, 1) <= -40 and tissue > 0.5:
        return Modality.CT
    return Modality.OTHER


def replace_non_finite(array: np.ndarray, modality: Modality) -> np.ndarray:
    """NaN and infinite voxels become air (-1024 HU) in CT and 0 elsewhere; the array itself when there is none.

    Raises :class:`VolumeError` when no voxel is finite.
    """
    if array.dtype.kind != "f":
        return array
    finite = np.isfinite(array)
    if finite.all():
        return array
    if not finite.any():
        raise VolumeError("the image holds no finite voxel (all NaN or infinite); export it again")
    return np.where(finite, array, np.asarray(AIR_HU if modality is Modality.CT else 0.0, dtype=array.dtype))


def _ramp(values: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """New tensor: ``low`` to 0, ``high`` to 1, clipped."""
    return values.sub(low).div_(max(high - low, 1e-6)).clamp_(0.0, 1.0)


def _tensor(array: np.ndarray, modality: Modality) -> torch.Tensor:
    """Contiguous float32 copy (canonical views have negative strides, which torch does not take)."""
    if array.ndim != 3:
        raise VolumeError(f"array of shape {array.shape} must be (Z, Y, X)")
    return torch.from_numpy(replace_non_finite(np.array(array, dtype=np.float32, order="C"), modality))


def _subsample(array: np.ndarray) -> np.ndarray:
    """About a million voxels on a regular grid, flat float32."""
    step = max(1, int(np.ceil((array.size / _SAMPLE) ** (1 / 3))))
    steps = tuple(slice(None, None, min(step, n)) for n in array.shape)
    return array[steps].astype(np.float32).ravel()


@dataclass(frozen=True)
class SliceIntensity:
    """:func:`slice_channels` for pixels already cropped from a volume whose limits were taken beforehand."""

    modality: Modality
    limits: IntensityRange

    @classmethod
    def of(cls, array: np.ndarray, modality: Modality) -> SliceIntensity:
        """Mapping of a whole volume (any axis order); CT needs no statistics."""
        return cls(modality, IntensityRange(*CT_WINDOWS[0]) if modality is Modality.CT else IntensityRange.of(array))

    @property
    def pad(self) -> float:
        """Raw value beyond the edge of the image: air in CT, black elsewhere."""
        return AIR_HU if self.modality is Modality.CT else self.limits.low

    @property
    def span(self) -> float:
        """Raw width of the main window, the natural unit of noise and contrast changes."""
        return self.limits.high - self.limits.low

    def channels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Raw pixels (N, Y, X) to (N, 3, Y, X) in [-1, 1]."""
        windows = CT_WINDOWS if self.modality is Modality.CT else ((self.limits.low, self.limits.high),) * 3
        return torch.stack([_ramp(pixels, low, high) for low, high in windows], dim=1).mul_(2).sub_(1)
