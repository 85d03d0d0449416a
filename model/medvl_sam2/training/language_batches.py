"""Batches of the language phase: augmented views, and many exchanges packed behind one set of image slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from medvl_sam2.modeling.vision_language import IGNORE, VisionLanguage
from medvl_sam2.training.corpus import SegTarget, TextSample


@dataclass(frozen=True)
class PackedBatch:
    """``ids``, ``labels``, ``positions`` (B, L); ``attention`` bool (B, L, L); ``weights`` (labelled positions,).

    ``segs``: row and target of the ``[SEG]`` tokens in row then reading order.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    attention: Tensor
    weights: Tensor
    segs: tuple[tuple[int, SegTarget], ...]

    def to(self, device: torch.device) -> PackedBatch:
        """The batch on another device."""
        return PackedBatch(
            self.ids.to(device),
            self.labels.to(device),
            self.positions.to(device),
            self.attention.to(device),
            self.weights.to(device),
            self.segs,
        )


class Viewed(Protocol):
    """Anything with a global view (D, H, W) in [0, 1] and its edges (z, y, x) in mm."""

    @property
    def view(self) -> np.ndarray:
        """The view, float16."""

    @property
    def extent_mm(self) -> tuple[float, float, float]:
        """Its edges."""


def stack_views(cases: Sequence[Viewed], rng: np.random.Generator | None) -> tuple[Tensor, Tensor]:
    """Views (B, 1, D, H, W) float32 and extents (B, 3) in mm.

    ``rng`` adds gain, bias and noise; None leaves the views alone. Nothing is mirrored: the texts name sides.
    """
    views = torch.from_numpy(np.stack([case.view for case in cases]).astype(np.float32))[:, None]
    extents = torch.tensor([case.extent_mm for case in cases], dtype=torch.float32)
    if rng is None:
        return views, extents
    shape = (len(cases), 1, 1, 1, 1)
    gain = torch.from_numpy(rng.uniform(0.93, 1.07, shape).astype(np.float32))
    bias = torch.from_numpy(rng.uniform(-0.02, 0.02, shape).astype(np.float32))
    spread = torch.from_numpy(rng.uniform(0.0, 0.015, shape).astype(np.float32))
    noise = torch.randn(views.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**31))))
    return (views * gain + bias + spread * noise).clamp(0, 1), extents


def pack(model: VisionLanguage, rows: Sequence[Sequence[TextSample]], length: int) -> PackedBatch:
    """One row per image: its slots once, then as many exchanges as fit into ``length`` positions.

    Exchanges see the slots and themselves only, at the positions they would have alone, so training on a pack equals
    training on each exchange apart at a fraction of the cost. A long reply weighs by the root of its length.
    """
    slots = model.image_slots
    ids, labels, positions, owners, weights = [], [], [], [], list[float]()
    segs = list[tuple[int, SegTarget]]()
    for row, samples in enumerate(rows):
        row_ids = [model.tokenizer.image_id] * slots
        row_labels, row_positions, row_owners = [IGNORE] * slots, list(range(slots)), [0] * slots
        for number, sample in enumerate(samples, start=1):
            question = model.prompt_ids(sample.question)[slots:]
            reply = model.reply_ids(sample.reply)
            if len(row_ids) + len(question) + len(reply) > length:
                continue
            row_ids += question + reply
            row_labels += [IGNORE] * len(question) + (reply if sample.taught else [IGNORE] * len(reply))
            row_positions += range(slots, slots + len(question) + len(reply))
            row_owners += [number] * (len(question) + len(reply))
            weights += [len(reply) ** -0.5] * len(reply) if sample.taught else []
            segs += [(row, target) for target in sample.targets]
        ids.append(row_ids)
        labels.append(row_labels)
        positions.append(row_positions)
        owners.append(row_owners)
    owner = _stack(owners, -1)
    causal = torch.ones(owner.shape[1], owner.shape[1], dtype=torch.bool).tril()
    same = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == 0)
    real = (owner >= 0)[:, :, None] & (owner >= 0)[:, None, :]
    return PackedBatch(
        ids=_stack(ids, model.tokenizer.pad_id),
        labels=_stack(labels, IGNORE),
        positions=_stack(positions, 0),
        attention=causal & same & real,
        weights=torch.tensor(weights),
        segs=tuple(segs),
    )


def _stack(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
