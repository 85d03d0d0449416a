"""Training views for the scene: a random field of view of a labelled volume with the labels of its cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from medvl_sam2.config import ModelConfig
from medvl_sam2.geometry import global_view
from medvl_sam2.intensity import global_channel
from medvl_sam2.training.samples import LabelledVolume

_LESION_GAIN = 1.6
"""A cell filled this far (1 / 1.6) with lesion counts as lesion; half as far counts half."""


@dataclass(frozen=True)
class SceneBatch:
    """``views`` (B, 1, D, H, W); ``quarters`` uint8 (B, C, D, H/2, W/2) labelled pixels of a scene cell, 0 to 4.

    Channels: ``organs``, any lesion, kinds of lesion. A channel that is not ``valid`` (B, C) is unlabelled in that
    volume.
    """

    views: Tensor
    quarters: Tensor
    valid: Tensor
    organs: int

    def cells(self, planes: slice = slice(None)) -> Tensor:
        """Wanted shares (B, C, planes, H/2, W/2) in [0, 1] on the scene's grid."""
        shares = self.quarters[:, :, planes].float() / 4
        shares[:, self.organs :] = (shares[:, self.organs :] * _LESION_GAIN).clamp_max(1)
        return shares

    def stem_cells(self, grid: tuple[int, int, int]) -> Tensor:
        """Wanted shares (B, C, d, h, w) on a coarser grid: organs averaged, lesions by their peak."""
        organs = functional.adaptive_avg_pool3d(self.quarters[:, : self.organs].float(), grid) / 4
        lesions = functional.adaptive_max_pool3d(self.quarters[:, self.organs :].float(), grid) / 4
        return torch.cat([organs, (lesions * _LESION_GAIN).clamp_max(1)], dim=1)

    def to(self, device: str) -> SceneBatch:
        """The batch on another device."""
        return SceneBatch(self.views.to(device), self.quarters.to(device), self.valid.to(device), self.organs)


@dataclass(frozen=True)
class ViewConfig:
    """How far a drawn view may stray from the stored volume."""

    crop_chance: float = 0.5
    least_share: tuple[float, float] = (0.35, 0.7)
    """Smallest share of the height and of the plane's edges that a cropped view keeps."""
    narrow_chance: float = 0.15
    """Chance of a view round one labelled place instead, such as a crop that was made for a single organ."""
    narrow_share: tuple[float, float] = (0.25, 0.6)
    """Least and largest share of every edge that such a view keeps."""
    slab_chance: float = 0.2
    """Chance of a few slices of the whole plane instead, such as a study of one organ's height."""
    slab_share: tuple[float, float] = (0.08, 0.35)
    """Least and largest share of the height that such a view keeps."""
    thick_chance: float = 0.15
    """Chance to see every second to fourth slice only."""
    gain: float = 0.1
    bias: float = 0.03
    noise: float = 0.02


class SceneSampler:
    """Draws :class:`SceneBatch` from volumes with given weights; one ``numpy`` generator fixes the stream."""

    def __init__(
        self,
        volumes: Sequence[LabelledVolume],
        weights: Sequence[float],
        model: ModelConfig,
        seed: int,
        config: ViewConfig | None = None,
    ) -> None:
        self.volumes = list(volumes)
        chance = np.asarray(weights, dtype=np.float64)
        self.chance = chance / chance.sum()
        self.model = model
        self.config = config or ViewConfig()
        self.rng = np.random.default_rng(seed)

    def batch(self, count: int) -> SceneBatch:
        """``count`` random views of random volumes."""
        numbers = self.rng.choice(len(self.volumes), size=count, p=self.chance)
        return self._stack([self._draw(self.volumes[int(n)]) for n in numbers])

    def plain(self, number: int) -> SceneBatch:
        """The whole volume ``number`` as the model sees it at inference."""
        volume = self.volumes[number]
        return self._stack([self._view(volume, tuple(slice(0, n) for n in volume.image.shape), 1)])

    def _stack(self, parts: list[tuple[Tensor, np.ndarray, np.ndarray]]) -> SceneBatch:
        views, quarters, valid = zip(*parts, strict=True)
        return SceneBatch(
            torch.stack(views),
            torch.from_numpy(np.stack(quarters)),
            torch.from_numpy(np.stack(valid)),
            len(self.model.scene_organs),
        )

    def _draw(self, volume: LabelledVolume) -> tuple[Tensor, np.ndarray, np.ndarray]:
        rng, config = self.rng, self.config
        spans = [slice(0, n) for n in volume.image.shape]
        least = (config.least_share[0], config.least_share[1], config.least_share[1])
        kind = rng.random()
        if kind < config.narrow_chance:
            place = _labelled_place(volume, rng)
            spans = [
                _span_round(at, n, config.narrow_share, rng) for at, n in zip(place, volume.image.shape, strict=True)
            ]
        elif kind < config.narrow_chance + config.slab_chance:
            spans[0] = _span_round(_labelled_place(volume, rng)[0], volume.image.shape[0], config.slab_share, rng)
        elif rng.random() < config.crop_chance:
            for axis, (count, share) in enumerate(zip(volume.image.shape, least, strict=True)):
                keep = max(1, round(count * rng.uniform(share, 1)))
                start = int(rng.integers(count - keep + 1))
                spans[axis] = slice(start, start + keep)
        thick = rng.random() < config.thick_chance and spans[0].stop - spans[0].start >= 48
        view, quarters, valid = self._view(volume, tuple(spans), int(rng.integers(2, 5)) if thick else 1)
        gain, bias = 1 + rng.uniform(-config.gain, config.gain), rng.uniform(-config.bias, config.bias)
        noise = torch.randn(view.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**31))))
        return (view * gain + bias + rng.uniform(0, config.noise) * noise).clamp(0, 1), quarters, valid

    def _view(
        self, volume: LabelledVolume, spans: tuple[slice, ...], step: int
    ) -> tuple[Tensor, np.ndarray, np.ndarray]:
        rows = slice(spans[0].start, spans[0].stop, step)
        image = np.ascontiguousarray(volume.image[rows, spans[1], spans[2]])
        size = self.model.vision.input_size
        view = global_view(global_channel(image, volume.modality), size)
        places = np.ix_(*(_nearest(have, want) for have, want in zip(image.shape, size, strict=True)))
        maps = [labels[rows, spans[1], spans[2]][places] for labels in volume.maps]
        quarters, valid = self._quarters(volume, maps)
        return view, quarters, valid

    def _quarters(self, volume: LabelledVolume, maps: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Labelled pixels (C, D, H/2, W/2) of every cell, and which channels are labelled (C,)."""
        organs, kinds = self.model.scene_organs, self.model.scene.kinds
        channels = len(organs) + 1 + len(kinds)
        quarters = np.zeros((channels, *self.model.scene_grid), dtype=np.uint8)
        valid = np.zeros(channels, dtype=bool)
        for number, labels in enumerate(maps):
            table = np.full(256, -1, dtype=np.int16)
            for target in volume.targets:
                if target.map == number and target.name in organs:
                    table[list(target.values)] = organs.index(target.name)
            if (table >= 0).any():
                _count(quarters, table[labels])
        for channel, name in enumerate(organs):
            valid[channel] = name in volume.known
        lesion = volume.find("lesion")
        valid[len(organs)] = "lesion" in volume.known
        valid[len(organs) + 1 :] = valid[len(organs)] and (lesion is None or bool(volume.lesion_kinds))
        if lesion is not None:
            anywhere, kind = np.full(256, -1, dtype=np.int16), np.full(256, -1, dtype=np.int16)
            anywhere[list(lesion.values)] = 0
            for value, name in volume.lesion_kinds.items():
                kind[value] = 1 + kinds.index(name) if name in kinds else -1
            found = quarters[len(organs) :]
            _count(found, anywhere[maps[lesion.map]])
            if volume.lesion_kinds:
                _count(found, kind[maps[lesion.map]])
        return quarters, valid


def _span_round(place: int, count: int, share: tuple[float, float], rng: np.random.Generator) -> slice:
    """A random part of ``count`` voxels with ``place`` in its inner three fifths, where the ends allow."""
    keep = min(count, max(8, round(count * rng.uniform(*share))))
    start = int(np.clip(place - rng.uniform(0.2, 0.8) * keep, 0, count - keep))
    return slice(start, start + keep)


def _labelled_place(volume: LabelledVolume, rng: np.random.Generator) -> np.ndarray:
    """A random labelled voxel (z, y, x); any voxel where labels are too rare to be met in a few draws."""
    place = np.zeros(3, dtype=np.int64)
    for _ in range(30):
        place = rng.integers(volume.image.shape)
        if any(labels[tuple(place)] for labels in volume.maps):
            break
    return place


def _nearest(have: int, want: int) -> np.ndarray:
    """Stored index under the centre of each of ``want`` view pixels."""
    return np.asarray(np.minimum(((np.arange(want) + 0.5) * have / want).astype(np.int64), have - 1))


def _count(quarters: np.ndarray, channel: np.ndarray) -> None:
    """Count the pixels of every cell (C, D, H/2, W/2) by ``channel`` (D, H, W); -1 belongs to none."""
    flat = quarters.reshape(len(quarters), -1)
    for y in (0, 1):
        for x in (0, 1):
            part = channel[:, y::2, x::2].ravel()
            inside = np.flatnonzero(part >= 0)
            flat[part[inside], inside] += 1
