"""Med3DVLM-Qwen-2.5-7B (``VLMQwenForCausalLM``): DCFormer small, dual-stream mixer projector and Qwen2.5 in one.

Its sequences have no separator after the question, a space before the reply, and the image tokens one position late;
the converted configuration says so (``prompt_end``, ``reply_start``, ``legacy_splice``).
"""

from __future__ import annotations

import dataclasses

from medvl_sam2.config import LanguageConfig, ModelConfig, ProjectorConfig
from medvl_sam2.converters.keymap import KeyMap, Rename
from medvl_sam2.converters.layout import Target, published_config
from medvl_sam2.converters.parts import LANGUAGE, PROJECTOR, VISION, model_part
from medvl_sam2.converters.qwen2_layout import QWEN2_KEYS, QWEN2_TIED_KEYS, language_config, language_part
from medvl_sam2.converters.source import WeightSource
from medvl_sam2.errors import CheckpointError
from medvl_sam2.presets import VISION_PRESETS

_MIXER = r"model\.mm_projector\.((?:low|high)_mixer\.\d+)\."
MED3DVLM_KEYS: KeyMap = (
    Rename(r"model\.vision_tower\.vision_tower\.encoder\.(s\d\..+)", rf"{VISION}/\1"),
    Rename(_MIXER + r"(ln[12]\..+)", rf"{PROJECTOR}/\1.\2"),
    Rename(_MIXER + r"(mlp[12])\.mm_projector\.0\.(.+)", rf"{PROJECTOR}/\1.\2.0.\3"),
    Rename(_MIXER + r"(mlp[12])\.mm_projector\.1\.1\.(.+)", rf"{PROJECTOR}/\1.\2.2.\3"),
)


def med3dvlm(source: WeightSource, config: ModelConfig | None) -> Target:
    """The merged folder: ``config.json``, safetensors shards, tokenizer."""
    config = config or _published(source)
    quirks = {"prompt_end": "", "reply_start": " ", "legacy_splice": True}
    language, tied = language_part(source, config, **quirks)
    parts = {VISION: model_part(VISION, config), PROJECTOR: model_part(PROJECTOR, config), LANGUAGE: language}
    return Target((*MED3DVLM_KEYS, *(QWEN2_TIED_KEYS if tied else QWEN2_KEYS)), parts)


def _published(source: WeightSource) -> ModelConfig:
    """Sizes from ``config.json``, which names the encoder but does not describe it: it is DCFormer small."""
    published = published_config(source)
    known = {"vision_tower": "dcformer", "mm_projector_type": "mixer", "mm_mlp_depth": 2, "vision_select_layer": -2}
    odd = [name for name, value in known.items() if published.get(name) != value]
    if odd:
        raise CheckpointError(
            f"{source.path} has {odd[0]!r} {published.get(odd[0])!r}; only {known[odd[0]]!r}, as released, is read"
        )
    language: LanguageConfig = language_config(published)
    try:
        height, width, depth = published["input_size"]
        projector = ProjectorConfig(
            low_tokens=tuple(published["low_output_size"]),
            high_tokens=tuple(published["high_output_size"]),
            extent=False,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json of {source.path} lacks or spoils {error}; download it again") from error
    vision = dataclasses.replace(VISION_PRESETS["dcformer_small"], input_size=(depth, height, width), taps=(3, 4))
    return ModelConfig(vision=vision, projector=projector, language=language)
