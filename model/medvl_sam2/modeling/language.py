"""The causal language model: transformers' Qwen2 from a configuration, never from a download."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from medvl_sam2.config import LanguageConfig
from medvl_sam2.errors import ConfigError


def build_language_model(config: LanguageConfig, pad_id: int = 0, eos_id: int = 1) -> Qwen2ForCausalLM:
    """Randomly initialised Qwen2 of the given size.

    Raises :class:`ConfigError` when heads do not divide the width or the key/value heads the heads.
    """
    if config.hidden_size % config.heads or config.heads % config.kv_heads:
        raise ConfigError(
            f"hidden_size {config.hidden_size}, heads {config.heads}, kv_heads {config.kv_heads} do not divide; "
            "choose heads that divide the hidden size and kv_heads that divide heads"
        )
    qwen = Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.position_range,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tied_head,
        pad_token_id=pad_id,
        bos_token_id=None,
        eos_token_id=eos_id,
        attn_implementation="sdpa",
    )
    return Qwen2ForCausalLM(qwen)


def additive_mask(allowed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Boolean (B, queries, keys), True where a query may look, to the additive (B, 1, queries, keys) Qwen2 takes.

    A row without any allowed key (padding) looks at everything instead: a softmax over nothing would be NaN.
    """
    empty = ~allowed.any(dim=-1, keepdim=True)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill(~(allowed | empty), torch.finfo(dtype).min)[:, None]
