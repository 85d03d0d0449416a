"""Scenes of generated cases that retrieval runs on, kept in a folder.

A pool of 500 takes ten minutes of one core to look at, and the head over the scene milliseconds: with the scenes kept
an interrupted run goes on, several runs may share the looking, and another head on the same weights costs nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from medvl_sam2.errors import DataError
from medvl_sam2.evaluation.cases import generated_cases
from medvl_sam2.evaluation.language_tasks import EmbeddedPair, ImageTextEncoder
from medvl_sam2.modeling.scene_measured import MeasuredScene
from medvl_sam2.types import Volume


class SceneEncoder(ImageTextEncoder, Protocol):
    """What a predictor offers whose image-text model reads the scene."""

    @property
    def reads(self) -> str | None:
        """Digest of the weights whose scene it reads; None where it does not."""

    def open(self, volume: Volume) -> Any:
        """A session on a volume."""

    def measured_scene(self, session: Any) -> MeasuredScene:
        """What the scene says of the volume."""

    def embed_scene(self, scene: MeasuredScene) -> np.ndarray:
        """Embedding (D,), norm 1."""


class KeptScenes:
    """Pairs of generated cases by seed; a case is made and looked at only where the folder does not have it."""

    def __init__(self, encoder: SceneEncoder, folder: Path) -> None:
        """Raises :class:`DataError` when ``encoder`` has no image-text model that reads scenes."""
        if encoder.reads is None:
            raise DataError("scenes are kept for an image-text model that reads them; leave --scenes out")
        folder.mkdir(parents=True, exist_ok=True)
        self._encoder, self._folder = encoder, folder
        self._prefix = encoder.reads[:12]

    def pair(self, seed: int) -> EmbeddedPair:
        """The case of ``seed`` as the model embeds it; seeds that may have been trained on raise :class:`DataError`."""
        path = self._folder / f"{self._prefix}_{seed}.npz"
        if not path.exists():
            self._look(seed, path)
        with np.load(path, allow_pickle=False) as data:
            parts = [torch.from_numpy(data[name])[None] for name in MeasuredScene._fields]
            report = data["report"].tobytes().decode()
        seen = self._encoder.embed_scene(MeasuredScene(*parts))
        return EmbeddedPair(f"generated_{seed}", report, seen, self._encoder.embed_text(report))

    def _look(self, seed: int, path: Path) -> None:
        (case,) = generated_cases(1, seed)
        assert case.generated is not None
        scene = self._encoder.measured_scene(self._encoder.open(case.volume))
        values = {name: part[0].cpu().numpy() for name, part in scene._asdict().items()}
        partial = path.with_suffix(f".{os.getpid()}.partial.npz")
        np.savez(partial, report=np.frombuffer(case.generated.report.encode(), dtype=np.uint8), **values)
        partial.replace(path)
