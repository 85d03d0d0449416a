"""Controls of the interactive protocol: the same loop with the network removed.

Two of them, deliberately strong: their constants were tuned for the best mean Dice after five clicks, in both
settings, on training data (22 structures of the whole abdomen, then 30 of eight volumes, two of them generated).

* :class:`ShapeControl`: an ellipsoid in the box (a ball at the first click), then painted balls at the clicks;
* :class:`GrowControl`: a region grown from the intensities of the prompt's core, then balls at the clicks that
  themselves keep to the intensities round the click.

A network earns its place only where it beats the better of the two on the same cases.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np

from medvl_sam2.errors import PromptError
from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.region_assist import BrushRule, IntensityRule, box_diagonal, grown_at_click, grown_in_box, stroke
from medvl_sam2.region_grow import ball, ellipsoid
from medvl_sam2.types import Prompt, Volume


@dataclass(frozen=True)
class ShapeRule:
    """Constants of :class:`ShapeControl`. ``power``: of the superellipsoid; ``first_mm``: radius at a first click."""

    power: float = 2.5
    first_mm: float = 22.0
    brush: BrushRule = field(default_factory=BrushRule)


@dataclass(frozen=True)
class Scene:
    """One object's cumulative prompt in the canonical frame: points (N, 3) z, y, x; labels (N,); box (2, 3) or None."""

    image: np.ndarray
    spacing: tuple[float, float, float]
    points: np.ndarray
    labels: np.ndarray
    box: np.ndarray | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Canonical shape (Z, Y, X)."""
        z, y, x = self.image.shape
        return z, y, x

    @property
    def diagonal(self) -> float:
        """Box diagonal in mm, 0 without a box."""
        return box_diagonal(self.box, self.spacing)


@dataclass(frozen=True)
class Opened:
    """A volume opened by a control: the canonical view of its array."""

    image: np.ndarray
    transform: CanonicalTransform


class _Control(ABC):
    """Frame handling common to both controls; subclasses paint in the canonical frame."""

    name = "control"

    def open(self, volume: Volume) -> Opened:
        """Canonical view of a volume; nothing is computed."""
        transform = CanonicalTransform(volume.geometry)
        return Opened(transform.forward_array(volume.array), transform)

    def segment(self, opened: Opened, prompt: Prompt, name: str = "object") -> np.ndarray:
        """Bool mask (I, J, K) on the stored grid for a cumulative prompt of stored voxels; ``name`` changes nothing."""
        transform = opened.transform
        points = transform.forward_points(np.asarray(prompt.points, dtype=np.float64).reshape(-1, 3))
        box = None if prompt.box is None else transform.forward_box(np.asarray(prompt.box, dtype=np.float64))
        labels = np.asarray(prompt.labels, dtype=np.int64).reshape(-1)
        if box is None and not (labels == 1).any():
            raise PromptError("a control needs a box or a foreground click; the prompt has neither")
        return transform.inverse_array(self.paint(Scene(opened.image, transform.spacing, points, labels, box)))

    @abstractmethod
    def paint(self, scene: Scene) -> np.ndarray:
        """Bool mask (Z, Y, X) of a canonical scene."""


class ShapeControl(_Control):
    """Ellipsoid in the box or ball at the first click, then painted balls."""

    name = "shape control"

    def __init__(self, rule: ShapeRule | None = None) -> None:
        self.rule = rule or ShapeRule()

    def paint(self, scene: Scene) -> np.ndarray:
        """Bool (Z, Y, X); see the class."""
        shape = scene.shape
        mask, start = _base(scene, self.rule.first_mm, self.rule.power)
        for point, label in zip(scene.points[start:], scene.labels[start:], strict=True):
            radius = self.rule.brush.radius(mask, point, int(label), np.asarray(scene.spacing), scene.diagonal)
            brush = ball(shape, point, radius, scene.spacing)
            mask = mask | brush if label == 1 else mask & ~brush
        return mask


class GrowControl(_Control):
    """Intensity-grown region in the box or round the first click, then intensity-limited balls."""

    name = "grow control"

    def __init__(self, rule: IntensityRule | None = None) -> None:
        self.rule = rule or IntensityRule()

    def paint(self, scene: Scene) -> np.ndarray:
        """Bool (Z, Y, X); see the class."""
        rule, spacing = self.rule, scene.spacing
        if scene.box is not None:
            mask, start = grown_in_box(scene.image, spacing, scene.box, rule), 0
        else:
            first = int(np.flatnonzero(scene.labels == 1)[0])
            mask, start = grown_at_click(scene.image, spacing, scene.points[first], rule), first + 1
        for point, label in zip(scene.points[start:], scene.labels[start:], strict=True):
            brush = stroke(scene.image, spacing, mask, point, int(label), scene.diagonal, rule)
            mask = mask | brush if label == 1 else mask & ~brush
        return mask


def _base(scene: Scene, first_mm: float, power: float) -> tuple[np.ndarray, int]:
    """First mask and the number of clicks it has used up."""
    shape = scene.shape
    if scene.box is not None:
        return ellipsoid(shape, scene.box, 1.0, power), 0
    first = int(np.flatnonzero(scene.labels == 1)[0])
    return ball(shape, scene.points[first], first_mm, scene.spacing), first + 1
