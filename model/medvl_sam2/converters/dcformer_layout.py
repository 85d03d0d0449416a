"""DCFormer alone, with its SigLIP partner (Med3DVLM's ``DEC_CLIP``), and as the older CT-CLIP checkpoint.

The text tower and the projections of ``DEC_CLIP`` become the part ``siglip``:

=====================  ======================================================================
``text_encoder.*``     DistilBERT under transformers' own names
``image_projection.*`` Linear from the mean of the deepest token map to the shared space
``text_projection.*``  Linear from the [CLS] state to the shared space
``temperature``        t' of SigLIP: logits = exp(t') * similarity + bias
``bias``               the bias of SigLIP
=====================  ======================================================================
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DistilBertConfig, DistilBertModel

from medvl_sam2.config import ModelConfig
from medvl_sam2.converters.keymap import Drop, KeyMap, Rename
from medvl_sam2.converters.layout import Layout, Target
from medvl_sam2.converters.parts import SIGLIP, VISION, PartTarget, model_part, tensors_of
from medvl_sam2.converters.source import WeightSource
from medvl_sam2.presets import VISION_PRESETS

SIGLIP_KEYS: KeyMap = (
    Rename(r"vision_encoder\.encoder\.(s\d\..+)", rf"{VISION}/\1"),
    Drop(r"language_encoder\.embeddings\.position_ids", "counts 0..n; not stored by this release of transformers"),
    Rename(r"language_encoder\.(.+)", rf"{SIGLIP}/text_encoder.\1"),
    Rename(r"mm_vision_proj\.(.+)", rf"{SIGLIP}/image_projection.\1"),
    Rename(r"mm_language_proj\.(.+)", rf"{SIGLIP}/text_projection.\1"),
    Rename(r"t_prime", rf"{SIGLIP}/temperature"),
    Rename(r"bias", rf"{SIGLIP}/bias"),
)

DCFORMER_KEYS: KeyMap = (
    Drop(r"(?:.+\.)?vq\..+", "codebook of the older release, which nothing reads"),
    Drop(r".+\.norm\.[012]\..+", "the same batch norm again; c1..c3 hold it under another name"),
    Drop(r"text_transformer\..+", "CT-CLIP's text tower; this project pretrains with DistilBERT"),
    Drop(r"to_(?:text|visual)_latent\..+", "CT-CLIP's projections, of no use without its text tower"),
    Rename(r"(?:[a-z_]+\.)?encoder\.(s\d\..+)\.gamma", rf"{VISION}/\1.scale"),
    Rename(r"(?:[a-z_]+\.)?encoder\.(s\d\..+)", rf"{VISION}/\1"),
)
"""``pretrained_ViT.bin`` and ``vision_tower.bin`` of Med3DVLM, and ``checkpoint-*.pth`` of mirthAI/DCFormer."""

TEXT_LAYERS = 6
"""Of DistilBERT; its other sizes are read off the tensors."""


def dcformer(name: str) -> Layout:
    """Layout of the image encoder alone at one published size."""

    def target(source: WeightSource, config: ModelConfig | None) -> Target:
        config = config or ModelConfig(vision=VISION_PRESETS[name])
        return Target(DCFORMER_KEYS, {VISION: model_part(VISION, config)})

    return target


def dcformer_siglip(source: WeightSource, config: ModelConfig | None) -> Target:
    """``MagicXin/DCFormer_SigLIP``: encoder (DCFormer small), text tower and projections."""
    config = config or ModelConfig(vision=VISION_PRESETS["dcformer_small"])
    text = _text_config(source)
    width = _rows(source, "mm_vision_proj.weight", text["dim"])
    with torch.device("meta"):
        head = nn.Module()
        head.text_encoder = DistilBertModel(DistilBertConfig(**text))
        head.image_projection = nn.Linear(config.vision.channels[-1], width)
        head.text_projection = nn.Linear(text["dim"], width)
        head.temperature = nn.Parameter(torch.zeros(()))
        head.bias = nn.Parameter(torch.zeros(()))
    stored = {"text_encoder": text, "image_channels": config.vision.channels[-1], "width": width}
    siglip = PartTarget({"siglip": stored}, tensors_of(head))
    return Target(SIGLIP_KEYS, {VISION: model_part(VISION, config), SIGLIP: siglip})


def _text_config(source: WeightSource) -> dict[str, Any]:
    """DistilBERT's sizes from the tensors; where one is missing, the published size, so that it is named later."""
    words = source.tensors.get("language_encoder.embeddings.word_embeddings.weight")
    vocabulary, dim = words.shape if words is not None and len(words.shape) == 2 else (119547, 768)
    return {
        "vocab_size": vocabulary,
        "dim": dim,
        "hidden_dim": _rows(source, "language_encoder.transformer.layer.0.ffn.lin1.weight", 4 * dim),
        "max_position_embeddings": _rows(source, "language_encoder.embeddings.position_embeddings.weight", 512),
        "n_layers": TEXT_LAYERS,
        "n_heads": 12,
    }


def _rows(source: WeightSource, name: str, default: int) -> int:
    info = source.tensors.get(name)
    return info.shape[0] if info is not None and info.shape else default
