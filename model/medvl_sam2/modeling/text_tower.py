"""The text encoder that volumes are aligned with: transformers' DistilBERT from a configuration, and its input."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DistilBertConfig, DistilBertModel

from medvl_sam2.config import AlignmentConfig
from medvl_sam2.errors import ConfigError
from medvl_sam2.modeling.text_grams import GramEncoder
from medvl_sam2.modeling.tokenizer import Tokenizer

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def build_text_encoder(config: AlignmentConfig, pad_id: int = 0) -> DistilBertModel | GramEncoder:
    """Randomly initialised DistilBERT, or the runs of tokens that ``config.grams`` asks for.

    Raises :class:`ConfigError` when heads do not divide the width.
    """
    if config.grams:
        return GramEncoder(config.grams, config.gram_buckets, config.hidden_size)
    if config.hidden_size % config.heads:
        raise ConfigError(
            f"text tower: heads {config.heads} do not divide hidden_size {config.hidden_size}; choose others"
        )
    sizes = DistilBertConfig(
        vocab_size=config.vocab_size,
        dim=config.hidden_size,
        hidden_dim=config.intermediate_size,
        n_layers=config.layers,
        n_heads=config.heads,
        max_position_embeddings=config.max_length,
        pad_token_id=pad_id,
    )
    return DistilBertModel(sizes)


def text_batch(
    tokenizer: Tokenizer, texts: Sequence[str], length: int, rng: np.random.Generator | None = None
) -> Tensor:
    """Ids (B, L <= length) of texts behind a start mark, padded on the right.

    The start mark is the end mark, for want of DistilBERT's ``[CLS]`` in this tokenizer. Of a text that is too long the
    first sentence and random others are kept, in order (Med3DVLM); without ``rng`` the first ones.
    """
    rows = [[tokenizer.eos_id, *_fitting(tokenizer, text, length - 1, rng)] for text in texts]
    ids = torch.full((len(rows), max(len(row) for row in rows)), tokenizer.pad_id)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
    return ids


def _fitting(tokenizer: Tokenizer, text: str, length: int, rng: np.random.Generator | None) -> list[int]:
    ids = tokenizer.encode(text)
    if len(ids) <= length:
        return ids
    sentences = [tokenizer.encode(f" {part}" if n else part) for n, part in enumerate(_SENTENCE_END.split(text))]
    order = np.arange(1, len(sentences)) if rng is None else rng.permutation(np.arange(1, len(sentences)))
    kept, room = [0], length - len(sentences[0])
    for number in order:
        if len(sentences[number]) <= room:
            kept.append(int(number))
            room -= len(sentences[number])
    return [token for number in sorted(kept) for token in sentences[number]][:length]
