"""Prompts of the annotator as points for the slice decoder, in a window's pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from medvl_sam2.geometry import SliceCrop
from medvl_sam2.predictor.edits import Edit


def box_points(crop: SliceCrop, box: np.ndarray) -> tuple[Tensor, Tensor]:
    """The in-plane edges of a canonical box (2, 3) as SAM2's two corner points: (1, 2, 2), (1, 2)."""
    corners = crop.forward_points(box[:, 1:] + np.array([[-0.5], [0.5]]))
    return torch.from_numpy(corners.astype(np.float32))[None], torch.tensor([[2, 3]], dtype=torch.int32)


def click_points(crop: SliceCrop, edits: Sequence[Edit], z: int | None = None) -> tuple[Tensor, Tensor]:
    """Anchors of edits as points (1, n, 2) in the window's pixels and labels (1, n); one empty point without any.

    With ``z`` only anchors on that slice.
    """
    anchors = [
        (anchor, edit.label) for edit in edits for anchor in edit.anchors if z is None or round(float(anchor[0])) == z
    ]
    if not anchors:
        return torch.zeros(1, 1, 2), torch.full((1, 1), -1, dtype=torch.int32)
    points = crop.forward_points(np.array([anchor[1:] for anchor, _ in anchors]))
    labels = torch.tensor([[label for _, label in anchors]], dtype=torch.int32)
    return torch.from_numpy(points.astype(np.float32))[None], labels
