"""Qwen2.5 as published: ``config.json``, safetensors in one piece or in shards, ``tokenizer.json``.

Four special tokens join the vocabulary. Where the published table has spare rows (it is padded) they take those.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Qwen2Tokenizer

from medvl_sam2.config import LanguageConfig, ModelConfig
from medvl_sam2.converters.keymap import Drop, KeyMap, Rename
from medvl_sam2.converters.layout import Target, published_config
from medvl_sam2.converters.parts import LANGUAGE, PartTarget, Vocabulary, model_part
from medvl_sam2.converters.source import WeightSource
from medvl_sam2.errors import CheckpointError
from medvl_sam2.modeling.tokenizer import Tokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_BODY: KeyMap = (
    Drop(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "follows from the rotary base in config.json"),
    Rename(r"(model\.(?:embed_tokens|norm)\.weight)", rf"{LANGUAGE}/\1"),
    Rename(r"(model\.layers\..+)", rf"{LANGUAGE}/\1"),
)
QWEN2_KEYS: KeyMap = (*_BODY, Rename(r"lm_head\.weight", rf"{LANGUAGE}/lm_head.weight"))
QWEN2_TIED_KEYS: KeyMap = (*_BODY, Drop(r"lm_head\.weight", "tied: config.json says it is the embedding"))

_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "position_range": "max_position_embeddings",
}
"""Our field: the published one."""


def qwen2(source: WeightSource, config: ModelConfig | None) -> Target:
    """A plain Qwen2.5 folder; sizes come from its ``config.json``."""
    part, tied = language_part(source, config)
    return Target(QWEN2_TIED_KEYS if tied else QWEN2_KEYS, {LANGUAGE: part})


def language_part(source: WeightSource, config: ModelConfig | None, **fields: Any) -> tuple[PartTarget, bool]:
    """Target of the language model and whether its head is tied; ``fields`` are set in its configuration."""
    language = config.language if config else language_config(published_config(source))
    tokenizer, known = _tokenizer(source.folder)
    embedding = source.tensors.get(EMBEDDING)
    rows = embedding.shape[0] if embedding is not None and embedding.shape else language.vocab_size
    if rows < known:
        raise CheckpointError(
            f"{source.path} has {rows} embeddings for {known} tokens; take the tokenizer.json beside it"
        )
    vocabulary = Vocabulary(tokenizer, known, max(rows, len(tokenizer)))
    language = dataclasses.replace(language, vocab_size=rows, **fields)
    published = model_part(LANGUAGE, ModelConfig(language=language))
    stored = {"language": {**published.config["language"], "vocab_size": vocabulary.total}}
    return PartTarget(stored, published.expected, vocabulary, frozenset({EMBEDDING, HEAD})), language.tied_head


def language_config(published: Mapping[str, Any]) -> LanguageConfig:
    """Our configuration from a published ``config.json``, of Qwen2.5 or of a model built on it.

    Raises:
        CheckpointError: a field is missing or no number, or asks for what our language model does not do.
    """
    rope = published.get("rope_parameters") or {"rope_theta": published.get("rope_theta"), "rope_type": "default"}
    scaling = published.get("rope_scaling") or {}
    unsupported = {
        "hidden_act": published.get("hidden_act", "silu") != "silu",
        "rope_scaling": scaling.get("rope_type", scaling.get("type", "default")) != "default",
        "rope_parameters": rope.get("rope_type", "default") != "default",
        "use_sliding_window": bool(published.get("use_sliding_window")),
        "rms_norm_eps": published.get("rms_norm_eps", 1e-6) != 1e-6,
        "head_dim": "head_dim" in published
        and published["head_dim"] * published["num_attention_heads"] != published["hidden_size"],
    }
    refused = [name for name, wrong in unsupported.items() if wrong]
    if refused:
        raise CheckpointError(f"{refused[0]!r} is {published[refused[0]]!r} in config.json; only plain Qwen2.5 is read")
    sizes: dict[str, Any] = {ours: published.get(theirs) for ours, theirs in _SIZES.items()}
    wrong = [_SIZES[name] for name, value in sizes.items() if type(value) is not int]
    if wrong or not isinstance(rope.get("rope_theta"), (int, float)):
        name = wrong[0] if wrong else "rope_theta"
        raise CheckpointError(f"{name!r} is {published.get(name)!r} in config.json; take the one beside the weights")
    return LanguageConfig(
        **sizes, rope_theta=float(rope["rope_theta"]), tied_head=bool(published.get("tie_word_embeddings"))
    )


def _tokenizer(folder: Path) -> tuple[Tokenizer, int]:
    """The folder's tokenizer extended by our special tokens, and how many entries it had."""
    ready = folder / "tokenizer.json"
    if ready.is_file():
        return Tokenizer.extend(ready)
    if not (folder / "vocab.json").is_file() or not (folder / "merges.txt").is_file():
        raise CheckpointError(f"{folder} has neither tokenizer.json nor vocab.json and merges.txt; download them too")
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / "tokenizer.json"
        Qwen2Tokenizer.from_pretrained(folder).backend_tokenizer.save(str(written))
        return Tokenizer.extend(written)
