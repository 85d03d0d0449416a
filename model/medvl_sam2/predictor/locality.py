"""How far a correction may reach: the region of the prompted place, and planes the annotator is done with.

The contract: an edit changes voxels towards its own label only, inside :class:`EditRegion` only, and never on an
accepted plane unless it was placed on that plane itself. Only a full propagation, which the annotator asks for, goes
beyond the region; accepted planes keep even then. Axis order is (z, y, x).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from medvl_sam2.predictor.edits import CanonicalStroke, Edit
from medvl_sam2.predictor.objects import CanonicalPlane, ObjectState
from medvl_sam2.strokes import StrokeKind


@dataclass(frozen=True, eq=False)
class EditRegion:
    """Voxels ``low``..``high`` (3,), both inclusive; of a lasso only the prism over its polygon.

    ``shadow`` bool over the two other axes of ``low``..``high``, and ``normal`` the axis across the lasso's plane.
    """

    low: np.ndarray
    high: np.ndarray
    normal: int | None = None
    shadow: np.ndarray | None = None

    @classmethod
    def around(
        cls, edit: Edit, shape: tuple[int, ...], spacing: tuple[float, float, float], reach_mm: float
    ) -> EditRegion:
        """The box of an edit's voxels and ``reach_mm`` more on every side, inside a volume (Z, Y, X) of ``shape``."""
        last = np.array(shape) - 1
        voxels = np.clip(edit.voxels, 0, last)
        low, high = voxels.min(axis=0), voxels.max(axis=0)
        reach = np.floor(reach_mm / np.asarray(spacing)).astype(int)
        if not isinstance(edit, CanonicalStroke) or edit.kind is not StrokeKind.LASSO:
            return cls(np.maximum(low - reach, 0), np.minimum(high + reach, last))
        solid = np.zeros(high - low + 1, dtype=bool)
        solid[tuple((voxels - low).T)] = True
        normal = edit.normal or 0
        away = np.where(np.arange(3) == normal, reach, 0)
        return cls(np.maximum(low - away, 0), np.minimum(high + away, last), normal, solid.any(axis=normal))

    def on_slice(self, z: int, bounds: tuple[int, int, int, int]) -> np.ndarray:
        """The region on canonical slice ``z``: bool over the rectangle ``bounds`` (y0, y1, x0, x1), ends exclusive."""
        y0, y1, x0, x1 = bounds
        plane = np.zeros((y1 - y0, x1 - x0), dtype=bool)
        if not self.low[0] <= z <= self.high[0]:
            return plane
        (top, left), (bottom, right) = self.low[1:], self.high[1:] + 1
        rows, columns = slice(max(top, y0), min(bottom, y1)), slice(max(left, x0), min(right, x1))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            return plane
        inner = self._section(z)[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        plane[rows.start - y0 : rows.stop - y0, columns.start - x0 : columns.stop - x0] = inner
        return plane

    def inside(self, shape: tuple[int, int, int]) -> np.ndarray:
        """The region as bool (Z, Y, X)."""
        return np.stack([self.on_slice(z, (0, shape[1], 0, shape[2])) for z in range(shape[0])])

    def _section(self, z: int) -> np.ndarray:
        """Bool over the region's own rows and columns on a slice it meets."""
        size = tuple(self.high[1:] - self.low[1:] + 1)
        if self.shadow is None:
            return np.ones(size, dtype=bool)
        if self.normal == 0:
            return self.shadow
        line = self.shadow[z - self.low[0]]
        return np.broadcast_to(line if self.normal == 1 else line[:, None], size)


def restrict(state: ObjectState, reference: ObjectState, region: EditRegion, label: int) -> None:
    """Undo what an edit changed in ``state`` outside of ``region`` or against its ``label``.

    ``reference`` is the state before the edit in the same window. Slices that the edit left alone are not looked at.
    """
    state.paste_changed()
    reference.paste_changed()
    bounds = state.stack.crop.bounds(state.stack.plane)
    for z in range(state.low, state.high + 1):
        pasted = state.pasted[z]
        if reference.pasted.get(z) is pasted:
            continue
        before, after = reference.on_window(z), state.on_window(z)
        allowed = region.on_slice(z, bounds) & (after == bool(label))
        result = np.where(allowed, after, before)
        if z in state.kept or not np.array_equal(result, after):
            state.hold(z, result)


def released(state: ObjectState, planes: Collection[CanonicalPlane]) -> ObjectState:
    """The state with accepted ``planes`` open to change again and the mask as it was.

    Window and range grow to hold what the planes show: where the box was changed since, that may lie beyond both.
    """
    if not planes:
        return state
    mask = state.mask()
    content = np.concatenate([_voxels_on(plane, state.accepted[plane]) for plane in planes])
    free = state.holding(mask, content)
    free = replace(free, accepted={plane: shown for plane, shown in state.accepted.items() if plane not in planes})
    if free.logits:
        free.keep(mask)
    return free


def opened(state: ObjectState, edit: Edit) -> ObjectState:
    """The state with the accepted planes that an edit lies on open to change again, and the mask as it was."""
    voxels = np.clip(edit.voxels, 0, np.array(state.stack.image.shape) - 1)
    return released(state, [plane for plane in state.accepted if (voxels[:, plane[0]] == plane[1]).any()])


def _voxels_on(plane: CanonicalPlane, shown: np.ndarray) -> np.ndarray:
    """Canonical voxels (N, 3) that a plane shows."""
    axis, index = plane
    return np.insert(np.argwhere(shown), axis, index, axis=1)
