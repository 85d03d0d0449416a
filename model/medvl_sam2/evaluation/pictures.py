"""Pictures a person can look at: three planes of a volume with masks, prompts and scores, as PNG.

Radiological display: patient right on the left of the picture, anterior up on axial planes, superior up on the others.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.types import Modality, Prompt, Volume

_CT_WINDOW = (-160.0, 240.0)
_PLANES = (("axial", 0, (1, 2)), ("coronal", 1, (0, 2)), ("sagittal", 2, (0, 1)))
"""Name, canonical axis cut, and the canonical axes drawn down and across."""
_TRUTH_COLOUR = "#39d353"
_MASK_COLOUR = "#ff5d5d"
_COLUMNS = 9
"""Names side by side in the legend."""


def draw(
    path: Path,
    volume: Volume,
    mask: np.ndarray,
    title: str,
    names: Sequence[str] = ("prediction",),
    truth: np.ndarray | None = None,
    prompt: Prompt | None = None,
    text: str = "",
) -> None:
    """Write a PNG of the axial, coronal and sagittal plane through the mask.

    ``mask`` (I, J, K) bool, or label values 1..N named by ``names``; ``truth`` (I, J, K) bool, drawn as a contour;
    ``prompt`` in stored voxels: its points and box. ``text`` is set under the planes (an answer, a report).
    """
    transform = CanonicalTransform(volume.geometry)
    image = transform.forward_array(volume.array)
    labels = transform.forward_array(np.asarray(mask).astype(np.uint8))
    target = None if truth is None else transform.forward_array(truth.astype(bool))
    points = np.zeros((0, 3)) if prompt is None else transform.forward_points(np.asarray(prompt.points).reshape(-1, 3))
    box = None if prompt is None or prompt.box is None else transform.forward_box(np.asarray(prompt.box))
    center = _center(target if target is not None and target.any() else labels > 0)
    window = _window(image, volume.modality)
    figure = Figure(figsize=(15, 5.6 + 0.22 * len(_wrap(text))), dpi=90, facecolor="black")
    FigureCanvasAgg(figure)
    for column, (plane, axis, (down, across)) in enumerate(_PLANES):
        axes = figure.add_subplot(1, 3, column + 1)
        aspect = transform.spacing[down] / transform.spacing[across]
        origin: Literal["lower", "upper"] = "lower" if down == 0 else "upper"
        cut = center[axis]
        axes.imshow(
            np.take(image, cut, axis), cmap="gray", vmin=window[0], vmax=window[1], aspect=aspect, origin=origin
        )
        _draw_masks(axes, np.take(labels, cut, axis), names)
        if target is not None:
            _contour(axes, np.take(target, cut, axis), _TRUTH_COLOUR)
        if prompt is not None:
            _draw_prompt(axes, points, np.asarray(prompt.labels).reshape(-1), box, axis, cut, (down, across))
        axes.set_title(f"{plane}, slice {cut}", color="white", fontsize=10)
        axes.axis("off")
    rows = _legend(figure, labels, names, target is not None)
    figure.suptitle(title, color="white", fontsize=12)
    if text:
        figure.text(0.02, 0.01, "\n".join(_wrap(text)), color="white", fontsize=9, va="bottom")
    figure.subplots_adjust(
        left=0.01, right=0.99, top=0.905 - 0.035 * rows, bottom=0.08 + 0.035 * len(_wrap(text)), wspace=0.03
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="black")


def _center(mask: np.ndarray) -> tuple[int, int, int]:
    """Per axis the cut with most mask; the middle of the volume for an empty mask."""
    if not mask.any():
        return mask.shape[0] // 2, mask.shape[1] // 2, mask.shape[2] // 2
    z, y, x = (int(np.argmax(mask.sum(axis=tuple(a for a in range(3) if a != axis)))) for axis in range(3))
    return z, y, x


def _window(image: np.ndarray, modality: Modality) -> tuple[float, float]:
    if modality is Modality.CT:
        return _CT_WINDOW
    low, high = np.percentile(image, (1, 99))
    return float(low), float(max(high, low + 1e-6))


def _colour(value: int, count: int) -> str | tuple[float, float, float, float]:
    return _MASK_COLOUR if count == 1 else colormaps["tab20"]((value - 1) % 20)


def _draw_masks(axes: Axes, plane: np.ndarray, names: Sequence[str]) -> None:
    for value in range(1, len(names) + 1):
        region = plane == value
        if not region.any():
            continue
        colour = _colour(value, len(names))
        axes.contourf(region.astype(float), levels=[0.5, 1.5], colors=[colour], alpha=0.25)
        _contour(axes, region, colour)


def _contour(axes: Axes, region: np.ndarray, colour: str | tuple[float, float, float, float]) -> None:
    # A plane of one value has no contour and would only draw a warning.
    if region.any() and not region.all():
        axes.contour(region.astype(float), levels=[0.5], colors=[colour], linewidths=1.2)


def _draw_prompt(
    axes: Axes,
    points: np.ndarray,
    labels: np.ndarray,
    box: np.ndarray | None,
    axis: int,
    cut: int,
    drawn: tuple[int, int],
) -> None:
    """Clicks (bright when on this cut, faint when elsewhere) and the box where the cut meets it."""
    down, across = drawn
    for point, label in zip(points, labels, strict=True):
        here = abs(point[axis] - cut) < 1
        axes.plot(
            point[across],
            point[down],
            marker="P" if label == 1 else "X",
            color="#4da3ff" if label == 1 else "#ffb020",
            markeredgecolor="white",
            markersize=9 if here else 6,
            alpha=1.0 if here else 0.35,
            linestyle="none",
        )
    if box is not None and box[0, axis] - 0.5 <= cut <= box[1, axis] + 0.5:
        corner = (box[0, across] - 0.5, box[0, down] - 0.5)
        size = box[1] - box[0] + 1
        axes.add_patch(Rectangle(corner, size[across], size[down], fill=False, edgecolor="#4da3ff", linewidth=1.2))


def _legend(figure: Figure, labels: np.ndarray, names: Sequence[str], with_truth: bool) -> int:
    """Names of the colours above the cuts; returns how many rows they take."""
    present = [value for value in range(1, len(names) + 1) if (labels == value).any()]
    lines = [Line2D([], [], color=_colour(value, len(names)), label=names[value - 1]) for value in present]
    if with_truth:
        lines.append(Line2D([], [], color=_TRUTH_COLOUR, label="truth"))
    if lines:
        figure.legend(
            handles=lines, loc="upper center", bbox_to_anchor=(0.5, 0.955), ncols=_COLUMNS, fontsize=8,
            labelcolor="white", frameon=False,
        )  # fmt: skip
    return math.ceil(len(lines) / _COLUMNS)


def _wrap(text: str, width: int = 190) -> list[str]:
    """Lines of at most ``width`` characters, broken at spaces."""
    return [line for paragraph in text.splitlines() for line in textwrap.wrap(paragraph, width)]
