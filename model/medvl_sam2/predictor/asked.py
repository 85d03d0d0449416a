"""A prompt in the canonical frame, and which state of an object it goes on from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.predictor.edits import CanonicalClick, CanonicalStroke, Edit
from medvl_sam2.predictor.locality import accepted_planes
from medvl_sam2.predictor.objects import CanonicalPlane, ObjectState
from medvl_sam2.types import Prompt


@dataclass(frozen=True, eq=False)
class Asked:
    """All that is asked of one object: ``edits`` are its points, then its strokes; ``box`` (2, 3), ``mask`` (Z, Y, X).

    ``accepted`` are planes that stay as they are, ``propagate`` asks for the whole object to be recomputed.
    """

    edits: tuple[Edit, ...]
    box: np.ndarray | None = None
    mask: np.ndarray | None = None
    text: str | None = None
    accepted: tuple[CanonicalPlane, ...] = ()
    propagate: bool = False

    @classmethod
    def of(cls, prompt: Prompt, transform: CanonicalTransform) -> Asked:
        """Take a validated prompt out of the stored frame."""
        points = transform.forward_points(prompt.points)
        clicks = [
            CanonicalClick((float(p[0]), float(p[1]), float(p[2])), int(label))
            for p, label in zip(points, prompt.labels, strict=True)
        ]
        strokes = [CanonicalStroke.of(stroke, transform) for stroke in prompt.strokes]
        mask = prompt.mask if prompt.mask is not None and prompt.mask.any() else None
        return cls(
            tuple(dict.fromkeys((*clicks, *strokes))),
            None if prompt.box is None else transform.forward_box(prompt.box),
            None if mask is None else np.ascontiguousarray(transform.forward_array(mask)),
            prompt.text,
            tuple(transform.forward_plane(plane.axis, plane.index) for plane in prompt.accepted),
            prompt.propagate,
        )

    @property
    def starts_with_text(self) -> bool:
        """Whether the words say where the object is, as nothing stronger does."""
        return bool(self.text) and self.box is None and self.mask is None

    def latest_within(self, state: ObjectState | None) -> ObjectState | None:
        """The newest state of an object in which all that was applied is still asked for; None where there is none.

        An earlier mask always begins anew.
        """
        if state is None or self.mask is not None:
            return None
        return next((s for s in state.history() if self._continues(s)), None)

    def left(self, state: ObjectState) -> list[Edit]:
        """Edits that ``state`` does not hold yet."""
        done = set(state.clicks)
        return [edit for edit in self.edits if edit not in done]

    def opens(self, edit: Edit, known: ObjectState | None) -> bool:
        """Whether an edit came after its planes were accepted: those of ``known``, the newest state, did not."""
        return known is None or self.mask is not None or edit not in known.clicks

    def accepting(self, state: ObjectState, known: ObjectState | None) -> ObjectState:
        """``state`` with the planes accepted now, which show what they showed in the mask asked from or ``known``."""
        shown: dict[CanonicalPlane, np.ndarray] = {}
        if self.accepted and self.mask is not None:
            shown = accepted_planes(self.accepted, {}, self.mask)
        elif self.accepted and known is not None:
            shown = accepted_planes(self.accepted, known.accepted, known.mask())
        if not shown and not state.accepted:
            return state
        held = replace(state, accepted=shown)
        if held.logits and state.accepted.keys() - shown.keys():
            held.keep(state.mask())  # a plane that is no longer accepted stays as it is until something changes it
        return held

    def _continues(self, state: ObjectState) -> bool:
        """True when everything applied so far is still asked for, so that only additions are left."""
        if (self.box is None) != (state.box is None) or (self.text is not None and self.text != state.text):
            return False
        if self.box is not None and state.box is not None and not np.array_equal(self.box, state.box):
            return False
        return set(state.clicks) <= set(self.edits)
