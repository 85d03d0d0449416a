"""What a ``[SEG]`` state should point at in the scene, and the loss for it; language and joint phase share it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_OVERLAP = 0.4
"""Share of a lesion slot's cells that must lie on a target for the slot to be that target."""


def slot_lies_on(slot: Tensor, target: Tensor) -> bool:
    """Whether a lesion slot, bool (d, h, w), is (part of) a target, bool on the same cells; an empty slot is not."""
    return bool(slot.any()) and float((slot & target).sum()) >= _LEAST_OVERLAP * float(slot.sum())


def wanted_elements(names: Sequence[str], organs: Sequence[str], slots: Tensor) -> Tensor:
    """Elements (organs + slots,) in {0, 1} that a target is: its organs, or else the lesion ``slots`` (bool) on it."""
    wanted = torch.zeros(len(organs) + len(slots))
    meant = [organs.index(name) for name in names if name in organs]
    if meant:
        wanted[meant] = 1.0
    else:
        wanted[len(organs) :] = slots.float()
    return wanted


def pointing_loss(scores: Tensor, wanted: Tensor) -> tuple[Tensor, float]:
    """Cross entropy of what ``[SEG]`` states point at, and the share of states that point exactly right.

    ``scores`` (K, E) logits, ``wanted`` (K, E) in {0, 1}.
    """
    scores = scores.float()
    loss = F.binary_cross_entropy_with_logits(scores, wanted, pos_weight=wanted.new_tensor(4.0))
    right = ((scores > 0) == (wanted > 0.5)).all(dim=1).float().mean()
    return loss, float(right)
