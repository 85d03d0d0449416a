"""The objects of a session along their timelines: prompts placed, taken back and placed again.

Not thread-safe: the predictor holds its lock, and runs all of it without gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from medvl_sam2.errors import PromptError
from medvl_sam2.modeling.unified import GlobalLook
from medvl_sam2.predictor.asked import Asked
from medvl_sam2.predictor.interactive import InteractiveEngine
from medvl_sam2.predictor.objects import ObjectState
from medvl_sam2.predictor.session import Session
from medvl_sam2.predictor.timeline import Change, Step, Timeline
from medvl_sam2.types import Prompt, Segmentation


class ObjectEditor:
    """Stateless over sessions: all state lies in their timelines."""

    def __init__(
        self,
        engine: InteractiveEngine,
        look: Callable[[Session], GlobalLook],
        say: Callable[[Session, str], Segmentation],
        history_bytes: int,
    ) -> None:
        """``look`` gives a volume's scene, ``say`` the mask of a text; states beyond ``history_bytes`` are dropped."""
        self.engine, self._look, self._say, self._history = engine, look, say, history_bytes

    def place(self, session: Session, prompt: Prompt, name: str) -> Segmentation:
        """The object after a validated ``prompt``, which holds all that is asked of it."""
        timeline = session.timelines.get(name, Timeline())
        step = session.step(prompt)
        place = timeline.place_of(step.key)
        if place is not None:
            return self._stand(session, name, place)
        at = timeline.position
        self._compute(session, timeline, step, at)
        timeline.place(at, step)
        session.timelines[name] = timeline
        session.record(Change(name, at, prompt))
        return self._shown(session, name)

    def undo(self, session: Session, name: str, count: int) -> Segmentation:
        """The object without its last ``count`` prompts; empty before the first one."""
        timeline = _timeline(session, name, count)
        return self._stand(session, name, max(0, timeline.position - count))

    def redo(self, session: Session, name: str, count: int) -> Segmentation:
        """The object with ``count`` prompts that were undone."""
        timeline = _timeline(session, name, count)
        left = len(timeline.steps) - timeline.position
        if count > left:
            raise PromptError(f"{count} steps of {name!r} cannot be redone, {left} were undone; place a prompt")
        return self._stand(session, name, timeline.position + count)

    def _stand(self, session: Session, name: str, place: int) -> Segmentation:
        timeline = session.timelines[name]
        if place != timeline.position:
            self._rebuild(session, timeline, place)
            timeline.position = place
            session.record(Change(name, place))
        return self._shown(session, name)

    def _shown(self, session: Session, name: str) -> Segmentation:
        """The object as it stands."""
        timeline, geometry = session.timelines[name], session.volume.geometry
        self._rebuild(session, timeline, timeline.position)
        step = timeline.standing
        if step is None or step.state is None:
            mask, score, reply = np.zeros(geometry.shape, dtype=np.uint8), 0.0, None if step is None else step.reply
        else:
            # Left in the order it has in memory: that of files, and turning it round costs as much as a click.
            mask = session.transform.inverse_array(step.state.mask().view(np.uint8))
            score, reply = float(np.clip(step.state.score, 0, 1)), step.reply
        session.trim(self._history)  # now that the state holds what its mask was made from
        return Segmentation(mask, geometry, (name,), {name: score}, reply)

    def _rebuild(self, session: Session, timeline: Timeline, count: int) -> None:
        """Compute dropped states anew, up to what the first ``count`` steps left."""
        for n in timeline.missing(count):
            try:
                self._compute(session, timeline, timeline.steps[n], n)
            except PromptError:  # the weights that answered it found what its words meant, these find nothing
                timeline.steps[n].empty = True

    def _compute(self, session: Session, timeline: Timeline, step: Step, at: int) -> None:
        """Give ``step`` its state (or its empty answer), going on from the first ``at`` steps of ``timeline``."""
        self._rebuild(session, timeline, at)
        known = timeline.known(at)
        asked = Asked.of(step, session.transform, known)
        state = asked.latest_within(known)
        cut = known is not None and any(s.cut for s in known.history())
        if state is None and cut and (asked.mask is None or timeline.has_mask(step, at)):
            timeline.drop(at)  # an earlier state may hold all that is asked: with none dropped it would be found
            self._rebuild(session, timeline, at)
            known = timeline.known(at)
            state = asked.latest_within(known)
        if state is None:
            said = self._say(session, step.prompt.text or "") if asked.starts_with_text else None
            if said is not None and not said.mask.any() and not asked.edits:
                step.reply = said.text
                state = self._accepted_alone(session, asked, known)
                step.empty = state is None
            else:
                state = self._first_state(session, asked, said)
        if state is None:
            return
        state = asked.accepting(state, known)
        for edit in asked.left(state):
            state = self.engine.edit(state, session.spacing, edit, asked.opens(edit, known))
        if known is None and asked.mask is None:
            state = asked.accepting(state, state)  # the first prompt: nothing was shown before its answer
        if asked.propagate and not state.propagated:
            state = self.engine.propagate(state, session.spacing)
        step.state = state

    def _accepted_alone(self, session: Session, asked: Asked, known: ObjectState | None) -> ObjectState | None:
        """What stays of an object whose words find nothing: the accepted planes; None where they show nothing."""
        mask = np.zeros(session.image.shape, dtype=bool)
        for (axis, index), shown in asked.shown(known).items():
            mask[(slice(None),) * axis + (index,)] = shown
        if not mask.any():
            return None
        first = self.engine.first.from_mask(session.image, session.spacing, session.intensity, mask)
        return replace(first, text=asked.text)

    def _first_state(self, session: Session, asked: Asked, said: Segmentation | None) -> ObjectState:
        """State from the strongest prompt; ``said`` is what the words gave.

        Edits are still to be applied, but for a click that was the start.
        """
        args = (session.image, session.spacing, session.intensity)
        first = self.engine.first
        if asked.mask is not None:
            return replace(first.from_mask(*args, asked.mask), source=asked.mask_key)
        if said is not None and said.mask.any():
            found = np.ascontiguousarray(session.transform.forward_array(said.mask > 0))
            return replace(first.from_mask(*args, found), text=asked.text, score=max(said.scores.values()))
        if asked.box is not None:
            return replace(first.from_box(*args, asked.box, self._look(session).elements), text=asked.text)
        edit = next((edit for edit in asked.edits if edit.label == 1), None)
        if edit is None:
            raise PromptError("nothing says where the object is; place a foreground point, a box or a mask")
        return replace(first.from_edit(*args, edit, self._look(session).elements), text=asked.text)


def _timeline(session: Session, name: str, count: int) -> Timeline:
    if count < 1:
        raise PromptError(f"{count} steps cannot be undone or redone; give a whole number from 1 on")
    if name not in session.timelines:
        known = ", ".join(repr(known) for known in session.timelines) or "none yet"
        raise PromptError(f"there is no object {name!r} in this session; its objects: {known}")
    return session.timelines[name]
