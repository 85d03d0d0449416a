"""Text encoder for want of compute: a text as the set of its runs of tokens, hashed (after fastText, arXiv 1607.01759).

A step costs a fiftieth of a small DistilBERT's on a CPU. Reports of a steady wording lose little by it: what belongs
together, such as size, kind and place of a lesion, stands within a few tokens.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

_FACTOR, _MIX, _BITS = 1_000_003, 2_654_435_761, 31
_DROPPED = 0.2
"""Share of the runs that training leaves out of every text."""


class GramOutput(NamedTuple):
    """Under the name of transformers' encoders: ``last_hidden_state`` (B, 1, hidden), one state for the whole text."""

    last_hidden_state: Tensor


class GramEncoder(nn.Module):
    """Sum of the embeddings of all runs of 1 to ``longest`` tokens, then two layers."""

    def __init__(self, longest: int, buckets: int, hidden: int) -> None:
        super().__init__()
        self.longest, self.buckets = longest, buckets
        self.grams = nn.EmbeddingBag(buckets, hidden, mode="sum")
        nn.init.normal_(self.grams.weight, std=0.1)
        self.layers = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> GramOutput:
        """Ids (B, L), padded on the right, and bool (B, L), True where a token stands."""
        rows, kept = self.runs(input_ids, attention_mask)
        weights = functional.dropout(kept.to(self.grams.weight.dtype), _DROPPED, self.training)
        total = cast(Tensor, self.grams(rows, per_sample_weights=weights))
        return GramOutput(self.layers(total)[:, None])

    def runs(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Bucket (B, n) of every run, and whether (B, n) it is one: runs into the padding are none."""
        code, found, kept = input_ids, [], []
        for length in range(1, min(self.longest, input_ids.shape[1]) + 1):
            if length > 1:
                code = (code[:, :-1] * _FACTOR + input_ids[:, length - 1 :]) % (1 << _BITS)
            found.append(((code + length) * _MIX % (1 << 61) >> 16) % self.buckets)
            kept.append(attention_mask[:, length - 1 :])
        return torch.cat(found, dim=1), torch.cat(kept, dim=1)
