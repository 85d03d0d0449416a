"""One case of the challenge: a volume, a label map, boxes; from the challenge's npz or from any image and mask.

The npz of the challenge states neither orientation nor origin: its arrays (D, H, W) are taken for canonical (Z, Y, X),
which they are where the source was axial. ``spacing`` belongs to the axes in array order, as the challenge's script
uses it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medvl_sam2.errors import DataError
from medvl_sam2.evaluation.cases import EvaluationCase
from medvl_sam2.evaluation.challenge.npz import read_npz
from medvl_sam2.evaluation.tasks import draw_some
from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.intensity import guess_modality
from medvl_sam2.training.clicks import box_prompt
from medvl_sam2.types import Volume
from medvl_sam2.volume_io import read_mask, read_volume, volume_of

BOX_SEED = 2025
MAX_CLASSES = 255
"""The challenge casts answers to 8 bits."""


@dataclass(frozen=True)
class ChallengeCase:
    """``labels`` (Z, Y, X) uint8 on the canonical grid of ``volume``: value ``n`` is ``names[n - 1]``, all present.

    ``boxes``: canonical int (2, 3) a name, or None for a case that starts with clicks. ``patient`` is the unit of the
    bootstrap.
    """

    name: str
    patient: str
    volume: Volume
    labels: np.ndarray
    names: tuple[str, ...]
    boxes: tuple[np.ndarray, ...] | None

    def without_boxes(self) -> ChallengeCase:
        """The same case with clicks alone."""
        return ChallengeCase(self.name, self.patient, self.volume, self.labels, self.names, None)

    def sha256(self) -> str:
        """Digest of all that an engine is given or scored by: voxels, frame, modality, labels, names and boxes."""
        arrays = [self.volume.array, self.volume.geometry.affine, self.labels, *(self.boxes or ())]
        kinds = [(array.dtype.str, array.shape) for array in arrays]
        total = hashlib.sha256(repr((self.names, self.volume.modality.value, kinds)).encode())
        for array in arrays:
            total.update(np.ascontiguousarray(array).data)
        return total.hexdigest()


def drawn_boxes(labels: np.ndarray, count: int) -> tuple[np.ndarray, ...]:
    """Boxes of labels 1..``count`` by the challenge's rule: int (2, 3), lowest and highest voxel, both inclusive.

    ``get_boxes.py``: exact range of slices; in plane the box of the middle labelled slice, widened on all four sides by
    one draw of 0..5 times the slice's edge over 256. Draws start at seed 2025 for every case, as for the first case of
    each of the script's processes; later cases of the script depend on how its processes share the work. Its draws of
    colours for pictures lie behind those of all boxes of a case.
    """
    rng = np.random.RandomState(BOX_SEED)
    _, height, width = labels.shape
    boxes = []
    for value in range(1, count + 1):
        box = box_prompt(labels == value)
        shift = int(rng.randint(0, 6, 1)[0])
        margin = np.array([0, int(shift * height / 256), int(shift * width / 256)])
        low, high = np.maximum(box[0] - margin, 0), np.minimum(box[1] + margin, np.array(labels.shape) - 1)
        boxes.append(np.stack([low, high]))
    return tuple(boxes)


def case_from_npz(path: Path, truth: Path | None = None) -> ChallengeCase:
    """A case from the challenge's npz: ``imgs``, ``spacing``, optional ``boxes``; ``gts`` there or in ``truth``.

    Label values are numbered 1..N in rising order, as the boxes are. Raises :class:`DataError` for a file that does not
    hold a case, and for a truth without background, whose first class the challenge's script would drop.
    """
    members = read_npz(path)
    volume = volume_from(members, path)
    labels = np.asarray((members if truth is None else read_npz(truth)).get("gts"))
    if labels.shape != volume.geometry.shape or labels.dtype.kind not in "biu":
        raise DataError(f"{truth or path} holds no label map 'gts' of shape {volume.geometry.shape}")
    values = [int(value) for value in np.unique(labels)]
    if values[0] != 0 or not 1 < len(values) <= MAX_CLASSES + 1:
        raise DataError(
            f"{truth or path}: labels {values[:4]}... must be 0 for background and 1 to {MAX_CLASSES} classes"
        )
    boxes = boxes_from(members, volume.geometry.shape, path)
    if boxes is not None and len(boxes) != len(values) - 1:
        raise DataError(f"{path} has {len(boxes)} boxes for {len(values) - 1} classes; give one a class")
    numbered = np.searchsorted(values, labels).astype(np.uint8)
    return ChallengeCase(path.stem, path.stem, volume, numbered, tuple(f"class_{v}" for v in values[1:]), boxes)


def case_from_files(image: Path, mask: Path) -> ChallengeCase:
    """A case from an image and its label map, placed on each other by their affines; boxes are drawn."""
    volume = read_volume(image)
    labels, _ = read_mask(mask, like=volume.geometry)
    objects = [(f"class_{value}", labels == value) for value in np.unique(labels).tolist() if value > 0]
    return _drawn(image.name.split(".")[0], str(image), volume, objects)


def case_from_evaluation(case: EvaluationCase, objects: int = 0) -> ChallengeCase:
    """An evaluation case, with at most ``objects`` of its objects (0: all); boxes are drawn."""
    return _drawn(case.name, case.patient, case.volume, draw_some(case.objects, objects, case.name))


def volume_from(members: Mapping[str, Any], path: Path) -> Volume:
    """The volume of an npz file; its stored frame is the canonical one."""
    image, spacing = np.asarray(members.get("imgs")), np.asarray(members.get("spacing"))
    if image.ndim != 3 or image.dtype.kind not in "biuf" or not image.size:
        raise DataError(f"{path} holds no volume 'imgs' (D, H, W)")
    if spacing.shape != (3,) or spacing.dtype.kind not in "iuf" or not np.isfinite(spacing).all() or spacing.min() <= 0:
        raise DataError(f"{path}: spacing {spacing.tolist()} must be three positive lengths in mm")
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = spacing[0], -spacing[1], -spacing[2], 1.0
    return volume_of(image, affine, path, guess_modality(image))


def boxes_from(members: Mapping[str, Any], shape: tuple[int, ...], path: Path) -> tuple[np.ndarray, ...] | None:
    """Boxes (2, 3) as (z, y, x) of an npz file, None where it has none."""
    if "boxes" not in members:
        return None
    try:
        boxes = [
            [[box[f"{axis}_{end}"] for axis in ("z", "z_mid_y", "z_mid_x")] for end in ("min", "max")]
            for box in members["boxes"]
        ]
        corners = np.array(boxes, dtype=np.int64).reshape(-1, 2, 3)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: 'boxes' must hold z_min ... z_mid_x_max for each class ({error})") from error
    if (corners[:, 0] > corners[:, 1]).any() or (corners < 0).any() or (corners >= np.array(shape)).any():
        raise DataError(f"{path}: a box of {corners.tolist()} is inverted or outside the volume of {shape} voxels")
    return tuple(corners)


def _drawn(name: str, patient: str, volume: Volume, objects: Sequence[tuple[str, np.ndarray]]) -> ChallengeCase:
    """A case of named bool masks (I, J, K) on the stored grid; where they overlap the smaller one is seen."""
    if not 0 < len(objects) <= MAX_CLASSES:
        raise DataError(f"case {name!r} has {len(objects)} objects; the protocol takes 1 to {MAX_CLASSES}")
    transform = CanonicalTransform(volume.geometry)
    masks = [transform.forward_array(mask) for _, mask in objects]
    labels = painted(masks, transform.shape)
    hidden = [objects[n][0] for n in range(len(objects)) if not (labels == n + 1).any()]
    if hidden:
        raise DataError(f"object {hidden[0]!r} of case {name!r} is empty or covered by smaller ones; leave it out")
    boxes = drawn_boxes(labels, len(objects))
    return ChallengeCase(name, patient, volume, labels, tuple(structure for structure, _ in objects), boxes)


def painted(masks: Sequence[np.ndarray | None], shape: tuple[int, int, int]) -> np.ndarray:
    """Label map (Z, Y, X) uint8 of bool masks, value ``n + 1`` for the n-th: the smaller of two lies on top."""
    labels = np.zeros(shape, dtype=np.uint8)
    sizes = [0 if mask is None else int(mask.sum()) for mask in masks]
    for index in sorted(range(len(masks)), key=lambda n: (-sizes[n], n)):
        mask = masks[index]
        if mask is not None:
            labels[mask] = index + 1
    return labels
