"""Training-only heads of the language phase: dense label cells, findings read from image tokens, ``[SEG]`` places.

Measured by the relatives and again here: from little data a volume encoder learns through dense supervision, not
through the language loss alone. The heads are not part of the model and are not shipped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from medvl_sam2.config import ModelConfig, VisionConfig
from medvl_sam2.training.language_data import ORGANS, LanguageCase

_SIZES_MM = (8.0, 12.0, 16.0, 22.0, 30.0)
_AUXILIARY_STAGES = (1, 2, 3)
_AUXILIARY_WEIGHT = 0.3


class FactVocabulary:
    """Facts read off the image tokens, collected from the training cases, and the channels of the dense map."""

    def __init__(self, facts: Sequence[str], kinds: Sequence[str]):
        self.facts = tuple(facts)
        self.kinds = tuple(kinds)
        self._index = {name: index for index, name in enumerate(self.facts)}

    @classmethod
    def collect(cls, cases: Iterable[LanguageCase], kinds: Sequence[str], minimum: int = 3) -> FactVocabulary:
        """Facts seen in at least ``minimum`` cases."""
        counts = Counter(fact for case in cases for fact in case_facts(case))
        return cls(sorted(fact for fact, count in counts.items() if count >= minimum), kinds)

    def fact_targets(self, cases: Sequence[LanguageCase]) -> Tensor:
        """(B, facts) of 0 and 1."""
        targets = torch.zeros(len(cases), max(1, len(self.facts)))
        for row, case in enumerate(cases):
            for fact in case_facts(case):
                if fact in self._index:
                    targets[row, self._index[fact]] = 1.0
        return targets

    def cell_targets(self, cases: Sequence[LanguageCase]) -> Tensor:
        """(B, organs + 1 + kinds, d, h, w) in [0, 1]: organ shares, any lesion, then lesions by kind."""
        split = len(ORGANS)
        targets = torch.zeros(len(cases), split + 1 + len(self.kinds), *cases[0].organ_cells.shape[1:])
        for row, case in enumerate(cases):
            targets[row, :split] = torch.from_numpy(case.organ_cells.astype(np.float32) / 255.0)
            for finding, mask in zip(case.findings, case.lesion_cells, strict=True):
                cells = torch.from_numpy(mask)
                targets[row, split][cells] = 1.0
                if finding.kind in self.kinds:
                    targets[row, split + 1 + self.kinds.index(finding.kind)][cells] = 1.0
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

    def __init__(self, vision: VisionConfig, vocabulary: FactVocabulary):
        super().__init__()
        self.grids = [vision.grid(stage) for stage in _AUXILIARY_STAGES]
        channels = len(ORGANS) + 1 + len(vocabulary.kinds)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(vision.channels[stage], 64), nn.GELU(), nn.Linear(64, channels))
            for stage in _AUXILIARY_STAGES
        )
        self.priors = nn.ParameterList(
            nn.Parameter(torch.full((channels, grid[0] * grid[1] * grid[2]), -3.0)) for grid in self.grids
        )

    def forward(self, maps: Sequence[Tensor], cells: Tensor) -> Tensor:
        """Mean loss of the stages against ``cells`` (B, C, d, h, w) on the stem's grid."""
        split = len(ORGANS)
        total = cells.new_zeros(())
        for stage, head, prior, grid in zip(_AUXILIARY_STAGES, self.heads, self.priors, self.grids, strict=True):
            logits = head(maps[stage]).float().transpose(1, 2) + prior
            shares = functional.adaptive_avg_pool3d(cells[:, :split], grid)
            lesions = functional.adaptive_max_pool3d(cells[:, split:], grid)
            total = total + dense_loss(logits, torch.cat([shares, lesions], dim=1).flatten(2))
        return _AUXILIARY_WEIGHT * total / len(_AUXILIARY_STAGES)


def dense_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Organs, any lesion and kinds weigh the same, however few cells they have; both (B, C, cells)."""
    split = len(ORGANS)
    loss = _cell_loss(logits[:, :split], target[:, :split], weight=4.0)
    loss = loss + _cell_loss(logits[:, split : split + 1], target[:, split : split + 1], weight=5.0)
    if logits.shape[1] > split + 1:
        loss = loss + _cell_loss(logits[:, split + 1 :], target[:, split + 1 :], weight=5.0)
    return loss


def _cell_loss(logits: Tensor, target: Tensor, weight: float) -> Tensor:
    """BCE with weighted positives plus soft Dice of the channels that occur; both (B, C, cells)."""
    weights = 1.0 + (weight - 1.0) * target
    bce = (functional.binary_cross_entropy_with_logits(logits, target, reduction="none") * weights).sum()
    bce = bce / weights.sum()
    share = torch.sigmoid(logits)
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


class SegPlace(nn.Module):
    """Where a projected ``[SEG]`` state points: occupancy of a coarse grid, and the classes it stands for."""

    def __init__(self, config: ModelConfig, grid: tuple[int, int, int] = (8, 8, 8)):
        super().__init__()
        self.grid = grid
        width = config.slices.d_model
        self.cells = nn.Linear(width, grid[0] * grid[1] * grid[2])
        self.classes = nn.Linear(width, len(ORGANS) + 1)
        nn.init.constant_(self.cells.bias, -3.0)

    def forward(self, embeddings: Tensor, cells: Tensor, classes: Tensor) -> Tensor:
        """Loss of (N, d_model) against ``cells`` (N, d, h, w) in [0, 1] and ``classes`` (N,) indices."""
        target = functional.adaptive_max_pool3d(cells[:, None], self.grid)[:, 0].flatten(1)
        logits = self.cells(embeddings).float()
        share = torch.sigmoid(logits)
        dice = 1 - (2 * (share * target).sum(1) + 1) / (share.sum(1) + target.sum(1) + 1)
        bce = functional.binary_cross_entropy_with_logits(logits, target, weight=torch.where(target > 0, 3.0, 1.0))
        return dice.mean() + bce + functional.cross_entropy(self.classes(embeddings).float(), classes)
