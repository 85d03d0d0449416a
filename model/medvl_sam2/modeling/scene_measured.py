"""The measured scene of volumes as a head reads it, and which weights it was measured with."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from medvl_sam2.errors import ConfigError
from medvl_sam2.modeling.vision_language import VisionLanguage

_UNUSED = ("organ_token.", "lesion_token.", "words.", "slots")
"""Weights of a scene that embed what was measured and take no part in measuring."""


class MeasuredScene(NamedTuple):
    """What the scene says of a batch: ``organs`` (B, organs, F), ``lesions`` (B, slots, G) as judged.

    ``extent_mm`` (B, 3): edges (z, y, x) of the view.
    """

    organs: Tensor
    lesions: Tensor
    extent_mm: Tensor

    def to(self, device: torch.device | str) -> MeasuredScene:
        """The same on ``device``."""
        return MeasuredScene(*(part.to(device) for part in self))


@torch.no_grad()
def measured_scene(language: VisionLanguage, views: Tensor, extent_mm: Tensor) -> MeasuredScene:
    """Scenes of global views (B, 1, D, H, W) with edges ``extent_mm`` (B, 3) in mm; not differentiable.

    Raises :class:`ConfigError` when the model has no scene.
    """
    if language.scene is None:
        raise ConfigError("the model has no scene (SceneConfig.lesions is 0); the alignment stage needs none")
    logits = language.scene(views, language.vision(views))
    facts = language.scene.judged(language.scene.measure(views, logits, extent_mm))
    return MeasuredScene(facts.organs, facts.lesions, extent_mm)


def scene_sha256(language: VisionLanguage) -> str:
    """Digest of all weights that a scene is measured with, as they are stored in half precision.

    Raises :class:`ConfigError` when the model has no scene.
    """
    if language.scene is None:
        raise ConfigError("the model has no scene (SceneConfig.lesions is 0); a head over one cannot lie beside it")
    parts = {f"vision.{name}": tensor for name, tensor in language.vision.state_dict().items()}
    parts |= {f"scene.{n}": t for n, t in language.scene.state_dict().items() if not n.startswith(_UNUSED)}
    found = hashlib.sha256()
    for name in sorted(parts):
        tensor = parts[name].detach().cpu()
        found.update(name.encode() + b"\0")
        found.update((tensor.half() if tensor.is_floating_point() else tensor).contiguous().numpy().tobytes())
    return found.hexdigest()
