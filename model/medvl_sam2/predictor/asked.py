"""A prompt in the canonical frame, and which state of an object it goes on from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.predictor.edits import CanonicalClick, CanonicalStroke, Edit
from medvl_sam2.predictor.locality import released
from medvl_sam2.predictor.objects import CanonicalPlane, ObjectState
from medvl_sam2.predictor.planes import thin_axis
from medvl_sam2.predictor.timeline import Step


@dataclass(frozen=True, eq=False)
class Asked:
    """All that is asked of one object: ``edits`` in the order they were placed; ``box`` (2, 3), ``mask`` (Z, Y, X).

    The box is as it was drawn and may reach beyond the volume. ``mask_key`` is the digest of the mask, ``accepted`` are
    planes that stay as they are, ``propagate`` asks for the whole object to be recomputed.
    """

    edits: tuple[Edit, ...]
    box: np.ndarray | None = None
    mask: np.ndarray | None = None
    mask_key: str | None = None
    text: str | None = None
    accepted: tuple[CanonicalPlane, ...] = ()
    propagate: bool = False

    @classmethod
    def of(cls, step: Step, transform: CanonicalTransform, known: ObjectState | None) -> Asked:
        """Take a step's validated prompt out of the stored frame.

        A request lists all that stands and not when it was placed: what ``known``, the newest state, holds came before
        the rest, in the order in which it was applied there. Of the rest, points come before strokes.
        """
        prompt = step.whole()
        points = transform.forward_points(prompt.points)
        clicks = [
            CanonicalClick((float(p[0]), float(p[1]), float(p[2])), int(label))
            for p, label in zip(points, prompt.labels, strict=True)
        ]
        strokes = [CanonicalStroke.of(stroke, transform) for stroke in prompt.strokes]
        mask = prompt.mask if prompt.mask is not None and prompt.mask.any() else None
        edits: tuple[Edit, ...] = (*clicks, *strokes)
        wanted = set(edits)
        before = [edit for edit in known.clicks if edit in wanted] if known is not None else []
        return cls(
            tuple(dict.fromkeys((*before, *edits))),
            None if prompt.box is None else transform.forward_box(prompt.box),
            None if mask is None else np.ascontiguousarray(transform.forward_array(mask)),
            None if mask is None else step.mask_key,
            prompt.text,
            tuple(transform.forward_plane(plane.axis, plane.index) for plane in prompt.accepted),
            prompt.propagate,
        )

    @property
    def starts_with_text(self) -> bool:
        """Whether the words say where the object is, as nothing stronger does."""
        return bool(self.text) and self.box is None and self.mask is None

    def latest_within(self, state: ObjectState | None) -> ObjectState | None:
        """The newest state of an object in which all that was applied is still asked for; None where there is none."""
        history = () if state is None else state.history()
        return next((s for s in history if self._continues(s)), None)

    def left(self, state: ObjectState) -> list[Edit]:
        """Edits that ``state`` does not hold yet."""
        done = set(state.clicks)
        return [edit for edit in self.edits if edit not in done]

    def opens(self, edit: Edit, known: ObjectState | None) -> bool:
        """Whether an edit came after its planes were accepted: those of ``known``, the newest state, did not."""
        return known is None or edit not in known.clicks

    def shown(self, known: ObjectState | None) -> dict[CanonicalPlane, np.ndarray]:
        """What the planes accepted now show: as in ``known``, or in a mask that it did not start from."""
        if self.mask is not None and (known is None or known.source != self.mask_key):
            return {(axis, index): self.mask.take(index, axis=axis) for axis, index in self.accepted}
        if known is None:
            return {}
        mask = known.mask() if set(self.accepted) - known.accepted.keys() else None
        return {
            plane: known.accepted[plane] if mask is None or plane in known.accepted else mask.take(plane[1], plane[0])
            for plane in self.accepted
        }

    def accepting(self, state: ObjectState, known: ObjectState | None) -> ObjectState:
        """``state`` with the planes accepted now (:meth:`shown`)."""
        shown = self.shown(known)
        if not shown and not state.accepted:
            return state
        return replace(released(state, state.accepted.keys() - shown.keys()), accepted=shown)

    def _continues(self, state: ObjectState) -> bool:
        """True when everything applied so far is still asked for, so that only additions are left."""
        if self.mask is not None and self.mask_key != state.source:
            return False
        if (self.box is None) != (state.box is None) or (self.text is not None and self.text != state.text):
            return False
        if self.box is not None and state.box is not None:
            shape = state.stack.image.shape
            inside = np.clip(self.box, 0, np.array(shape) - 1)
            if thin_axis(self.box, shape) != state.across or not np.array_equal(inside, state.box):
                return False
        return set(state.clicks) <= set(self.edits)
