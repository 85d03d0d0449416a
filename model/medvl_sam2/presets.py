"""Named sizes: the published parts, and whole models put together from them.

Numbers: SAM 2.1 (Ravi et al. 2024, arXiv 2408.00714, and its configuration files), DCFormer (arXiv 2502.05091) and
Med3DVLM (arXiv 2503.20047), Qwen2.5 (arXiv 2412.15115). Every field of :mod:`medvl_sam2.config` whose default departs
from a publication is set as published here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from medvl_sam2.config import LanguageConfig, ModelConfig, ProjectorConfig, SceneConfig, SliceConfig, VisionConfig
from medvl_sam2.errors import ConfigError
from medvl_sam2.vocabulary import CLASSES

_SAM21 = SliceConfig(
    image_size=1024,
    embed_dim=96,
    stages=(1, 2, 7, 2),
    global_att_blocks=(5, 7, 9),
    window_spec=(8, 4, 14, 7),
    window_pos_embed_size=(7, 7),
    d_model=256,
    memory_dim=64,
    memory_layers=4,
    memory_ffn=2048,
    decoder_mlp=2048,
    max_cond_slices=-1,
    multimask=True,
    presence_gate=True,
    apply_postprocessing=True,
    rgb_statistics=True,
    slice_position=False,
)

SLICE_PRESETS: Mapping[str, SliceConfig] = MappingProxyType(
    {
        "sam2.1_tiny": _SAM21,
        "sam2.1_small": replace(_SAM21, stages=(1, 2, 11, 2), global_att_blocks=(7, 10, 13)),
        "sam2.1_base_plus": replace(
            _SAM21,
            embed_dim=112,
            num_heads=2,
            stages=(2, 3, 16, 3),
            global_att_blocks=(12, 16, 20),
            window_pos_embed_size=(14, 14),
        ),
        "sam2.1_large": replace(
            _SAM21,
            embed_dim=144,
            num_heads=2,
            stages=(2, 6, 36, 4),
            global_att_blocks=(23, 33, 43),
            window_spec=(8, 4, 16, 8),
        ),
    }
)
"""At the published 1024 pixels; weights do not depend on it (MedSAM2 is ``sam2.1_tiny`` at 512)."""


def _dcformer(blocks: tuple[int, ...], channels: tuple[int, ...]) -> VisionConfig:
    return VisionConfig(
        input_size=(128, 256, 256),
        blocks=blocks,
        channels=channels,
        smoothing=1,
        stem_activation=False,
        layer_scale=1e-6,
        taps=(3, 4),
    )


VISION_PRESETS: Mapping[str, VisionConfig] = MappingProxyType(
    {
        "dcformer_nano": _dcformer((1, 1, 1, 1, 1), (32, 32, 64, 128, 256)),
        "dcformer_naive": _dcformer((1, 2, 2, 2, 2), (32, 64, 128, 256, 512)),
        "dcformer_tiny": _dcformer((1, 2, 3, 3, 2), (64, 96, 192, 384, 768)),
        "dcformer_small": _dcformer((1, 2, 3, 6, 2), (64, 96, 192, 384, 768)),
        "dcformer_base": _dcformer((1, 2, 6, 6, 2), (64, 128, 256, 512, 1024)),
        "dcformer_large": _dcformer((1, 2, 6, 12, 2), (64, 256, 512, 1024, 2048)),
    }
)
"""With the view of Med3DVLM."""

_QWEN25 = LanguageConfig(
    vocab_size=151_936,
    max_length=1024,
    position_range=32_768,
    rope_theta=1e6,
    lora_rank=16,
    lora_alpha=32,
)

LANGUAGE_PRESETS: Mapping[str, LanguageConfig] = MappingProxyType(
    {
        "qwen2.5_0.5b": replace(_QWEN25, hidden_size=896, intermediate_size=4864, layers=24, heads=14, kv_heads=2),
        "qwen2.5_1.5b": replace(_QWEN25, hidden_size=1536, intermediate_size=8960, layers=28, heads=12, kv_heads=2),
        "qwen2.5_7b": replace(
            _QWEN25,
            vocab_size=152_064,
            hidden_size=3584,
            intermediate_size=18_944,
            layers=28,
            heads=28,
            kv_heads=4,
            tied_head=False,
        ),
    }
)
"""``vocab_size`` is the published, padded one: special tokens take rows behind the 151,665 entries of the tokenizer.
LoRA sizes are Med3DVLM's. Weights of Med3DVLM itself also want ``legacy_splice``, ``prompt_end`` and ``reply_start``
as published."""

_PROJECTOR = ProjectorConfig(low_tokens=(192, 128), high_tokens=(64, 128), extent=False)
"""Med3DVLM: 256 tokens of the fine map and 32 of the coarse one become 128 each."""


def _small() -> ModelConfig:
    """For one GPU of 24 GB, trained by this project; 512 pixels are what CT planes have.

    The scene stream stays: it is trained from dense labels, which public sets have by the thousand where reports are
    few, and gives sizes, counts and a rough place that half a billion weights do not learn from so few reports.
    """
    return ModelConfig(
        name="small",
        vision=VISION_PRESETS["dcformer_small"],
        projector=replace(_PROJECTOR, extent=True),
        scene=SceneConfig(lesions=4),
        language=LANGUAGE_PRESETS["qwen2.5_0.5b"],
        slices=replace(SLICE_PRESETS["sam2.1_tiny"], image_size=512, slice_position=True),
        classes=CLASSES,
    )


def _paper() -> ModelConfig:
    """The parts of MedVL-SAM2's relatives at their published sizes, without this project's additions.

    As there is no scene, text prompts begin on the slices that Med-2E3's head scores highest.
    """
    return ModelConfig(
        name="paper",
        vision=VISION_PRESETS["dcformer_small"],
        projector=_PROJECTOR,
        scene=SceneConfig(lesions=0),
        language=LANGUAGE_PRESETS["qwen2.5_7b"],
        slices=replace(SLICE_PRESETS["sam2.1_large"], slice_scores=True),
        classes=CLASSES,
    )


_MODELS: Mapping[str, Callable[[], ModelConfig]] = MappingProxyType(
    {"tiny": ModelConfig.tiny, "small": _small, "paper": _paper}
)

PRESETS: tuple[str, ...] = tuple(_MODELS)
"""Names that :func:`preset` knows."""


def preset(name: str) -> ModelConfig:
    """The whole model of a name: ``tiny`` (shipped), ``small`` (one 24 GB GPU) or ``paper`` (published sizes).

    Raises :class:`ConfigError` for another name.
    """
    if name not in _MODELS:
        raise ConfigError(f"no preset is called {name!r}; known: {', '.join(_MODELS)}")
    return _MODELS[name]()
