"""A unified model small enough for tests: random weights, every part real."""

from __future__ import annotations

import numpy as np
import torch

from medvl_sam2.checkpoint import CheckpointMeta
from medvl_sam2.config import LanguageConfig, ModelConfig, ProjectorConfig, SliceConfig, VisionConfig
from medvl_sam2.modeling.prompts import REPORT_PROMPTS, segment_prompt
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.unified import UnifiedModel
from medvl_sam2.predictor import Predictor
from medvl_sam2.types import Geometry, Modality, Volume
from medvl_sam2.vocabulary import CLASSES, spoken

SMALL_SLICES = SliceConfig(
    image_size=64, embed_dim=16, stages=(1, 1, 2, 1), global_att_blocks=(3,), window_spec=(4, 4, 4, 2), d_model=32,
    memory_dim=16, memory_layers=1, memory_ffn=32, decoder_mlp=32, window_pos_embed_size=(4, 4),
)  # fmt: skip
SMALL = ModelConfig(
    name="test",
    vision=VisionConfig(input_size=(32, 32, 32), channels=(8, 8, 8, 16, 16)),
    projector=ProjectorConfig(low_tokens=(8, 4), high_tokens=(4, 4)),
    language=LanguageConfig(vocab_size=400, hidden_size=32, intermediate_size=64, layers=2, heads=2, kv_heads=1),
    slices=SMALL_SLICES,
    classes=CLASSES,
)


def small_model(seed: int = 0) -> UnifiedModel:
    """Random weights from a seed."""
    texts = [segment_prompt([spoken(name)]) for name in CLASSES] + list(REPORT_PROMPTS)
    tokenizer = Tokenizer.train(texts, SMALL.language.vocab_size)
    torch.manual_seed(seed)
    return UnifiedModel(SMALL, tokenizer).eval()


def small_predictor(seed: int = 0) -> Predictor:
    """Predictor over :func:`small_model`."""
    return Predictor(small_model(seed), CheckpointMeta(name="test", version="0", notice="random test weights"))


def oblique_volume(shape: tuple[int, int, int] = (40, 34, 18)) -> tuple[Volume, np.ndarray]:
    """An anisotropic, permuted, flipped and tilted CT with one bright ellipsoid; returns it with the true mask."""
    angle = np.deg2rad(12)
    tilt = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    axes = np.array([[0, 0, 4.0], [-1.5, 0, 0], [0, 2.0, 0]])  # i to Anterior-negative, j to Superior, k to Right
    affine = np.eye(4)
    affine[:3, :3] = tilt @ axes
    affine[:3, 3] = (12.0, -30.0, 55.0)
    i, j, k = np.ogrid[: shape[0], : shape[1], : shape[2]]
    inside = ((i - 15) / 9.0) ** 2 + ((j - 20) / 7.0) ** 2 + ((k - 9) / 4.0) ** 2 <= 1
    rng = np.random.default_rng(3)
    array = (np.where(inside, 120, 20) + rng.normal(0, 8, shape)).astype(np.int16)
    return Volume(array, Geometry(shape, affine), Modality.CT), inside
