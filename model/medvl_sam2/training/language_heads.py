"""Training-only heads of the encoder and the language phase: dense label cells, findings read from image tokens.

Measured by the relatives and again here: from little data a volume encoder learns through dense supervision, not
through the language loss alone. The heads are not part of the model and are not shipped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from medvl_sam2.config import VisionConfig
from medvl_sam2.training.language_data import ORGANS, LanguageCase

_SIZES_MM = (8.0, 12.0, 16.0, 22.0, 30.0)
_AUXILIARY_STAGES = (1, 2, 3)
_AUXILIARY_WEIGHT = 0.3


class FactVocabulary:
    """Facts read off the image tokens, collected from the training cases."""

    def __init__(self, facts: Sequence[str]):
        self.facts = tuple(facts)
        self._index = {name: index for index, name in enumerate(self.facts)}

    @classmethod
    def collect(cls, cases: Iterable[LanguageCase], minimum: int = 3) -> FactVocabulary:
        """Facts seen in at least ``minimum`` cases."""
        counts = Counter(fact for case in cases for fact in case_facts(case))
        return cls(sorted(fact for fact, count in counts.items() if count >= minimum))

    def fact_targets(self, cases: Sequence[LanguageCase]) -> Tensor:
        """(B, facts) of 0 and 1."""
        targets = torch.zeros(len(cases), max(1, len(self.facts)))
        for row, case in enumerate(cases):
            for fact in case_facts(case):
                if fact in self._index:
                    targets[row, self._index[fact]] = 1.0
        return targets


def lesion_name(case: LanguageCase, index: int) -> str:
    """``organ|kind`` of one finding."""
    return f"{case.findings[index].organ}|{case.findings[index].kind}"


def case_facts(case: LanguageCase) -> set[str]:
    """Everything worth reading off the image, as short strings."""
    facts = {f"present|{organ}" for organ in ORGANS if case.present(organ)} | {f"phase|{case.phase}"}
    for index, finding in enumerate(case.findings):
        size = sum(finding.diameter_mm >= edge for edge in _SIZES_MM)
        facts |= {lesion_name(case, index), f"at|{finding.location}|{finding.kind}", f"at|{finding.location}"}
        facts |= {f"size|{size}|{finding.organ}", f"in|{finding.organ}", f"kind|{finding.kind}"}
    for organ in {finding.organ for finding in case.findings}:
        facts.add(f"count|{organ}|{sum(finding.organ == organ for finding in case.findings)}")
    facts.add(f"total|{min(len(case.findings), 4)}")
    return facts


class DenseHeads(nn.Module):
    """Read-outs of the label cells from the encoder's coarser tokens.

    A learned prior per cell frees the features from telling the place.
    """

    def __init__(self, vision: VisionConfig, kinds: int):
        super().__init__()
        self.grids = [vision.grid(stage) for stage in _AUXILIARY_STAGES]
        channels = len(ORGANS) + 1 + kinds
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(vision.channels[stage], 64), nn.GELU(), nn.Linear(64, channels))
            for stage in _AUXILIARY_STAGES
        )
        self.priors = nn.ParameterList(
            nn.Parameter(torch.full((channels, grid[0] * grid[1] * grid[2]), -3.0)) for grid in self.grids
        )

    def forward(self, maps: Sequence[Tensor], cells: Tensor, valid: Tensor) -> Tensor:
        """Mean loss of the stages against ``cells`` (B, C, d, h, w) on the stem's grid; ``valid`` (B, C)."""
        split = len(ORGANS)
        total = cells.new_zeros(())
        for stage, head, prior, grid in zip(_AUXILIARY_STAGES, self.heads, self.priors, self.grids, strict=True):
            logits = head(maps[stage]).float().transpose(1, 2) + prior
            shares = functional.adaptive_avg_pool3d(cells[:, :split], grid)
            lesions = functional.adaptive_max_pool3d(cells[:, split:], grid)
            total = total + dense_loss(logits, torch.cat([shares, lesions], dim=1).flatten(2), valid)
        return _AUXILIARY_WEIGHT * total / len(_AUXILIARY_STAGES)


def dense_loss(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Organs, any lesion and kinds weigh the same, however few cells they have; both (B, C, cells).

    ``valid`` bool (B, C): channels whose labels are known in a volume; the others are left out.
    """
    split = len(ORGANS)
    parts = ((slice(0, split), 4.0), (slice(split, split + 1), 5.0), (slice(split + 1, logits.shape[1]), 5.0))
    return sum(
        (cell_loss(logits[:, part], target[:, part], valid[:, part], weight) for part, weight in parts),
        start=logits.new_zeros(()),
    )


def cell_loss(logits: Tensor, target: Tensor, valid: Tensor, weight: float) -> Tensor:
    """BCE with weighted positives plus soft Dice of the channels that occur; (B, C, cells), ``valid`` (B, C)."""
    known = valid[..., None].to(logits.dtype)
    weights = (1.0 + (weight - 1.0) * target) * known
    bce = (functional.binary_cross_entropy_with_logits(logits, target, reduction="none") * weights).sum()
    bce = bce / weights.sum().clamp_min(1.0)
    share, target = torch.sigmoid(logits) * known, target * known
    sums = share.sum(dim=(0, 2)) + target.sum(dim=(0, 2))
    dice = 1 - (2 * (share * target).sum(dim=(0, 2)) + 1) / (sums + 1)
    seen = target.sum(dim=(0, 2)) > 0
    return bce + dice[seen].mean() if bool(seen.any()) else bce


class FactHead(nn.Module):
    """One learned query per fact looks at the image tokens, as a word of the language model would."""

    def __init__(self, hidden: int, facts: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.query = nn.Parameter(torch.randn(max(1, facts), hidden) * hidden**-0.5)
        self.weight = nn.Parameter(torch.randn(max(1, facts), hidden) * hidden**-0.5)
        self.bias = nn.Parameter(torch.full((max(1, facts),), -2.0))

    def forward(self, image_tokens: Tensor) -> Tensor:
        """(B, n, hidden) to logits (B, facts)."""
        tokens = self.norm(image_tokens)
        attention = torch.softmax(tokens @ self.query.T, dim=1)
        return torch.einsum("bnf,bnh,fh->bf", attention, tokens, self.weight) + self.bias
