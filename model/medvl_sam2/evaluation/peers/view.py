"""The whole volume on a fixed grid, as MONAI's DeepEdit sees it: resized, clicks as channels, mask resized back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional
from monai.apps.deepedit.transforms import AddGuidanceSignalDeepEditd
from torch import Tensor

from medvl_sam2.geometry import CanonicalTransform, global_view
from medvl_sam2.intensity import global_channel
from medvl_sam2.types import Modality, Volume

Grid = tuple[int, int, int]


def image_view(image: np.ndarray, modality: Modality, grid: Grid) -> Tensor:
    """Canonical image (Z, Y, X), HU for CT, to (1, D, H, W) in [0, 1]: the same channel our global encoder gets."""
    return global_view(global_channel(image, modality), grid)


def mask_view(mask: np.ndarray, grid: Grid) -> Tensor:
    """Bool (Z, Y, X) to its share of every cell (1, D, H, W)."""
    return global_view(torch.from_numpy(np.ascontiguousarray(mask, dtype=np.float32)), grid)


def guidance(points: np.ndarray, labels: np.ndarray, grid: Grid, sigma: int) -> Tensor:
    """Clicks (N, 3) z, y, x cells with labels (N,) 1 or 0 as object and background channel (2, D, H, W) in [0, 1]."""
    cells = np.rint(points).astype(np.int64).reshape(-1, 3)
    data = {
        "image": np.zeros((1, *grid), dtype=np.float32),
        "guidance": {"object": cells[labels == 1].tolist(), "background": cells[labels != 1].tolist()},
    }
    with torch.autocast("cpu", enabled=False):  # in a training step it would be smoothed in bfloat16, which NumPy lacks
        return torch.from_numpy(AddGuidanceSignalDeepEditd(keys="image", sigma=sigma)(data)["image"][1:])


@dataclass(frozen=True)
class Opened:
    """A volume as a peer sees it: ``image`` (1, D, H, W) and how canonical and stored voxels relate."""

    image: Tensor
    transform: CanonicalTransform

    @classmethod
    def of(cls, volume: Volume, grid: Grid) -> Opened:
        """Resize a volume to ``grid``."""
        transform = CanonicalTransform(volume.geometry)
        return cls(image_view(transform.forward_array(volume.array), volume.modality, grid), transform)

    def cells(self, stored: np.ndarray) -> np.ndarray:
        """Stored voxels (N, 3) to grid cells (N, 3) z, y, x, not rounded, inside the grid."""
        grid = np.asarray(self.image.shape[1:], dtype=np.float64)
        cells = (self.transform.forward_points(stored) + 0.5) * grid / np.asarray(self.transform.shape) - 0.5
        return np.clip(cells, 0, grid - 1)

    def canonical(self, logits: Tensor) -> Tensor:
        """Logits (D, H, W) on the canonical grid (Z, Y, X)."""
        return functional.interpolate(
            logits[None, None].float(), size=self.transform.shape, mode="trilinear", align_corners=False
        )[0, 0]
