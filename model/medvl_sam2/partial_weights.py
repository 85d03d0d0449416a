"""Weights of one stage put into a part of another model: the way from an earlier stage to a later one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from medvl_sam2.checkpoint import ALIGNMENT_FOLDER, META_FILE, WEIGHTS_FILE, load_checkpoint
from medvl_sam2.errors import CheckpointError
from medvl_sam2.modeling.dcformer import DCFormer
from medvl_sam2.modeling.scene_measured import scene_sha256
from medvl_sam2.modeling.scene_text import SceneTextModel
from medvl_sam2.modeling.siglip import ImageTextModel
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.vision_language import VisionLanguage

ENCODER_PREFIXES = ("language.vision.", "vision.", "")
"""What the volume encoder's weights are called in a checkpoint, in a stage's result, and in a converted part."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights by name of a checkpoint folder (verified), a converted part's folder, or a stage's safetensors file.

    Raises :class:`CheckpointError` when there are none or they are damaged.
    """
    path = Path(path)
    if (path / META_FILE).exists():
        return load_checkpoint(path).state
    file = path / WEIGHTS_FILE if path.is_dir() else path
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}); give a checkpoint folder or a stage's result"
        ) from error


def load_part(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    source: Path,
    prefix: str = "",
    parts: Sequence[str] = ("",),
    optional: Sequence[str] = (),
) -> None:
    """Copy the ``weights`` called ``prefix`` and a name of ``module`` into it; ``source`` names them in messages.

    ``parts``: beginnings of the own names that are wanted; all others stay. ``optional``: beginnings of names that stay
    where the source has none of that beginning. Of weights that share memory, as a tied output layer, one name is
    enough.

    Raises:
        CheckpointError: a wanted weight is missing or of another shape, or one of these parts is unknown here. Nothing
            has changed then.
    """
    chosen = tuple(parts)
    own = {name: tensor for name, tensor in module.state_dict().items() if name.startswith(chosen)}
    needed = {n for n, _ in module.named_parameters()} | {n for n, _ in module.named_buffers()}
    found = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    found = {name: tensor for name, tensor in found.items() if name.startswith(chosen)}
    absent = tuple(beginning for beginning in optional if not any(name.startswith(beginning) for name in found))
    missing = {name for name in needed & set(own) if not name.startswith(absent)} - set(found)
    odd = sorted(missing) + sorted(set(found) - set(own))
    odd += [name for name in own if name in found and own[name].shape != found[name].shape]
    if odd:
        raise CheckpointError(f"{source} does not fit this model at {odd[0]!r}; start from weights of this preset")
    with torch.no_grad():
        for name, tensor in found.items():
            own[name].copy_(tensor)


def load_encoder(vision: DCFormer, source: Path) -> None:
    """Begin with the volume encoder of a checkpoint folder, a converted part, or a stage's safetensors file.

    The file may be ``alignment.safetensors`` of an alignment stage or ``scene.safetensors`` of a scene phase.
    Raises :class:`CheckpointError` when it holds no encoder of this configuration.
    """
    weights = read_weights(source)
    first = next(iter(vision.state_dict()))
    prefix = next((p for p in ENCODER_PREFIXES if p + first in weights), None)
    if prefix is None:
        raise CheckpointError(f"{source} holds no volume encoder ({first!r}); give the result of a stage that has one")
    # Of a result that is not all encoder only the encoder's own names are looked at.
    load_part(vision, weights, source, prefix, [f"s{number}." for number in range(5)])


def load_image_text(folder: Path) -> ImageTextModel | SceneTextModel:
    """The image-text model of an alignment stage's checkpoint folder, in evaluation mode.

    Raises :class:`CheckpointError` when the folder is damaged or belongs to another kind of model.
    """
    checkpoint = load_checkpoint(folder)
    if checkpoint.config.alignment is None:
        raise CheckpointError(f"{folder} holds no image-text model; put the folder {ALIGNMENT_FOLDER!r} of a run there")
    kind = ImageTextModel if checkpoint.config.alignment.scene is None else SceneTextModel
    model = kind(checkpoint.config, Tokenizer.load(checkpoint.tokenizer_path))
    load_part(model, checkpoint.state, folder)
    return model.eval()


def load_image_text_beside(folder: Path, language: VisionLanguage) -> ImageTextModel | SceneTextModel:
    """:func:`load_image_text` for use beside ``language``, whose scene a head without an encoder of its own reads.

    Raises :class:`CheckpointError` also when such a head was trained on the scene of other weights.
    """
    model = load_image_text(folder)
    if isinstance(model, SceneTextModel) and (language.scene is None or model.reads != scene_sha256(language)):
        raise CheckpointError(
            f"{folder} was trained on the scene of other weights than those it lies beside; run the scene alignment "
            "stage on this checkpoint, or remove the folder"
        )
    return model
