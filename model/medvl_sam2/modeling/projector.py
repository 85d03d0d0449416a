"""Dual-stream MLP-Mixer projector: two token maps of the volume encoder to image tokens (Med3DVLM)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from medvl_sam2.config import ProjectorConfig, VisionConfig
from medvl_sam2.errors import ConfigError


class MixerLayer(nn.Module):
    """LayerNorm, token MLP, LayerNorm, channel MLP; no residual, so both counts may change."""

    def __init__(self, tokens_in: int, tokens_out: int, channels_in: int, channels_out: int):
        super().__init__()
        self.ln1 = nn.LayerNorm(channels_in)
        self.mlp1 = nn.Sequential(nn.Linear(tokens_in, tokens_out), nn.GELU(), nn.Linear(tokens_out, tokens_out))
        self.ln2 = nn.LayerNorm(channels_in)
        self.mlp2 = nn.Sequential(
            nn.Linear(channels_in, channels_out), nn.GELU(), nn.Linear(channels_out, channels_out)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, tokens_in, channels_in) to (B, tokens_out, channels_out)."""
        tokens = self.mlp1(self.ln1(tokens).transpose(1, 2)).transpose(1, 2)
        return cast(Tensor, self.mlp2(self.ln2(tokens)))


class MixerProjector(nn.Module):
    """Low (fine) and high (coarse) streams, each a stack of mixer layers; outputs are concatenated, low first.

    The channel width doubles from layer to layer up to the width of the language model.
    """

    def __init__(self, vision: VisionConfig, config: ProjectorConfig, width: int):
        super().__init__()
        low, high = vision.taps
        self.taps = vision.taps
        self.low_mixer = self._stream(vision.tokens(low), vision.channels[low], config.low_tokens, width)
        self.high_mixer = self._stream(vision.tokens(high), vision.channels[high], config.high_tokens, width)

    @staticmethod
    def _stream(tokens: int, channels: int, counts: tuple[int, ...], width: int) -> nn.Sequential:
        if not counts or width % 2 ** (len(counts) - 1):
            raise ConfigError(f"width {width} cannot be halved {len(counts) - 1} times; change the projector depth")
        layers: list[nn.Module] = []
        for index, count in enumerate(counts):
            wider = width // 2 ** (len(counts) - 1 - index)
            layers.append(MixerLayer(tokens, count, channels, wider))
            tokens, channels = count, wider
        return nn.Sequential(*layers)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Token maps of the encoder (five of (B, n, C)) to image tokens (B, image_tokens, width)."""
        low, high = self.taps
        return torch.cat([self.low_mixer(maps[low]), self.high_mixer(maps[high])], dim=1)
