"""Scenes of generated cases measured from their own labels instead of the network's map.

A pass of encoder and scene costs a second on one core, reading the truth off a case's label cells thirty milliseconds,
and the measurements hardly differ: over twelve cases organs by 0.02 at unit scale. What the map misses or invents is
told apart by the held-out cases, which are measured as volumes are in use.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from medvl_sam2.config import SceneConfig
from medvl_sam2.modeling.scene_facts import (
    LESION_CENTRE,
    LESION_CONTRAST,
    LESION_FEATURES,
    LESION_SIZE,
    LESION_SPREAD,
    LESION_VALUE,
    measure_scene,
    size_features,
)
from medvl_sam2.training.language_data import ORGANS, FindingRecord, LanguageCase
from medvl_sam2.training.scene_records import SceneRecord

_SURE = 20.0
"""Log-odds of a cell that belongs to a lesion, and of the lesion's kind."""
_HOST_SHARE = 0.95
"""Share of its own organ's cells that the map gives a lesion; neighbours have some of what is left."""
_NEIGHBOUR_SHARE = 0.3


def labelled_scene(case: LanguageCase, config: SceneConfig) -> SceneRecord:
    """``case`` as a scene that sees everything would measure it, largest lesion first."""
    grid = case.organ_cells.shape[1:]
    view = torch.from_numpy(case.view.astype(np.float32))[None, None]
    organs = torch.logit((torch.from_numpy(case.organ_cells).float() / 255).clamp(1e-4, 1 - 1e-4))
    extent = torch.tensor([case.extent_mm])
    planes = view.shape[2] // grid[0]  # the map has every plane of the view, which the first and the last one tell
    logits = _logits(organs.repeat_interleave(planes, dim=1), config)
    mean = _mean(view, logits)
    measured = measure_scene(logits, mean, extent, len(ORGANS), 0, config.threshold).organs[0].numpy()
    rows = [
        _lesion(finding, torch.from_numpy(cells), organs, view, extent, config)
        for finding, cells in zip(case.findings, case.lesion_cells, strict=True)
        if cells.any()
    ]
    rows.sort(key=lambda row: -float(row[LESION_SIZE][0]))
    lesions = np.zeros((config.lesions, LESION_FEATURES + len(ORGANS)), dtype=np.float32)
    for slot, row in enumerate(rows[: config.lesions]):
        lesions[slot] = row
    return SceneRecord(measured, lesions, case.extent_mm, case.reports)


def _lesion(
    finding: FindingRecord, cells: Tensor, organs: Tensor, view: Tensor, extent: Tensor, config: SceneConfig
) -> np.ndarray:
    """(G,) of one lesion; its ``cells`` are those it touches, so size and spread are taken from its diameter."""
    logits = _logits(organs, config)
    logits[0, len(ORGANS)] = torch.where(cells, _SURE, -_SURE)
    logits[0, len(ORGANS) + 1 + config.kinds.index(finding.kind)] = _SURE
    mean = _mean(view, logits)
    row = measure_scene(logits, mean, extent, len(ORGANS), 1, config.threshold, least=0.0).lesions[0, 0].numpy()
    size = size_features(np.pi / 6 * finding.diameter_mm**3)
    row[LESION_SPREAD] *= min(1.0, size[1] / float(row[LESION_SIZE][1]))
    row[LESION_SIZE] = size
    place = [min(n - 1, int(at * n)) for at, n in zip(row[LESION_CENTRE], mean.shape[1:], strict=True)]
    value = float(mean[0][tuple(place)])  # at the centre, as cells on the border hold both
    row[LESION_CONTRAST] += value - row[LESION_VALUE]
    row[LESION_VALUE] = value
    row[LESION_FEATURES:] *= _NEIGHBOUR_SHARE
    row[LESION_FEATURES + ORGANS.index(finding.organ)] = _HOST_SHARE
    return row


def _logits(organs: Tensor, config: SceneConfig) -> Tensor:
    """Organs' log-odds (organs, d, h, w) as a map without lesions (1, organs + 1 + kinds, d, h, w)."""
    nothing = torch.full((1 + len(config.kinds), *organs.shape[1:]), -_SURE)
    return torch.cat([organs, nothing])[None]


def _mean(view: Tensor, logits: Tensor) -> Tensor:
    """Mean value (1, d, h, w) of the ``view`` (1, 1, D, H, W) in every cell of the map ``logits``."""
    d, h, w = logits.shape[2:]
    return functional.adaptive_avg_pool3d(view, (d, h, w))[:, 0]
