"""DCFormer against a reference written here from its description, which shares no module with ours.

The stem has no activation in the published code (``VisionConfig.stem_activation``), whatever the description says. Run
beside that code at the same weights, nano and small are equal to it bit by bit in every map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medvl_sam2.modeling.dcformer import DCFormer
from medvl_sam2.presets import VISION_PRESETS

VIEW = (32, 48, 64)
TOLERANCE = 3e-5
"""Relative. Measured 5e-6 where numbers reach 9: sums are taken in another order."""


def axial(state: Mapping[str, Tensor], name: str, maps: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
    """Sum of three one-axis convolutions, each normalised by its running statistics."""
    total = torch.zeros(())
    for branch in ("c1", "c2", "c3"):
        weight = state[f"{name}.{branch}.0.weight"]
        padding = [size // 2 for size in weight.shape[2:]]
        line = F.conv3d(maps, weight, state[f"{name}.{branch}.0.bias"], stride, padding, groups=groups)
        scale, shift, mean, variance = (
            state[f"{name}.{branch}.1.{part}"][:, None, None, None]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        total = total + (line - mean) / (variance + 1e-5).sqrt() * scale + shift
    return total


def reference(state: Mapping[str, Tensor], blocks: tuple[int, ...], images: Tensor, stem_act: bool) -> list[Tensor]:
    """Token maps of (B, 1, D, H, W): the stem divides by four, every later stage by two."""
    maps, tokens = images.permute(0, 1, 3, 4, 2), []
    for layer in range(4):
        maps = axial(state, f"s0.0.{layer}", maps, stride=1 if layer else 4)
        maps = F.gelu(maps) if stem_act else maps
    for stage, count in enumerate(blocks):
        for block in range(count if stage else 0):
            name = f"s{stage}.{block}"
            if block == 0:
                maps = torch.einsum(
                    "bihwd,oi->bohwd", F.max_pool3d(maps, 3, 2, 1), state[f"{name}.proj.weight"][..., 0, 0, 0]
                )
            mixed = axial(state, f"{name}.dwconv", maps, groups=maps.shape[1]).movedim(1, -1)
            hidden = F.gelu(F.linear(mixed, state[f"{name}.mlp.mlp.0.weight"], state[f"{name}.mlp.mlp.0.bias"]))
            update = F.linear(hidden, state[f"{name}.mlp.mlp.3.weight"], state[f"{name}.mlp.mlp.3.bias"])
            maps = maps + (state[f"{name}.scale"] * update).movedim(-1, 1)
        tokens.append(torch.stack([maps[..., depth].flatten(2) for depth in range(maps.shape[-1])], 2).flatten(2).mT)
    return tokens


def randomised(name: str, **changes: float) -> DCFormer:
    """A preset with random statistics and scales, which start at values that hide mistakes."""
    torch.manual_seed(0)
    encoder = DCFormer(replace(VISION_PRESETS[name], input_size=VIEW, **changes)).eval()
    for key, value in encoder.state_dict().items():
        if key.endswith(("running_mean", "running_var", "scale", "1.weight", "1.bias")):
            value.copy_(torch.rand_like(value) + 0.5)
    return encoder


@torch.no_grad()
@pytest.mark.parametrize("stem_act", [False, True], ids=["published stem", "described stem"])
@pytest.mark.parametrize("name", ["dcformer_nano", "dcformer_small"])
def test_forward_equals_the_description(name: str, stem_act: bool) -> None:
    encoder, images = randomised(name, stem_activation=stem_act), torch.rand(2, 1, *VIEW)
    ours = encoder(images)
    theirs = reference(encoder.state_dict(), encoder.config.blocks, images, stem_act)
    assert [m.shape for m in ours] == [(2, encoder.config.tokens(n), encoder.config.channels[n]) for n in range(5)]
    for mine, expected in zip(ours, theirs, strict=True):
        assert expected.std() > 0.01
        assert float((mine - expected).abs().max()) <= TOLERANCE * max(1.0, float(expected.abs().max()))


@torch.no_grad()
def test_smoothing_departs_from_the_published_forward_and_scale_starts_as_published() -> None:
    images = torch.rand(1, 1, *VIEW)
    published, smoothed = randomised("dcformer_nano"), randomised("dcformer_nano", smoothing=3)
    assert not torch.allclose(published(images)[0], smoothed(images)[0], atol=1e-3)
    assert (DCFormer(VISION_PRESETS["dcformer_nano"]).state_dict()["s1.0.scale"] == 1e-6).all()


def test_published_maps_at_the_published_view() -> None:
    with torch.device("meta"):
        maps = DCFormer(VISION_PRESETS["dcformer_small"])(torch.empty(1, 1, 128, 256, 256))
    expected = [(131072, 64), (16384, 96), (2048, 192), (256, 384), (32, 768)]
    assert [tuple(m.shape[1:]) for m in maps] == expected
