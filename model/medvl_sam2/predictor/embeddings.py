"""Volumes and texts as unit vectors of one space, by whichever image-text model a checkpoint has."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from medvl_sam2.checkpoint import ALIGNMENT_FOLDER
from medvl_sam2.errors import CheckpointError, PromptError
from medvl_sam2.modeling.scene_measured import MeasuredScene
from medvl_sam2.modeling.scene_text import SceneTextModel
from medvl_sam2.modeling.siglip import ImageTextModel


class Embeddings:
    """An image-text model on ``device``, or none; vectors (D,) are float32 on the CPU."""

    def __init__(self, model: ImageTextModel | SceneTextModel | None, device: torch.device) -> None:
        self.device = device
        self._model = None if model is None else model.eval().to(device)

    @property
    def available(self) -> bool:
        """Whether there is a model."""
        return self._model is not None

    @property
    def reads(self) -> str | None:
        """Digest of the weights whose scene the model reads; None where it has an encoder of its own."""
        return self._model.reads if isinstance(self._model, SceneTextModel) else None

    @property
    def view_size(self) -> tuple[int, int, int] | None:
        """Size (D, H, W) of the global view that :meth:`of_view` takes; None where a scene is read instead.

        Raises:
            CheckpointError: there is no model.
        """
        model = self._present()
        return None if isinstance(model, SceneTextModel) else model.config.vision.input_size

    def of_view(self, view: Tensor) -> np.ndarray:
        """Of a canonical global view (1, 1, D, H, W) in [0, 1] (SigLIP, arXiv 2303.15343)."""
        model = self._present()
        if isinstance(model, SceneTextModel):
            raise CheckpointError("this checkpoint's image-text model reads the scene; embed that")
        return model.embed_views(view.to(self.device))[0].cpu().numpy()

    def of_scene(self, scene: MeasuredScene) -> np.ndarray:
        """Of the measured scene of one volume; raises :class:`CheckpointError` for a model that reads none."""
        model = self._present()
        if not isinstance(model, SceneTextModel):
            raise CheckpointError("this checkpoint's image-text model has an encoder of its own; embed the volume")
        return model.embed_scenes(scene.to(self.device))[0].cpu().numpy()

    def of_text(self, text: str) -> np.ndarray:
        """Of a report; what does not fit is left out from the end. Raises :class:`PromptError` for an empty one."""
        model = self._present()
        if not text.strip():
            raise PromptError("the text to embed is empty; write what the volume should show")
        return model.embed_texts([text.strip()])[0].cpu().numpy()

    def _present(self) -> ImageTextModel | SceneTextModel:
        if self._model is None:
            raise CheckpointError(
                f"this checkpoint has no image-text model; copy the folder {ALIGNMENT_FOLDER!r} of an alignment stage "
                "into the checkpoint folder and load it again"
            )
        return self._model
