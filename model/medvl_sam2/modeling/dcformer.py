"""DCFormer volume encoder (decomposed convolutions; Med3DVLM, arXiv 2503.20047).

Module names follow the published layout (``s0.0.0.c1.0.weight``, ``s1.0.dwconv.c2.1.running_mean``,
``s3.0.mlp.mlp.0.weight``, ``s4.0.scale`` ...), and the feature maps are held as (B, C, H, W, D) like there, so a
converter only has to strip the prefix ``vision_encoder.encoder.``; no kernel needs a transpose.

Departures from the published forward pass, each undone by the presets of :mod:`medvl_sam2.presets`: ``smoothing``
blurs the input before the stem, ``stem_activation`` puts the described GELU into it, which the published code leaves
out by a slip, and ``layer_scale`` is the start value of the residual scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from medvl_sam2.config import VisionConfig
from medvl_sam2.errors import ConfigError


class AxialConv(nn.Module):
    """Three parallel one-axis convolutions (along H, W, D), each with BatchNorm, summed."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True):
        super().__init__()
        self.c1 = self._branch(inputs, outputs, kernel, stride, groups, axis=0)
        self.c2 = self._branch(inputs, outputs, kernel, stride, groups, axis=1)
        self.c3 = self._branch(inputs, outputs, kernel, stride, groups, axis=2)
        self.act: nn.Module = nn.GELU() if act else nn.Identity()

    @staticmethod
    def _branch(inputs: int, outputs: int, kernel: int, stride: int, groups: int, axis: int) -> nn.Sequential:
        size, padding = [1, 1, 1], [0, 0, 0]
        size[axis], padding[axis] = kernel, kernel // 2
        conv = nn.Conv3d(
            inputs,
            outputs,
            (size[0], size[1], size[2]),
            stride=stride,
            padding=(padding[0], padding[1], padding[2]),
            groups=groups,
        )
        return nn.Sequential(conv, nn.BatchNorm3d(outputs))

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C_in, H, W, D) to (B, C_out, H/stride, W/stride, D/stride)."""
        return cast(Tensor, self.act(self.c1(maps) + self.c2(maps) + self.c3(maps)))


class TokenMLP(nn.Module):
    """Linear-GELU-Linear over channels with the published key names ``mlp.0`` and ``mlp.3``."""

    def __init__(self, channels: int, ratio: int = 4):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(channels, ratio * channels),
            nn.GELU(),
            nn.Identity(),
            nn.Linear(ratio * channels, channels),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        return cast(Tensor, self.mlp(tokens))


class DCBlock(nn.Module):
    """``x + scale * MLP(depthwise AxialConv(x))``; the first block of a stage halves the grid and widens first."""

    def __init__(self, inputs: int, outputs: int, kernel: int, scale: float, downsample: bool):
        super().__init__()
        self.pool: nn.Module | None = nn.MaxPool3d(3, stride=2, padding=1) if downsample else None
        self.proj: nn.Module | None = nn.Conv3d(inputs, outputs, 1, bias=False) if downsample else None
        self.dwconv = AxialConv(outputs, outputs, kernel, groups=outputs, act=False)
        self.mlp = TokenMLP(outputs)
        self.scale = nn.Parameter(torch.full((outputs,), scale))

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W, D) to (B, C', H', W', D')."""
        if self.pool is not None and self.proj is not None:
            maps = self.proj(self.pool(maps))
        update = self.mlp(self.dwconv(maps).movedim(1, -1)) * self.scale
        return maps + update.movedim(-1, 1)


class DCFormer(nn.Module):
    """Stem and four stages; every one of the five token maps is returned."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        if len(config.blocks) != 5 or len(config.channels) != 5 or len(config.kernels) != 4 or config.blocks[0] != 1:
            raise ConfigError(
                f"DCFormer needs 5 blocks (the first 1), 5 channels and 4 kernels; got blocks {config.blocks}, "
                f"channels {config.channels}, kernels {config.kernels}"
            )
        self.config = config
        self._checkpointed = False
        if config.smoothing < 1 or config.smoothing % 2 == 0:
            raise ConfigError(f"smoothing {config.smoothing} must be an odd number of voxels; 1 switches it off")
        width = config.channels[0]
        act = config.stem_activation
        stem = [AxialConv(1, width, 7, stride=4, act=act), *(AxialConv(width, width, 3, act=act) for _ in range(3))]
        self.s0 = nn.Sequential(nn.Sequential(*stem))
        self.s1 = self._stage(1)
        self.s2 = self._stage(2)
        self.s3 = self._stage(3)
        self.s4 = self._stage(4)

    def _stage(self, number: int) -> nn.Sequential:
        config = self.config
        before, width, kernel = config.channels[number - 1], config.channels[number], config.kernels[number - 1]
        first = DCBlock(before, width, kernel, config.layer_scale, downsample=True)
        count = config.blocks[number] - 1
        rest = [DCBlock(width, width, kernel, config.layer_scale, downsample=False) for _ in range(count)]
        return nn.Sequential(first, *rest)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 1, D, H, W) in [0, 1], canonical axes, to five token maps (B, d*h*w, C), depth-major.

        The grid of map ``n`` is ``config.grid(n)`` when the input has ``config.input_size``.
        """
        maps = images.permute(0, 1, 3, 4, 2)  # published order (H, W, D)
        if self.config.smoothing > 1:
            size = self.config.smoothing
            maps = functional.avg_pool3d(maps, size, stride=1, padding=size // 2, count_include_pad=False)
        tokens = []
        for stage in (self.s0, self.s1, self.s2, self.s3, self.s4):
            maps = self._checkpoint(stage, maps) if self._checkpointed and self.training else stage(maps)
            tokens.append(maps.permute(0, 4, 2, 3, 1).flatten(1, 3))
        return tokens

    def activation_checkpointing_enable(self) -> None:
        """From now on keep only the input of each stage while training, and compute the rest again for the gradient.

        Named as in transformers.
        """
        self._checkpointed = True

    @staticmethod
    def _checkpoint(stage: nn.Sequential, maps: Tensor) -> Tensor:
        contexts = (nullcontext(), _without_counting(stage))
        return cast(Tensor, checkpoint(stage, maps, use_reentrant=False, context_fn=lambda: contexts))


@contextmanager
def _without_counting(stage: nn.Module) -> Iterator[None]:
    """Normalise by the batch without adding it to the running statistics: those have counted it the first time."""
    norms = [part for part in stage.modules() if isinstance(part, nn.BatchNorm3d)]
    kept = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms if norm.num_batches_tracked is not None]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked = count
