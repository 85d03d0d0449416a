"""From words to a place: the ``[SEG]`` state points at the scene's organs and lesions.

The scene stream gives every organ and every larger lesion a token and a map. A ``[SEG]`` state is matched with those
tokens; the maps it points at are the rough place from which the slice segmenter starts. Pointing at nothing
means that the object is not there.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from medvl_sam2.config import ModelConfig
from medvl_sam2.modeling.scene_facts import lesion_parts

_NEIGHBOURS = np.ones((3, 3, 3), dtype=bool)
_NOWHERE = -8.0
_LEAST_CHANCE = 0.1
"""An element less likely than this is not meant, also when no other is likelier."""


@dataclass(frozen=True)
class SceneElements:
    """What the ``[SEG]`` state can point at in one volume.

    ``tokens`` (E, H): scene tokens, ``organs`` of them first, then lesion slots (largest first). ``maps`` (E, d, h, w):
    logits on the scene's grid, which spans the whole canonical volume; an empty slot is nowhere.
    """

    tokens: Tensor
    maps: Tensor
    organs: int


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
    organs, slots = len(config.scene_organs), config.scene.lesions
    logits = logits.float()
    lesion = logits[organs]
    maps = torch.full((organs + slots, *lesion.shape), _NOWHERE, device=logits.device)
    maps[:organs] = logits[:organs]
    parts = lesion_parts(torch.sigmoid(lesion).cpu().numpy(), config.scene.threshold, slots)
    for slot, part in enumerate(parts):
        near = torch.from_numpy(ndimage.binary_dilation(part, _NEIGHBOURS)).to(logits.device)
        maps[organs + slot] = torch.where(near, lesion, maps[organs + slot])
    return SceneElements(tokens, maps, organs)


def lesion_hosts(elements: SceneElements) -> list[int | None]:
    """The organ index that most of every lesion slot's cells belong to; None for an empty slot."""
    shares = torch.sigmoid(elements.maps[: elements.organs])
    hosts: list[int | None] = []
    for place in elements.maps[elements.organs :]:
        cells = place > 0
        hosts.append(int((shares * cells).sum(dim=(1, 2, 3)).argmax()) if bool(cells.any()) else None)
    return hosts


def lesions_within(scores: Tensor, elements: SceneElements, organs: Collection[int]) -> Tensor:
    """``scores`` (K, E) without the lesion slots whose cells belong most to another organ than ``organs`` (indices).

    Where a lesion was pointed at, no organ takes its place.
    """
    narrowed = scores.clone()
    narrowed[scores.argmax(dim=1) >= elements.organs, : elements.organs] = -torch.inf
    for slot, host in enumerate(lesion_hosts(elements), start=elements.organs):
        if host not in organs:
            narrowed[:, slot] = -torch.inf
    return narrowed


def pointed_place(scores: Tensor, elements: SceneElements, single: bool = False) -> Tensor:
    """Rough place (K, d, h, w) as logits: the maps of the elements that ``scores`` (K, E) point at.

    Those are the elements above one half; where there is none, or only a ``single`` object is meant, the likeliest,
    unless it is quite unlikely.
    """
    places = []
    for row in scores:
        chance, likeliest = torch.sigmoid(row), torch.arange(len(row), device=row.device) == row.argmax()
        likeliest &= chance > _LEAST_CHANCE
        sure = chance > 0.5
        meant = likeliest if single or not bool(sure.any()) else sure
        nowhere = torch.full_like(elements.maps[0], _NOWHERE)
        places.append(elements.maps[meant].amax(dim=0) if bool(meant.any()) else nowhere)
    return torch.stack(places)
