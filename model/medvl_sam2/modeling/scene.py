"""Scene stream: image tokens that state what is where, read from a dense label map over the encoder's cells.

The mixer projector has to learn from text alone which of thousands of cells matter; from a thousand volumes it does
not. This third stream is trained with dense labels instead: a top-down path over the token maps predicts organs and
lesions in every cell of the stem, the map is measured (volume, place, attenuation), and every organ and the largest
lesions become one image token each. ``SceneConfig(lesions=0)`` leaves the stream out, as the published model does.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional

from medvl_sam2.config import ModelConfig

_CELL_CHANNELS = 3
_POSITION_CHANNELS = 21
_ORGAN_FEATURES = 14
_LESION_FEATURES = 20
_REFERENCE_MM = 300.0
_DEVIATION_SCALE = 5.0
_STAGES = 4
_NEIGHBOURS = np.ones((3, 3, 3), dtype=bool)


class SceneFacts(NamedTuple):
    """Measurements of a batch: ``organs`` (B, organs, F) and ``lesions`` (B, slots, G), largest lesion first."""

    organs: Tensor
    lesions: Tensor


class SceneReader(nn.Module):
    """Dense head over the encoder's maps, measurement, and one token per organ and lesion."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        vision, scene, hidden = config.vision, config.scene, config.language.hidden_size
        self.scene = scene
        self.organs = len(config.scene_organs)
        self.grids = [vision.grid(stage) for stage in range(_STAGES)]
        width = scene.width
        extra = [_CELL_CHANNELS, 0, 0, 0]
        self.lateral = nn.ModuleList(nn.Linear(vision.channels[n] + extra[n], width) for n in range(_STAGES))
        self.refine = nn.ModuleList(
            nn.Sequential(nn.Conv3d(width, width, 3, padding=1), nn.BatchNorm3d(width), nn.GELU())
            for _ in range(_STAGES - 1)
        )
        self.organ_head = nn.Sequential(
            nn.Linear(width + _POSITION_CHANNELS, 2 * width), nn.GELU(), nn.Linear(2 * width, self.organs)
        )
        self.lesion_head = nn.Sequential(
            nn.Conv3d(width + self.organs + _CELL_CHANNELS, width, 3, padding=1),
            nn.BatchNorm3d(width),
            nn.GELU(),
            nn.Conv3d(width, 1 + len(scene.kinds), 1),
        )
        for last in (self.organ_head[-1], self.lesion_head[-1]):
            nn.init.constant_(cast(Tensor, last.bias), -3.0)
        self.register_buffer("position", _positions(self.grids[0]), persistent=False)
        self.organ_token = _embedding(_ORGAN_FEATURES, hidden)
        self.lesion_token = _embedding(_LESION_FEATURES + self.organs, hidden)
        self.slots = nn.Parameter(torch.randn(self.organs + scene.lesions, hidden) * 0.02)

    def forward(self, images: Tensor, maps: list[Tensor]) -> Tensor:
        """Views (B, 1, D, H, W) and their token maps to logits (B, organs + 1 + kinds, d, h, w) on the stem's grid.

        Channels: share of each organ (with its lesions), any lesion, then the kind of lesion.
        """
        cells = _cell_values(images, self.grids[0])
        inputs = [torch.cat([maps[0], cells.flatten(2).transpose(1, 2).to(maps[0].dtype)], dim=-1), *maps[1:_STAGES]]
        fused: Tensor | None = None
        for stage in reversed(range(_STAGES)):
            level = self.lateral[stage](inputs[stage]).transpose(1, 2).unflatten(2, self.grids[stage])
            if fused is not None:
                level = level + functional.interpolate(fused, size=self.grids[stage], mode="nearest")
            fused = level + self.refine[stage](level) if stage < _STAGES - 1 else level
        assert fused is not None
        tokens = fused.flatten(2).transpose(1, 2)
        position = cast(Tensor, self.position).to(tokens.dtype).expand(len(tokens), -1, -1)
        organs = self.organ_head(torch.cat([tokens, position], dim=-1)).float()
        organs = organs.transpose(1, 2).unflatten(2, self.grids[0])
        shares = torch.sigmoid(organs.detach())
        deviation = _deviation(cells.float(), shares)
        lesions = self.lesion_head(torch.cat([fused, shares.to(fused.dtype), deviation.to(fused.dtype)], dim=1))
        return torch.cat([organs, lesions.float()], dim=1)

    def map_parameters(self) -> list[nn.Parameter]:
        """Parameters of the dense map, without the token embeddings."""
        return [p for part in (self.lateral, self.refine, self.organ_head, self.lesion_head) for p in part.parameters()]

    @torch.no_grad()
    def measure(self, images: Tensor, logits: Tensor, extent_mm: Tensor | None) -> SceneFacts:
        """Facts of every volume of a batch; not differentiable."""
        shares = torch.sigmoid(logits).float().cpu().numpy()
        mean = _cell_values(images.float(), self.grids[0])[:, 0].cpu().numpy()
        extents = np.full((len(images), 3), _REFERENCE_MM) if extent_mm is None else extent_mm.cpu().double().numpy()
        organs, lesions = [], []
        for row in range(len(images)):
            grid = _Grid(self.grids[0], extents[row])
            facts = np.stack([grid.organ(share, mean[row]) for share in shares[row, : self.organs]])
            organs.append(facts)
            lesions.append(self._lesions(shares[row], mean[row], grid, facts))
        device = images.device
        return SceneFacts(
            torch.from_numpy(np.stack(organs)).float().to(device),
            torch.from_numpy(np.stack(lesions)).float().to(device),
        )

    def embed(self, facts: SceneFacts) -> Tensor:
        """Image tokens (B, organs + lesions, hidden)."""
        tokens = torch.cat([self.organ_token(facts.organs), self.lesion_token(facts.lesions)], dim=1)
        return tokens + self.slots

    def _lesions(self, shares: np.ndarray, mean: np.ndarray, grid: _Grid, organs: np.ndarray) -> np.ndarray:
        """(slots, G): connected cells above the threshold, largest first; an empty slot is zero."""
        rows = np.zeros((self.scene.lesions, _LESION_FEATURES + self.organs))
        lesion, kinds = shares[self.organs], shares[self.organs + 1 :]
        parts, count = ndimage.label(lesion > self.scene.threshold, _NEIGHBOURS)
        if not count:
            return rows
        mass = ndimage.sum_labels(lesion, parts, np.arange(1, count + 1))
        for slot, part in enumerate(np.argsort(-mass)[: self.scene.lesions]):
            inside = parts == part + 1
            weight = lesion * inside
            total = float(weight.sum())
            volume = total * grid.cell_mm3
            centre = grid.centre(weight)
            spread = grid.spread(weight, centre)
            hosts = (shares[: self.organs] * weight).sum(axis=(1, 2, 3)) / total
            host = organs[int(hosts.argmax())]
            relative = (centre - host[5:8] * grid.extent) / np.maximum(host[8:11] * _REFERENCE_MM, 5.0)
            kind = (kinds * weight).sum(axis=(1, 2, 3)) / total
            core = weight >= 0.8 * weight.max()
            value = float(mean[core].mean())
            rows[slot] = [
                1.0, float(weight.max()), total / max(1, int(inside.sum())), np.log1p(volume / 1000) / 3,
                (6 * volume / np.pi) ** (1 / 3) / 30, *(spread / 10), *(centre / grid.extent),
                *np.clip(relative, -3, 3), *kind, value, value - host[11], *hosts,
            ]  # fmt: skip
        return rows


class _Grid:
    """Cell centres of one view in mm, and what can be measured on them."""

    def __init__(self, shape: tuple[int, int, int], extent: np.ndarray):
        self.extent = extent
        self.axes = [(np.arange(n) + 0.5) / n * edge for n, edge in zip(shape, extent, strict=True)]
        self.cell_mm3 = float(np.prod(extent / np.array(shape)))

    def centre(self, weight: np.ndarray) -> np.ndarray:
        total = max(float(weight.sum()), 1e-6)
        return np.array([(self._along(weight, n) * self.axes[n]).sum() / total for n in range(3)])

    def spread(self, weight: np.ndarray, centre: np.ndarray) -> np.ndarray:
        total = max(float(weight.sum()), 1e-6)
        squares = [(self._along(weight, n) * (self.axes[n] - centre[n]) ** 2).sum() / total for n in range(3)]
        return np.sqrt(np.array(squares))

    def organ(self, share: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """Presence, volume, centre, spread, attenuation and contact with the ends of the view, near unit scale."""
        weight = share * (share > 0.3)
        total = float(weight.sum())
        if total < 0.2:
            return np.concatenate([[float(share.max())], np.zeros(_ORGAN_FEATURES - 1)])
        centre = self.centre(weight)
        core = weight * weight
        ends = [float(weight[0].sum()), float(weight[-1].sum())]
        return np.array([
            float(share.max()), np.log1p(total * self.cell_mm3 / 1000) / 5, *((centre - self.extent / 2) / 100),
            *(centre / self.extent), *(self.spread(weight, centre) / _REFERENCE_MM),
            float((core * mean).sum() / core.sum()), *(np.array(ends) / total),
        ])  # fmt: skip

    @staticmethod
    def _along(weight: np.ndarray, axis: int) -> np.ndarray:
        return cast(np.ndarray, weight.sum(axis=tuple(n for n in range(3) if n != axis)))


def _embedding(features: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, hidden))


def _cell_values(images: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Mean, darkest and brightest smoothed value of every cell: (B, 3, d, h, w).

    The stem's strided one-axis kernels miss most voxels; noise only averages out over whole cells.
    """
    mean = functional.adaptive_avg_pool3d(images, grid)
    halves = functional.avg_pool3d(images, 2, stride=2)
    return torch.cat(
        [mean, -functional.adaptive_max_pool3d(-halves, grid), functional.adaptive_max_pool3d(halves, grid)], dim=1
    )


def _deviation(cells: Tensor, shares: Tensor) -> Tensor:
    """How far every cell value (B, 3, d, h, w) lies from the mean of its organ in this volume; 0 outside organs.

    A lesion is what differs from its own organ, whatever the contrast phase: that is told, not left to be found.
    """
    weight = shares * shares
    means = (weight * cells[:, :1]).sum(dim=(2, 3, 4)) / weight.sum(dim=(2, 3, 4)).clamp_min(1e-3)
    covered = shares.sum(dim=1, keepdim=True)
    expected = torch.einsum("bo,bodhw->bdhw", means, shares)[:, None] / covered.clamp_min(1e-3)
    return _DEVIATION_SCALE * (cells - expected) * covered.clamp(0, 1)


def _positions(grid: tuple[int, int, int]) -> Tensor:
    """Coordinates of the cells and three octaves of their sines and cosines: (1, cells, 21)."""
    axes = [torch.linspace(0, 1, n) if n > 1 else torch.zeros(1) for n in grid]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
    waves = [wave(place * torch.pi * octave) for octave in (1, 2, 4) for wave in (torch.sin, torch.cos)]
    return torch.cat([place - 0.5, *waves], dim=-1)[None]
