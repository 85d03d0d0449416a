"""Scene stream: image tokens that state what is where, read from a dense map of organs and lesions.

The mixer projector has to learn from text alone which of thousands of cells matter; from a thousand volumes it does
not. This third stream is trained with dense labels instead. A top-down path over the encoder's token maps names the
organs on the stem's grid; a fine level, two pixels of the view wide, sharpens them and finds lesions. The map is
measured (volume, place, attenuation), and every organ and the largest lesions become one image token each.
``SceneConfig(lesions=0)`` leaves the stream out, as the published model does.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from medvl_sam2.config import ModelConfig
from medvl_sam2.errors import ConfigError
from medvl_sam2.modeling.lesion_judge import LesionJudge, LesionWords
from medvl_sam2.modeling.scene_facts import LESION_FEATURES, ORGAN_FEATURES, SceneFacts, measure_scene

_CELL_CHANNELS = 3
_POSITION_CHANNELS = 21
_FINE_INPUTS = 6
_DEVIATION_SCALE = 5.0
_SLOT_SCALE = 0.25
"""About as large as the embedded measurements; with less, the language model cannot tell the organs' tokens apart."""
_STAGES = 4


class CoarseScene(NamedTuple):
    """What the top-down path says on the stem's grid.

    ``features`` (B, width, d, h, w); ``organs`` (B, organs, d, h, w) as logits; (B, 1, d, h, w) each: the value
    ``expected`` of plain tissue of the cell's organs, and the share ``covered`` by organs.
    """

    features: Tensor
    organs: Tensor
    expected: Tensor
    covered: Tensor


class SceneReader(nn.Module):
    """Dense map over the encoder's tokens and the view, measurement, and one token per organ and lesion."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        vision, scene, hidden = config.vision, config.scene, config.language.hidden_size
        if any(n % 4 for n in vision.input_size):
            raise ConfigError(
                f"a scene needs a view of multiples of 4, not {vision.input_size}; or SceneConfig(lesions=0)"
            )
        self.scene = scene
        self.organs = len(config.scene_organs)
        self.grids = [vision.grid(stage) for stage in range(_STAGES)]
        self.grid = config.scene_grid
        width, detail = scene.width, scene.detail
        extra = [_CELL_CHANNELS, 0, 0, 0]
        self.lateral = nn.ModuleList(nn.Linear(vision.channels[n] + extra[n], width) for n in range(_STAGES))
        self.refine = nn.ModuleList(_conv(width, width) for _ in range(_STAGES - 1))
        self.organ_head = nn.Sequential(
            nn.Linear(width + _POSITION_CHANNELS, 2 * width), nn.GELU(), nn.Linear(2 * width, self.organs)
        )
        self.bridge = nn.Conv3d(width, detail, 1)
        self.fine = nn.ModuleList([_conv(_FINE_INPUTS, detail), _conv(2 * detail, detail), _conv(detail, detail)])
        self.fine_organs = nn.Conv3d(detail, self.organs, 1)
        self.lesion_head = nn.Sequential(
            _conv(detail + _FINE_INPUTS, detail), nn.Conv3d(detail, 1 + len(scene.kinds), 1)
        )
        for last in (self.organ_head[-1], self.lesion_head[-1]):
            nn.init.constant_(cast(Tensor, last.bias), -3.0)
        self.register_buffer("position", _positions(self.grids[0]), persistent=False)
        self.judge = LesionJudge(self.organs, len(scene.kinds)) if scene.judge else None
        self.words = LesionWords(self.organs, len(scene.kinds), hidden) if scene.judge else None
        self.organ_token = _embedding(ORGAN_FEATURES, hidden)
        self.lesion_token = _embedding(LESION_FEATURES + self.organs, hidden)
        self.slots = nn.Parameter(torch.randn(self.organs + scene.lesions, hidden) * _SLOT_SCALE)

    def forward(self, images: Tensor, maps: list[Tensor]) -> Tensor:
        """Views (B, 1, D, H, W) and their token maps to logits (B, organs + 1 + kinds, D, H/2, W/2).

        Channels: share of each organ (with its lesions), any lesion, then the kind of lesion.
        """
        return self.sharpen(images, self.coarse(images, maps))

    def coarse(self, images: Tensor, maps: list[Tensor]) -> CoarseScene:
        """The top-down path: organs on the stem's grid."""
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
        expected, covered = _expected(cells[:, :1].float(), torch.sigmoid(organs.detach()))
        return CoarseScene(fused, organs, expected, covered)

    def sharpen(self, images: Tensor, coarse: CoarseScene, rows: tuple[int, int] | None = None) -> Tensor:
        """The fine level: logits (B, organs + 1 + kinds, planes, H/2, W/2).

        Training sharpens only the planes that lie in the stem's ``rows`` (first, end), which is cheaper; one row more
        on either side is read, as far as the convolutions reach, so that they are sharpened as in the whole. A lesion
        is what differs from its own organ, whatever the contrast phase: the deviation is told, not left to be found.
        """
        whole = (0, self.grids[0][0])
        wanted = rows or whole
        rows = (max(0, wanted[0] - 1), min(whole[1], wanted[1] + 1))
        planes, kept = self.planes(rows), self.planes(wanted)
        pixels = functional.pixel_unshuffle(images[:, 0, planes], 2).unflatten(1, (-1, 4)).transpose(1, 2)
        expected, covered = (self._upsampled(t, rows) for t in (coarse.expected, coarse.covered))
        deviation = _DEVIATION_SCALE * (pixels.mean(dim=1, keepdim=True) - expected) * covered.clamp(0, 1)
        inputs = torch.cat([pixels, deviation, covered], dim=1).to(coarse.features.dtype)
        context = self._upsampled(self.bridge(coarse.features), rows)
        first, joined, last = self.fine
        detail = joined(torch.cat([first(inputs), context], dim=1))
        detail = detail + last(detail)
        organs = self._upsampled(coarse.organs, rows) + self.fine_organs(detail).float()
        lesions = self.lesion_head(torch.cat([detail, inputs], dim=1)).float()
        return torch.cat([organs, lesions], dim=1)[:, :, kept.start - planes.start : kept.stop - planes.start]

    def planes(self, rows: tuple[int, int]) -> slice:
        """Planes of the view that lie in the stem's rows (first, end)."""
        thick = self.grid[0] // self.grids[0][0]
        return slice(rows[0] * thick, rows[1] * thick)

    def _upsampled(self, cells: Tensor, rows: tuple[int, int]) -> Tensor:
        """Stem cells (B, C, d, h, w) interpolated to the scene's cells of those rows, one row of neighbours read."""
        low, high = max(0, rows[0] - 1), min(cells.shape[2], rows[1] + 1)
        around, wanted = self.planes((low, high)), self.planes(rows)
        size = (around.stop - around.start, *self.grid[1:])
        near = functional.interpolate(cells[:, :, low:high], size=size, mode="trilinear", align_corners=False)
        return near[:, :, wanted.start - around.start : wanted.stop - around.start]

    def map_parameters(self) -> list[nn.Parameter]:
        """Parameters of the dense map and of the judge, which is fitted, not trained; not the token embeddings."""
        embedders = [part for part in (self.organ_token, self.lesion_token, self.words) if part is not None]
        tokens = {id(p) for part in embedders for p in part.parameters()}
        return [p for p in self.parameters() if id(p) not in tokens and p is not self.slots]

    @torch.no_grad()
    def measure(self, images: Tensor, logits: Tensor, extent_mm: Tensor | None) -> SceneFacts:
        """Facts of every volume of a batch; not differentiable."""
        mean = functional.avg_pool3d(images.float(), (1, 2, 2))[:, 0]
        return measure_scene(logits, mean, extent_mm, self.organs, self.scene.lesions, self.scene.threshold)

    def judged(self, facts: SceneFacts) -> SceneFacts:
        """The measurements with the judge's word on the kinds of lesions, where there is a judge."""
        return facts if self.judge is None else SceneFacts(facts.organs, self.judge(facts.lesions))

    def embed(self, facts: SceneFacts) -> Tensor:
        """Image tokens (B, organs + lesions, hidden)."""
        lesions = self.judged(facts).lesions
        lesion_tokens = self.lesion_token(lesions)
        if self.words is not None:
            lesion_tokens = lesion_tokens + self.words(lesions)
        return torch.cat([self.organ_token(facts.organs), lesion_tokens], dim=1) + self.slots


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(inputs, outputs, 3, padding=1), nn.BatchNorm3d(outputs), nn.GELU())


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


def _expected(mean: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """What every cell would look like if it were plain tissue of its organs, and how much of it is organ.

    ``mean`` (B, 1, d, h, w) and organ ``shares`` (B, organs, d, h, w) -> two (B, 1, d, h, w).
    """
    weight = shares * shares
    means = (weight * mean).sum(dim=(2, 3, 4)) / weight.sum(dim=(2, 3, 4)).clamp_min(1e-3)
    covered = shares.sum(dim=1, keepdim=True)
    expected = torch.einsum("bo,bodhw->bdhw", means, shares)[:, None] / covered.clamp_min(1e-3)
    return expected, covered


def _positions(grid: tuple[int, int, int]) -> Tensor:
    """Coordinates of the cells and three octaves of their sines and cosines: (1, cells, 21)."""
    axes = [torch.linspace(0, 1, n) if n > 1 else torch.zeros(1) for n in grid]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
    waves = [wave(place * torch.pi * octave) for octave in (1, 2, 4) for wave in (torch.sin, torch.cos)]
    return torch.cat([place - 0.5, *waves], dim=-1)[None]
