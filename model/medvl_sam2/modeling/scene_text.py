"""SigLIP head over the measured scene: volumes and texts in one space without an encoder of its own.

The published head pools the encoder's last map, and the encoder learns from pairs alone what reports speak of. The
unified model's scene has measured that already (:mod:`~medvl_sam2.modeling.scene_facts`), so a small head over its
measurements learns from a thousand pairs, and its batches are large because nothing is encoded again.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from medvl_sam2.config import ModelConfig, SceneSideConfig
from medvl_sam2.errors import ConfigError
from medvl_sam2.modeling.scene_facts import LESION_FEATURES, ORGAN_FEATURES
from medvl_sam2.modeling.scene_measured import MeasuredScene
from medvl_sam2.modeling.siglip import SiglipHead, TextSide
from medvl_sam2.modeling.tokenizer import Tokenizer

_REFERENCE_MM = 300.0
_LEAST_SCALE = 1e-3
_LARGEST = 5.0
"""Standardised measurements beyond it are cut: some organs are almost never out of view."""


class SceneSide(nn.Module):
    """A measured scene to features (B, hidden_size)."""

    def __init__(self, organs: int, config: SceneSideConfig) -> None:
        super().__init__()
        whole, lesion = organs * ORGAN_FEATURES + 3, LESION_FEATURES + organs
        self.noise, self.missed = config.noise, config.missed
        for name, size in (("whole", whole), ("lesion", lesion)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_scale", torch.ones(size))
        self.lesion = nn.Sequential(
            nn.Linear(lesion, config.lesion_size), nn.GELU(), nn.Linear(config.lesion_size, config.lesion_size)
        )
        hidden = config.hidden_size
        self.layers = nn.Sequential(
            nn.Linear(whole + config.lesion_size, hidden), nn.GELU(), nn.Dropout(config.dropout),
            nn.Linear(hidden, hidden), nn.GELU(), nn.Dropout(config.dropout),
        )  # fmt: skip

    @torch.no_grad()
    def standardise(self, scenes: MeasuredScene) -> None:
        """Take mean and spread of every measurement from ``scenes``; empty lesion slots do not count."""
        rows = (self._whole(scenes), scenes.lesions[scenes.lesions[..., 0] > 0])
        for name, values in zip(("whole", "lesion"), rows, strict=True):
            if len(values) > 1:
                cast(Tensor, getattr(self, f"{name}_mean")).copy_(values.mean(dim=0))
                cast(Tensor, getattr(self, f"{name}_scale")).copy_(values.std(dim=0).clamp_min(_LEAST_SCALE))

    def forward(self, scenes: MeasuredScene) -> Tensor:
        """Features (B, hidden_size)."""
        there = (scenes.lesions[..., :1] > 0).float()
        if self.training:
            there = there * (torch.rand_like(there) >= self.missed)
        lesions = (self.lesion(self._scaled("lesion", scenes.lesions)) * there).sum(dim=1)
        return cast(Tensor, self.layers(torch.cat([self._scaled("whole", self._whole(scenes)), lesions], dim=-1)))

    def _scaled(self, name: str, values: Tensor) -> Tensor:
        mean, scale = (cast(Tensor, getattr(self, f"{name}_{part}")) for part in ("mean", "scale"))
        scaled = ((values - mean) / scale).clamp(-_LARGEST, _LARGEST)
        return scaled + self.noise * torch.randn_like(scaled) if self.training else scaled

    @staticmethod
    def _whole(scenes: MeasuredScene) -> Tensor:
        extent = torch.log(scenes.extent_mm.clamp_min(1.0) / _REFERENCE_MM)
        return torch.cat([scenes.organs.flatten(1), extent], dim=-1)


class SceneHead(SiglipHead):
    """SigLIP head with a :class:`SceneSide` before the projection of volumes."""

    def __init__(self, config: ModelConfig, pad_id: int = 0) -> None:
        """Raises :class:`ConfigError` when ``config`` has no scene or describes no head over one."""
        if config.alignment is None or config.alignment.scene is None or not config.scene.lesions:
            raise ConfigError("the configuration has no scene or no 'alignment.scene'; take that of a scene head's run")
        super().__init__(config.vision, config.alignment, pad_id, config.alignment.scene.hidden_size)
        self.side = config.alignment.scene
        self.scene = SceneSide(len(config.scene_organs), self.side)

    def embed_scenes(self, scenes: MeasuredScene) -> Tensor:
        """Unit vectors (B, width)."""
        return functional.normalize(self.mm_vision_proj(self.scene(scenes)).float(), dim=-1)


class SceneTextModel(TextSide):
    """SigLIP head over the scene of the unified model it lies beside: see :class:`SceneSideConfig`."""

    alignment: SceneHead

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        """Raises :class:`ConfigError` when ``config`` has no scene or describes no head over one."""
        super().__init__(config, tokenizer)
        self.alignment = SceneHead(config, self.pad_id)

    @property
    def reads(self) -> str:
        """Digest of the weights whose scene this head was trained on."""
        return self.alignment.side.weights_sha256

    def embed_scenes(self, scenes: MeasuredScene) -> Tensor:
        """Unit vectors (B, width) of :func:`~medvl_sam2.modeling.scene_measured.measured_scene`."""
        return self.alignment.embed_scenes(scenes)
