"""Random training rows from labelled volumes: whole slices with named targets, and windows round one object.

Everything here is drawn from one ``numpy`` generator, so a seed fixes the whole stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from medvl_sam2.geometry import SliceCrop
from medvl_sam2.intensity import SliceIntensity
from medvl_sam2.predictor.named import MIN_MM_PER_PX, NamedConfig
from medvl_sam2.predictor.places import parts_of, place_on_slices
from medvl_sam2.training.clicks import box_prompt_2d
from medvl_sam2.training.samples import CONCEPTS, LabelledVolume, Target
from medvl_sam2.types import Modality

TRUTH_SIZE = 64
"""Side of the truth grid: twice the decoder's 32, so that the loss sees sub-pixel boundaries."""


@dataclass(frozen=True)
class WholeSlice:
    """A whole slice with named targets: image (3, S, S), concepts (K,), truth (K, T, T), height in [0, 1]."""

    image: Tensor
    concepts: tuple[int, ...]
    truth: Tensor
    height: float
    dense: Tensor
    """(number of concepts, h, h) soft occupancy for the auxiliary head; -1 where the concept is unlabelled."""


@dataclass(frozen=True)
class Window:
    """T neighbouring slices round one object: images (T, 3, S, S), truth (T, T', T'), prompted slice index 0.

    ``boxes`` (T, 4) x0, y0, x1, y1 in model pixels of the object's box on each slice (NaN where absent);
    ``guess`` (T, T', T') a corrupted mask to start from.
    """

    images: Tensor
    truth: Tensor
    boxes: np.ndarray
    guess: Tensor
    concept: int | None
    height: Tensor


@dataclass(frozen=True)
class LocatedSlice:
    """A slice in the window of something the scene located, as text prompts delineate it.

    image (3, S, S), ``rough`` (h, h) logits of the scene's map, truth (T, T), height in [0, 1].
    """

    image: Tensor
    rough: Tensor
    truth: Tensor
    height: float


@dataclass(frozen=True)
class Sheet:
    """N whole slices of one volume through one window, and what K requests look like on them.

    images (N, 3, S, S); heights (N,) in [0, 1]; ``areas`` (K, N) share of every slice that the request covers;
    ``shown`` (K, R) the slices of each request whose mask is given in ``truth`` (K, R, T, T).
    """

    images: Tensor
    heights: Tensor
    areas: Tensor
    shown: Tensor
    truth: Tensor


Places = Callable[[int, Target], Tensor | None]
"""The scene's map (d, h, w), as logits, of a target of volume ``number``; None where it does not show it."""


class SliceSampler:
    """Draws training rows from a list of volumes with given weights.

    With ``places`` half of the guesses come from the scene, so that its real mistakes are learned.
    """

    def __init__(
        self,
        volumes: Sequence[LabelledVolume],
        weights: Sequence[float],
        seed: int,
        image_size: int,
        places: Places | None = None,
    ) -> None:
        self.places = places
        self.volumes = list(volumes)
        chance = np.asarray(weights, dtype=np.float64)
        self.chance = chance / chance.sum()
        self.rng = np.random.default_rng(seed)
        self.size = image_size
        self.intensities = [SliceIntensity.of(v.image, v.modality) for v in self.volumes]
        named = [sum(t.concept is not None for t in v.targets) for v in self.volumes]
        self.named = np.minimum(np.asarray(named) / 8.0, 1.0)  # volumes with one named organ teach little of naming

    def whole_slice(self, targets: int) -> WholeSlice:
        """A whole slice with ``targets`` concepts: present here, elsewhere in the volume, or nowhere in it."""
        rng = self.rng
        chance = self.chance * self.named
        number = int(rng.choice(len(self.volumes), p=chance / chance.sum()))
        volume = self.volumes[number]
        z = int(rng.integers(volume.image.shape[0]))
        crop = self._whole_crop(volume)
        image = self._image(number, [z], crop)[0]
        known = [t for t in volume.targets if t.concept is not None]
        present = [t for t in known if volume.areas[t.name][z] > 0]
        dense = torch.full((len(CONCEPTS), self.size // 4, self.size // 4), -1.0)
        for name in volume.known:
            if name in CONCEPTS:
                dense[CONCEPTS.index(name)] = 0.0
        coarse = replace(crop, size=self.size // 4)
        if present:
            stack = torch.from_numpy(np.stack([volume.mask(t, z) for t in present]).astype(np.float32))
            dense[[t.concept for t in present]] = coarse.sample(stack)[:, 0]
        chosen: list[int] = [t.concept for t in rng.permutation(np.array(present, dtype=object))][: targets - 1]
        others = [CONCEPTS.index(n) for n in sorted(volume.known) if n in CONCEPTS]
        others = [c for c in others if c not in {t.concept for t in present}]
        rng.shuffle(others)
        chosen = [*chosen, *others][:targets]
        fine = replace(crop, size=TRUTH_SIZE)
        by_concept = {t.concept: t for t in present}
        truth = torch.zeros(len(chosen), TRUTH_SIZE, TRUTH_SIZE)
        rows = [i for i, c in enumerate(chosen) if c in by_concept]
        if rows:
            masks = np.stack([volume.mask(by_concept[chosen[i]], z) for i in rows]).astype(np.float32)
            truth[rows] = fine.sample(torch.from_numpy(masks))[:, 0]
        return WholeSlice(image, tuple(chosen), truth, z / max(1, volume.image.shape[0] - 1), dense)

    def whole_slice_of(self, number: int, target: Target | None, shown: bool) -> tuple[Tensor, float, Tensor]:
        """One whole slice of volume ``number``: image (3, S, S), height, truth (T, T) of ``target`` (None: absent).

        With ``shown`` the slice shows the target if the volume has it; otherwise any slice may come.
        """
        volume, rng = self.volumes[number], self.rng
        z = int(rng.integers(volume.image.shape[0]))
        planes: np.ndarray | None = None
        if target is not None:
            planes = volume.mask(target, slice(None))
            where = np.flatnonzero(planes.any(axis=(1, 2)))
            if shown and len(where):
                z = int(rng.choice(where))
        crop = self._whole_crop(volume)
        truth = torch.zeros(TRUTH_SIZE, TRUTH_SIZE)
        if planes is not None:
            plane = torch.from_numpy(planes[z : z + 1].astype(np.float32))
            truth = replace(crop, size=TRUTH_SIZE).sample(plane)[0, 0]
        return self._image(number, [z], crop)[0], z / max(1, volume.image.shape[0] - 1), truth

    def sheet(self, number: int, targets: Sequence[Target | None], count: int, rows: int) -> Sheet:
        """``count`` whole slices of volume ``number`` and ``rows`` of them for every target (None: absent).

        Half of the slices show one of the targets, in turn, where there is one; so do most of a target's rows.
        """
        volume, rng = self.volumes[number], self.rng
        depth = volume.image.shape[0]
        areas = np.stack([np.zeros(depth) if t is None else volume.areas[t.name].astype(np.float64) for t in targets])
        wanted = rng.permutation(np.flatnonzero(areas.any(axis=1)))
        turns = np.resize(wanted, count // 2) if len(wanted) else wanted
        showing = [int(rng.choice(np.flatnonzero(areas[k]))) for k in turns]
        z = np.sort([*showing, *rng.integers(depth, size=count - len(showing))])
        crop = self._whole_crop(volume)
        fine, shown, truth = replace(crop, size=TRUTH_SIZE), [], torch.zeros(len(targets), rows, TRUTH_SIZE, TRUTH_SIZE)
        for k, target in enumerate(targets):
            chance = np.where(areas[k, z] > 0, 4.0, 1.0)
            shown.append(rng.choice(count, size=rows, p=chance / chance.sum()))
            if target is not None:
                masks = torch.from_numpy(volume.mask(target, z[shown[-1]]).astype(np.float32))
                truth[k] = fine.sample(masks)[:, 0]
        share = torch.from_numpy(areas[:, z] / (volume.image.shape[1] * volume.image.shape[2])).float()
        heights = torch.from_numpy(z / max(1, depth - 1)).float()
        return Sheet(self._image(number, z, crop), heights, share, torch.from_numpy(np.stack(shown)), truth)

    def _whole_crop(self, volume: LabelledVolume) -> SliceCrop:
        """The whole slice, a little shifted and scaled."""
        plane = (int(volume.image.shape[1]), int(volume.image.shape[2]))
        crop = SliceCrop.whole(plane, volume.spacing[1:], self.size, MIN_MM_PER_PX)
        shift = self.rng.normal(0, 0.04, 2) * crop.extent_mm
        return replace(
            crop,
            center_mm=(crop.center_mm[0] + shift[0], crop.center_mm[1] + shift[1]),
            extent_mm=crop.extent_mm * float(self.rng.uniform(0.85, 1.2)),
        )

    def window(self, length: int = 1) -> Window:
        """``length`` slices in one direction from a slice that shows the object; the tail may run past its end."""
        rng = self.rng
        number = int(rng.choice(len(self.volumes), p=self.chance))
        volume = self.volumes[number]
        target = self._target(volume)
        areas = volume.areas[target.name]
        shown = np.flatnonzero(areas >= max(4, 0.02 * areas.max()))
        if len(shown) == 0:
            shown = np.flatnonzero(areas)
        z0 = int(rng.choice(shown)) if length == 1 or rng.random() < 0.4 else int(shown[len(shown) // 2])
        z = self._walk(z0, length, volume.image.shape[0], volume.spacing[0])
        masks = volume.mask(target, z)
        crop = self._window_crop(masks[0], volume)
        images = self._image(number, z, crop)
        truth = replace(crop, size=TRUTH_SIZE).sample(torch.from_numpy(masks.astype(np.float32)))[:, 0]
        boxes = np.full((length, 4), np.nan, dtype=np.float32)
        for row, mask in enumerate(masks):
            if mask.any():
                corners = crop.forward_points(box_prompt_2d(mask, rng, 0.08) + np.array([[-0.5], [0.5]]))
                boxes[row] = corners.reshape(-1)
        height = torch.as_tensor(z / max(1, volume.image.shape[0] - 1), dtype=torch.float32)
        guess = self._guess(number, target, z, crop, truth)
        window = Window(images, truth, boxes, guess, target.concept, height)
        return _turned(window, int(rng.integers(8)), self.size) if rng.random() < 0.5 else window

    def located(self, number: int, target: Target | None, place: Tensor, count: int) -> list[LocatedSlice]:
        """``count`` slices of one part of ``place``, drawn by size; none where the place is empty.

        With ``target`` None nothing is there: the scene made it up.
        """
        volume, rng, config = self.volumes[number], self.rng, NamedConfig()
        parts = parts_of(place)
        if not parts:
            return []
        sizes = np.array([part.found.sum() for part in parts], dtype=np.float64)
        part = parts[int(rng.choice(len(parts), p=sizes / sizes.sum()))]
        shape = volume.image.shape
        box = part.box(shape)
        factor = config.window_factor * float(rng.uniform(0.9, 1.2))
        crop = SliceCrop.around(box[:, 1:], volume.spacing[1:], factor, self.size, config.min_window_mm)
        shift = rng.uniform(-0.05, 0.05, 2) * crop.extent_mm
        crop = replace(crop, center_mm=(crop.center_mm[0] + shift[0], crop.center_mm[1] + shift[1]))
        beyond = max(1, round(config.locate_step_mm / volume.spacing[0]))  # the predictor looks a searched slice on
        low, high = max(0, int(box[0, 0]) - beyond), min(shape[0] - 1, int(box[1, 0]) + beyond)
        z = rng.integers(low, high + 1, count)
        rough = place_on_slices(part.place[None], crop, self.size // 4, z, shape)[0]
        truth = torch.zeros(count, TRUTH_SIZE, TRUTH_SIZE)
        if target is not None:
            masks = torch.from_numpy(volume.mask(target, z).astype(np.float32))
            truth = replace(crop, size=TRUTH_SIZE).sample(masks)[:, 0]
        images = self._image(number, z, crop)
        heights = z / max(1, shape[0] - 1)
        return [LocatedSlice(*row) for row in zip(images, rough.clamp(-8, 8), truth, heights.tolist(), strict=True)]

    def _guess(self, number: int, target: Target, z: np.ndarray, crop: SliceCrop, truth: Tensor) -> Tensor:
        """A rough mask (T, T', T') in [0, 1] to start from."""
        place = self.places(number, target) if self.places and self.rng.random() < 0.5 else None
        if place is not None:
            shape = self.volumes[number].image.shape
            return torch.sigmoid(place_on_slices(place[None], crop, TRUTH_SIZE, z, shape)[0])
        return self._blurred(truth, crop) if self.rng.random() < 0.5 else self._corrupt(truth)

    def _target(self, volume: LabelledVolume) -> Target:
        """Prefer neither huge nor tiny objects: weight by the cube root of size."""
        sizes = np.array([float(volume.areas[t.name].sum()) for t in volume.targets])
        weight = np.cbrt(sizes) * (sizes >= 30)
        if not weight.any():
            weight = sizes
        return volume.targets[int(self.rng.choice(len(sizes), p=weight / weight.sum()))]

    def _walk(self, z0: int, length: int, count: int, spacing: float) -> np.ndarray:
        """Slice indices from ``z0`` in a random direction, ``stride`` apart, clamped to the stack."""
        step = int(self.rng.choice([-1, 1]))
        most = max(1, round(6.0 / spacing))
        stride = int(self.rng.integers(1, most + 1)) * step
        return np.clip(z0 + stride * np.arange(length), 0, count - 1)

    def _window_crop(self, mask: np.ndarray, volume: LabelledVolume) -> SliceCrop:
        rng = self.rng
        box = box_prompt_2d(mask).astype(np.float64)
        crop = SliceCrop.around(box, volume.spacing[1:], float(rng.uniform(1.25, 2.6)), self.size, 12.0)
        shift = rng.uniform(-0.08, 0.08, 2) * crop.extent_mm
        return replace(crop, center_mm=(crop.center_mm[0] + shift[0], crop.center_mm[1] + shift[1]))

    def _image(self, number: int, z: Sequence[int] | np.ndarray, crop: SliceCrop) -> Tensor:
        """Sample, perturb and window slices (N, 3, S, S)."""
        rng, intensity = self.rng, self.intensities[number]
        raw = torch.from_numpy(self.volumes[number].image[np.asarray(z)].astype(np.float32))
        pixels = crop.sample(raw, pad=intensity.pad)
        if rng.random() < 0.7:
            span = intensity.span
            pixels = pixels * float(rng.uniform(0.9, 1.1)) + span * float(rng.normal(0, 0.03))
            noise = torch.from_numpy(rng.normal(0, 1, tuple(pixels.shape)).astype(np.float32))
            pixels = pixels + noise * span * float(rng.uniform(0, 0.05))
        if rng.random() < 0.2:  # a window whose scale the model cannot rely on, as in MR or exported pictures
            intensity = SliceIntensity.of(pixels.numpy(), Modality.OTHER)
        channels = intensity.channels(pixels[:, 0])
        if rng.random() < 0.3:
            gamma = float(np.exp(rng.normal(0, 0.25)))
            channels = ((channels + 1) / 2).clamp(0, 1) ** gamma * 2 - 1
        return channels

    def _blurred(self, truth: Tensor, crop: SliceCrop) -> Tensor:
        """The truth as whole-slice decoding leaves it: blurred to its coarse cells and off by up to half of one."""
        cell = 4 * MIN_MM_PER_PX / (crop.extent_mm / TRUTH_SIZE)
        sigma = float(self.rng.uniform(0.3, 0.8)) * cell
        shift = self.rng.uniform(-0.4, 0.4, 2) * cell
        out = []
        for plane in truth.numpy():
            moved = ndimage.shift(plane, shift, order=1)
            soft = ndimage.gaussian_filter(moved, sigma)
            out.append(np.clip(soft / max(float(soft.max()), 1e-3), 0, 1) if plane.any() else soft)
        return torch.from_numpy(np.stack(out).astype(np.float32))

    def _corrupt(self, truth: Tensor) -> Tensor:
        """A plausible wrong mask: shifted, grown or shrunk, with a bite taken out or a blob added."""
        rng = self.rng
        out = []
        for plane in truth.numpy() > 0.5:
            mask = np.roll(plane, tuple(int(s) for s in rng.integers(-4, 5, 2)), axis=(0, 1))
            steps = int(rng.integers(-3, 4))
            if steps > 0:
                mask = ndimage.binary_dilation(mask, iterations=steps)
            elif steps < 0:
                mask = ndimage.binary_erosion(mask, iterations=-steps)
            if rng.random() < 0.5:
                cy, cx = rng.integers(0, TRUTH_SIZE, 2)
                radius = int(rng.integers(3, 12))
                yy, xx = np.ogrid[:TRUTH_SIZE, :TRUTH_SIZE]
                mask = np.where((yy - cy) ** 2 + (xx - cx) ** 2 < radius**2, rng.random() < 0.3, mask)
            out.append(mask)
        return torch.from_numpy(np.stack(out).astype(np.float32))


def _turned(window: Window, turn: int, size: int) -> Window:
    """One of the eight flips and quarter turns; the object loses its name, because left and right no longer hold."""

    def turned(pixels: Tensor) -> Tensor:
        pixels = pixels.flip(-1) if turn & 4 else pixels
        return torch.rot90(pixels, turn & 3, dims=(-2, -1)).contiguous()

    corners = window.boxes.reshape(-1, 2, 2)
    if turn & 4:
        corners = np.stack([size - 1 - corners[..., 0], corners[..., 1]], axis=-1)
    for _ in range(turn & 3):  # torch.rot90 from y to x: (x, y) becomes (y, size - 1 - x)
        corners = np.stack([corners[..., 1], size - 1 - corners[..., 0]], axis=-1)
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).astype(np.float32)
    return replace(
        window,
        images=turned(window.images),
        truth=turned(window.truth),
        guess=turned(window.guess),
        boxes=boxes,
        concept=None,
    )
