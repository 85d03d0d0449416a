"""What the frozen language side says of the training volumes: image tokens, scene elements and where they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medvl_sam2.modeling.unified import GlobalLook, UnifiedModel, language_view
from medvl_sam2.training.pointing import slot_lies_on, wanted_elements
from medvl_sam2.training.samples import LabelledVolume, Target


@dataclass(frozen=True, eq=False)
class SeenVolume:
    """What the frozen parts say of a volume.

    Image ``tokens`` (1, n, H), scene tokens ``elements`` (E, H), and where those are: ``maps`` (E, d, h, w) float16
    logits on the CPU. Without a scene E is 0.
    """

    tokens: Tensor
    elements: Tensor
    maps: Tensor


class SceneLooks:
    """Looks at every volume once, when it is first asked for."""

    def __init__(self, model: UnifiedModel, volume_at: Callable[[int], LabelledVolume]) -> None:
        self.model = model
        self.volume_at = volume_at
        self._looks: dict[int, SeenVolume] = {}
        self._wanted: dict[tuple[int, str, Target | None], Tensor] = {}

    def of(self, number: int) -> SeenVolume:
        """The look at volume ``number``."""
        if number not in self._looks:
            volume, device = self.volume_at(number), next(self.model.parameters()).device
            size = self.model.config.vision.input_size
            view, extent = language_view(volume.image, volume.spacing, volume.modality, size)
            with torch.no_grad():
                self.keep(number, self.model.look(view.to(device), extent.to(device)))
        return self._looks[number]

    def keep(self, number: int, look: GlobalLook) -> None:
        """Take ``look`` for that at volume ``number``."""
        elements, maps = torch.zeros(0, 0), torch.zeros(0)
        if look.elements is not None:
            elements, maps = look.elements.tokens, look.elements.maps.cpu().half()
        self._looks[number] = SeenVolume(look.tokens, elements, maps)

    def wanted(self, number: int, name: str, target: Target | None) -> Tensor:
        """Which elements (E,) in {0, 1} a request for ``name`` means: its organs, or the lesion slots on ``target``.

        None are wanted where the volume has no such thing (``target`` None).
        """
        key = (number, name, target)
        if key not in self._wanted:
            organs = self.model.config.scene_organs
            slots = self.of(number).maps[len(organs) :] > 0
            on_target = torch.zeros(len(slots), dtype=torch.bool)
            names = () if target is None else target.members or (name,)
            if target is not None and not set(names) & set(organs):
                mask = torch.from_numpy(self.volume_at(number).mask(target, slice(None)).astype(np.float32))
                cells = F.adaptive_max_pool3d(mask[None, None], slots.shape[1:])[0, 0] > 0.5
                on_target = torch.tensor([slot_lies_on(slot, cells) for slot in slots])
            self._wanted[key] = wanted_elements(names, organs, on_target)
        return self._wanted[key]

    def place(self, number: int, name: str, target: Target | None) -> Tensor | None:
        """The scene's map (d, h, w) of an organ class, whether it is there or not, or of a lesion it found."""
        organs, maps = self.model.config.scene_organs, self.of(number).maps
        if name in organs:
            return maps[organs.index(name)].float()
        if not name.startswith("lesion"):
            return None
        meant = self.wanted(number, name, target) > 0.5
        return maps[meant].amax(dim=0).float() if bool(meant.any()) else None
