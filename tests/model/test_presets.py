"""The named sizes against what is published: parameter counts, tensor names and shapes; all without weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medvl_sam2.checkpoint import shipped_checkpoint
from medvl_sam2.config import ModelConfig
from medvl_sam2.errors import ConfigError
from medvl_sam2.modeling.dcformer import DCFormer
from medvl_sam2.modeling.language import build_language_model
from medvl_sam2.modeling.projector import MixerProjector
from medvl_sam2.modeling.slice_segmenter import SliceSegmenter
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.unified import UnifiedModel
from medvl_sam2.presets import LANGUAGE_PRESETS, PRESETS, SLICE_PRESETS, VISION_PRESETS, preset
from upstream_sam2 import upstream_sam2


def millions(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize(
    ("name", "tensors", "total", "encoder"),
    [
        ("sam2.1_tiny", 471, 38.96, 27.22),
        ("sam2.1_small", 519, 46.06, 34.32),
        ("sam2.1_base_plus", 615, 80.85, 69.11),
        ("sam2.1_large", 903, 224.45, 212.70),
    ],
)
def test_sam2_has_the_published_size_and_layout(name: str, tensors: int, total: float, encoder: float) -> None:
    with torch.device("meta"):
        ours, published = SliceSegmenter(SLICE_PRESETS[name]), upstream_sam2(name)
    assert millions(ours) == pytest.approx(total, abs=0.005)
    assert millions(ours.sam2.image_encoder) == pytest.approx(encoder, abs=0.005)
    state = {key: value.shape for key, value in ours.sam2.state_dict().items()}
    assert len(state) == tensors
    assert state == {key: value.shape for key, value in published.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "total"),
    [("nano", 0.79), ("naive", 5.85), ("tiny", 14.66), ("small", 18.24), ("base", 33.87), ("large", 185.13)],
)
def test_dcformer_has_the_published_size(name: str, total: float) -> None:
    config = VISION_PRESETS[f"dcformer_{name}"]
    with torch.device("meta"):
        encoder = DCFormer(config)
    assert millions(encoder) == pytest.approx(total, abs=0.005)
    assert [config.grid(stage) for stage in (3, 4)] == [(4, 8, 8), (2, 4, 4)]
    if name == "small":
        assert len(encoder.state_dict()) == 426
        assert [config.tokens(stage) for stage in range(5)] == [131072, 16384, 2048, 256, 32]


@pytest.mark.parametrize(("name", "total"), [("0.5b", 494.03), ("1.5b", 1543.71), ("7b", 7615.62)])
def test_qwen_has_the_published_size(name: str, total: float) -> None:
    with torch.device("meta"):
        model = build_language_model(LANGUAGE_PRESETS[f"qwen2.5_{name}"])
    assert millions(model) == pytest.approx(total, abs=0.005)


def test_paper_projector_has_the_published_size() -> None:
    config = preset("paper")
    with torch.device("meta"):
        projector = MixerProjector(config.vision, config.projector, config.language.hidden_size)
        maps = [torch.empty(1, config.vision.tokens(n), config.vision.channels[n]) for n in range(5)]
        assert projector(maps).shape == (1, 256, 3584)
    assert millions(projector) == pytest.approx(47.2, abs=0.05)


def test_every_preset_survives_json_and_others_are_refused() -> None:
    assert PRESETS == ("tiny", "small", "paper")
    for name in PRESETS:
        assert preset(name).name == name
        assert ModelConfig.from_json(preset(name).to_json()) == preset(name)
    with pytest.raises(ConfigError, match="known: tiny, small, paper"):
        preset("huge")


@pytest.mark.weights
def test_the_shipped_weights_are_the_tiny_preset() -> None:
    text = (shipped_checkpoint() / "config.json").read_text(encoding="utf-8")
    assert ModelConfig.from_json(text) == preset("tiny") == ModelConfig.tiny()


@pytest.mark.parametrize(
    ("name", "total", "additions"),
    [
        ("tiny", 10.748, {"language.scene", "language.pointer", "language.extent", "segmenter.height_token"}),
        ("small", 561.194, {"language.scene", "language.pointer", "language.extent", "segmenter.height_token"}),
        ("paper", 7919.493, {"segmenter.scorer"}),
    ],
)
def test_whole_models_hold_their_parts_and_no_others(name: str, total: float, additions: set[str]) -> None:
    tokenizer = Tokenizer.train([], 262)
    with torch.device("meta"):
        model = UnifiedModel(preset(name), tokenizer)
    published = {"language.vision", "language.projector", "language.lm", "language.seg_projector", "segmenter.sam2"}
    assert {".".join(key.split(".")[:2]) for key in model.state_dict()} == published | additions
    assert millions(model) == pytest.approx(total, abs=0.001)
