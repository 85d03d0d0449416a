"""DCFormer alone, with its SigLIP partner (Med3DVLM's ``DEC_CLIP``), and as the older CT-CLIP checkpoint.

The text tower and the projections of ``DEC_CLIP`` become the part ``alignment`` under their published names, which are
those of :class:`~medvl_sam2.modeling.siglip.SiglipHead`; ``t_prime`` and ``bias`` get a dimension. The tower is a
DistilBERT (ClinicalBERT); its word pieces are not read by this project, so ids are what can be embedded.
"""

from __future__ import annotations

from dataclasses import replace

from medvl_sam2.config import AlignmentConfig, ModelConfig
from medvl_sam2.converters.keymap import Drop, KeyMap, Rename
from medvl_sam2.converters.layout import Layout, Target
from medvl_sam2.converters.parts import ALIGNMENT, VISION, model_part
from medvl_sam2.converters.source import TensorInfo, WeightSource
from medvl_sam2.errors import CheckpointError
from medvl_sam2.presets import VISION_PRESETS

SIGLIP_KEYS: KeyMap = (
    Rename(r"vision_encoder\.encoder\.(s\d\..+)", rf"{VISION}/\1"),
    Drop(r"language_encoder\.embeddings\.position_ids", "counts 0..n; not stored by this release of transformers"),
    Rename(r"((?:language_encoder|mm_vision_proj|mm_language_proj)\..+|t_prime|bias)", rf"{ALIGNMENT}/\1"),
)

DCFORMER_KEYS: KeyMap = (
    Drop(r"(?:.+\.)?vq\..+", "codebook of the older release, which nothing reads"),
    Drop(r".+\.norm\.[012]\..+", "the same batch norm again; c1..c3 hold it under another name"),
    Drop(r"(?:language_encoder|mm_vision_proj|mm_language_proj)\..+|t_prime|bias", "the text half of DEC_CLIP"),
    Drop(r"text_transformer\..+", "CT-CLIP's text tower; this project pretrains with DistilBERT"),
    Drop(r"to_(?:text|visual)_latent\..+", "CT-CLIP's projections, of no use without its text tower"),
    Rename(r"(?:[a-z_]+\.)?encoder\.(s\d\..+)\.gamma", rf"{VISION}/\1.scale"),
    Rename(r"(?:[a-z_]+\.)?encoder\.(s\d\..+)", rf"{VISION}/\1"),
)
"""``pretrained_ViT.bin`` and ``vision_tower.bin`` of Med3DVLM, its ``DEC_CLIP``, ``checkpoint-*.pth`` of DCFormer."""

TEXT_LAYERS, TEXT_HEADS = 6, 12
"""Of DistilBERT; its other sizes are read off the tensors."""
_NUMBERS = frozenset({"t_prime", "bias"})


def dcformer(name: str) -> Layout:
    """Layout of the image encoder alone at one published size."""

    def target(source: WeightSource, config: ModelConfig | None) -> Target:
        config = config or ModelConfig(vision=VISION_PRESETS[name])
        return Target(DCFORMER_KEYS, {VISION: model_part(VISION, config)})

    return target


def dcformer_siglip(source: WeightSource, config: ModelConfig | None) -> Target:
    """``MagicXin/DCFormer_SigLIP``: encoder (DCFormer small), text tower and projections.

    Raises :class:`CheckpointError` for a text tower that is no DistilBERT.
    """
    config = config or ModelConfig(vision=VISION_PRESETS["dcformer_small"])
    if any(name.startswith("language_encoder.encoder.") for name in source.tensors):
        raise CheckpointError(
            f"{source.path} has a BERT as its text tower; only DistilBERT, as published, is supported. The image "
            "encoder alone can be converted, as kind 'dcformer_small'"
        )
    head = model_part(ALIGNMENT, replace(config, alignment=config.alignment or _head_sizes(source)))
    published = dict(head.expected) | dict.fromkeys(_NUMBERS, TensorInfo((), True))
    alignment = replace(head, expected=published, numbers=_NUMBERS)
    return Target(SIGLIP_KEYS, {VISION: model_part(VISION, config), ALIGNMENT: alignment})


def _head_sizes(source: WeightSource) -> AlignmentConfig:
    """Sizes from the tensors; where one is missing, the published size, so that it is named later."""
    words = source.tensors.get("language_encoder.embeddings.word_embeddings.weight")
    vocabulary, width = words.shape if words is not None and len(words.shape) == 2 else (119547, 768)
    return AlignmentConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=_rows(source, "language_encoder.transformer.layer.0.ffn.lin1.weight", 4 * width),
        layers=TEXT_LAYERS,
        heads=TEXT_HEADS,
        max_length=_rows(source, "language_encoder.embeddings.position_embeddings.weight", 512),
        width=_rows(source, "mm_vision_proj.weight", width),
    )


def _rows(source: WeightSource, name: str, default: int) -> int:
    info = source.tensors.get(name)
    return info.shape[0] if info is not None and info.shape else default
