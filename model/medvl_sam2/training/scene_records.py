"""Cases as the scene head reads them: the measured scene and the report, measured once and kept on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from medvl_sam2.modeling.scene_measured import MeasuredScene, measured_scene
from medvl_sam2.modeling.vision_language import VisionLanguage
from medvl_sam2.training.alignment_records import AlignmentRecord
from medvl_sam2.training.language_batches import stack_views
from medvl_sam2.training.run_settings import digest


@dataclass(frozen=True, eq=False)
class SceneRecord:
    """One volume: ``organs`` (organs, F), judged ``lesions`` (slots, G), edges ``extent_mm`` (z, y, x) of the view.

    ``reports`` are wordings of one report, or empty.
    """

    organs: np.ndarray
    lesions: np.ndarray
    extent_mm: tuple[float, float, float]
    reports: tuple[str, ...]


class SceneReading:
    """Measures cases with one model and keeps what was found in a folder, a file a case.

    The folder belongs to one run: other weights, or other cases of the same names, need another one.
    """

    def __init__(self, language: VisionLanguage, folder: Path) -> None:
        """The ``language`` half of a model in evaluation mode."""
        folder.mkdir(parents=True, exist_ok=True)
        self._language, self._folder = language, folder

    def measured(self, name: str, read: Callable[[], AlignmentRecord]) -> SceneRecord:
        """The case ``name`` as the network sees it; it is only read where it was not measured before."""
        return self.kept(name, lambda: self._measured(read()))

    def kept(self, name: str, make: Callable[[], SceneRecord]) -> SceneRecord:
        """The case ``name`` from the folder, or what ``make`` gives, which is kept there."""
        path = self._folder / f"{digest(name)}.npz"
        if not path.exists():
            self._write(path, make())
        with np.load(path, allow_pickle=False) as data:
            texts = json.loads(data["texts"].tobytes())
            z, y, x = texts["extent_mm"]
            return SceneRecord(data["organs"], data["lesions"], (z, y, x), tuple(texts["reports"]))

    @torch.inference_mode()
    def _measured(self, record: AlignmentRecord) -> SceneRecord:
        views, extent = stack_views([record], None)
        device = self._language.lm.device
        found = measured_scene(self._language, views.to(device), extent.to(device))
        organs, lesions = (part[0].cpu().numpy() for part in (found.organs, found.lesions))
        return SceneRecord(organs, lesions, record.extent_mm, record.reports)

    @staticmethod
    def _write(path: Path, record: SceneRecord) -> None:
        partial = path.with_suffix(f".{os.getpid()}.partial.npz")
        texts = json.dumps({"extent_mm": record.extent_mm, "reports": record.reports})
        np.savez(
            partial,
            organs=record.organs,
            lesions=record.lesions,
            texts=np.frombuffer(texts.encode(), dtype=np.uint8),
        )
        partial.replace(path)


def stack_scenes(records: Sequence[SceneRecord]) -> MeasuredScene:
    """Records as one batch."""
    return MeasuredScene(
        torch.from_numpy(np.stack([record.organs for record in records])),
        torch.from_numpy(np.stack([record.lesions for record in records])),
        torch.tensor([record.extent_mm for record in records], dtype=torch.float32),
    )
