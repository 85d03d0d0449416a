"""From words to a place: the ``[SEG]`` state points at the scene's organs and lesions.

The scene stream gives every organ and every larger lesion a token and a map. A ``[SEG]`` state is matched with those
tokens; the maps it points at, weighted, are the rough place from which the slice segmenter starts. Pointing at nothing
means that the object is not there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from medvl_sam2.config import ModelConfig

_NEIGHBOURS = np.ones((3, 3, 3), dtype=bool)
_NOWHERE = -8.0


@dataclass(frozen=True)
class SceneElements:
    """What the ``[SEG]`` state can point at in one volume.

    ``tokens`` (E, H): scene tokens, organs first, then lesion slots (largest first). ``maps`` (E, d, h, w): logits on
    the stem's grid, which spans the whole canonical volume; an empty slot is nowhere.
    """

    tokens: Tensor
    maps: Tensor


class ScenePointer(nn.Module):
    """Scores (K, E) of K ``[SEG]`` states against E scene tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.language.hidden_size
        self.query = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.key = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.bias = nn.Parameter(torch.tensor(-2.0))
        self.scale = hidden**-0.5

    def forward(self, states: Tensor, tokens: Tensor) -> Tensor:
        """States (K, H) and tokens (E, H), or (K, E, H) when every state has its own volume -> logits (K, E)."""
        keys = self.key(tokens)
        if keys.ndim == 2:
            keys = keys.expand(len(states), -1, -1)
        return torch.einsum("kh,keh->ke", self.query(states), keys) * self.scale + self.bias


def scene_elements(tokens: Tensor, logits: Tensor, config: ModelConfig) -> SceneElements:
    """Elements of one volume from its scene tokens (E, H) and dense logits (organs + 1 + kinds, d, h, w).

    Lesion slots follow the order in which the scene measures them: connected cells above the threshold, by mass.
    """
    organs = len(config.scene_organs)
    logits = logits.float()
    share = torch.sigmoid(logits[organs]).cpu().numpy()
    parts, count = ndimage.label(share > config.scene.threshold, _NEIGHBOURS)
    maps = [*logits[:organs]]
    mass = ndimage.sum_labels(share, parts, np.arange(1, count + 1)) if count else np.zeros(0)
    for part in np.argsort(-mass)[: config.scene.lesions]:
        near = torch.from_numpy(ndimage.binary_dilation(parts == part + 1, _NEIGHBOURS)).to(logits.device)
        maps.append(torch.where(near, logits[organs], torch.full_like(logits[organs], _NOWHERE)))
    while len(maps) < organs + config.scene.lesions:
        maps.append(torch.full_like(logits[organs], _NOWHERE))
    return SceneElements(tokens, torch.stack(maps))


def pointed_place(scores: Tensor, elements: SceneElements) -> Tensor:
    """Rough place (K, d, h, w) as logits: per cell the likeliest element that ``scores`` (K, E) point at."""
    chance = torch.sigmoid(scores)[:, :, None, None, None] * torch.sigmoid(elements.maps)[None]
    return torch.logit(chance.amax(dim=1).clamp(1e-4, 1 - 1e-4))
