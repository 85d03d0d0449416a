"""What the language phase begins with and leaves behind."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from medvl_sam2.checkpoint import load_checkpoint
from medvl_sam2.errors import CheckpointError
from medvl_sam2.modeling.vision_language import VisionLanguage
from medvl_sam2.partial_weights import load_part

_TOKEN_PARTS = ("scene.slots", "scene.organ_token.", "scene.lesion_token.")
"""Of the scene, trained by the language phase."""
LESION_PARTS = ("scene.judge.", "scene.words.")
"""Of the scene, fitted and trained by the language phase; weights before demo-4 have none."""


def load_scene(model: VisionLanguage, path: Path) -> None:
    """Take encoder and scene map from ``scene.safetensors`` of a scene phase.

    Raises :class:`CheckpointError` when the file belongs to another configuration.
    """
    later = (*_TOKEN_PARTS, *LESION_PARTS)
    own = {
        k: v for k, v in model.state_dict().items() if k.startswith(("vision.", "scene.")) and not k.startswith(later)
    }
    found = {k: v for k, v in load_file(path).items() if k in own}
    odd = [k for k, v in own.items() if k not in found or found[k].shape != v.shape]
    if odd:
        raise CheckpointError(f"{path} does not fit this model at {odd[0]!r}; run the scene phase with this preset")
    model.load_state_dict(found, strict=False)


def load_language(model: VisionLanguage, checkpoint: Path) -> None:
    """Take everything of a checkpoint folder that is not of the segmenter.

    Raises :class:`CheckpointError` when it belongs to another configuration.
    """
    load_part(model, load_checkpoint(checkpoint).state, checkpoint, "language.", optional=LESION_PARTS)


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """State dict without the tied output embedding, contiguous, as safetensors stores it."""
    return {name: t.detach().contiguous() for name, t in model.state_dict().items() if name != "lm.lm_head.weight"}
