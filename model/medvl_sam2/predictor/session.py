"""Everything remembered about one volume for one annotator: encodings and the objects being worked on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.intensity import SliceIntensity
from medvl_sam2.predictor.holdings import Tally
from medvl_sam2.predictor.objects import ObjectState
from medvl_sam2.predictor.shared_volume import SharedVolume
from medvl_sam2.predictor.stack import SliceStack
from medvl_sam2.predictor.timeline import Change, Step, Timeline
from medvl_sam2.types import Prompt, Volume


@dataclass(frozen=True)
class SessionConfig:
    """What sessions may hold."""

    history_megabytes: float = 256
    """States to go back and forth to, a session; beyond it the oldest are dropped and computed anew when asked for."""


@dataclass
class Session:
    """Opened by ``Predictor.open``; not thread-safe by itself (the predictor serialises access).

    Caches fill lazily: opening costs nothing, the first use of each path pays for its encoding.
    """

    shared: SharedVolume
    timelines: dict[str, Timeline] = field(default_factory=dict)
    """What was asked of each object, by the name the annotator gave it."""
    whole: SliceStack | None = None
    """Whole slices that text prompts are laid out on."""
    recorder: Callable[[Change], None] | None = None
    """Told of every change of a timeline."""
    _order: int = 0
    _tally: Tally = field(default_factory=Tally)
    """Memory of the states, as far as it was counted: counting all of them anew would cost as much as a click."""

    @property
    def objects(self) -> dict[str, ObjectState]:
        """The standing state of every object that has one in memory, by name."""
        known = {name: timeline.known(timeline.position) for name, timeline in self.timelines.items()}
        return {name: state for name, state in known.items() if state is not None}

    @property
    def prompts(self) -> dict[str, Prompt]:
        """The prompt that stands for every object, by name; may be asked while the session is at work."""
        standing = {name: line.steps[: line.position][-1:] for name, line in list(self.timelines.items())}
        return {name: steps[0].prompt for name, steps in standing.items() if steps}

    def stands(self, name: str) -> bool:
        """Whether prompts of an object stand, so that a further one may correct it; its state need not be in memory."""
        return name in self.timelines and self.timelines[name].position > 0

    def step(self, prompt: Prompt) -> Step:
        """A step for a validated prompt, still without its state."""
        self._order += 1
        return Step.of(prompt, self._order)

    def record(self, change: Change) -> None:
        """Tell the recorder, if there is one."""
        if self.recorder is not None:
            self.recorder(change)

    def restore(self, changes: Sequence[Change]) -> None:
        """Make the timelines anew from what a recorder was told, without computing a state.

        Raises:
            PromptError: a prompt does not fit the volume. ValueError: the changes do not follow one another.
        """
        for change in changes:
            timeline = self.timelines.setdefault(change.name, Timeline())
            if not 0 <= change.at <= len(timeline.steps):
                raise ValueError(f"{change.at} steps of {change.name!r} cannot stand, there are {len(timeline.steps)}")
            if change.prompt is None:
                timeline.position = change.at
            else:
                timeline.place(change.at, self.step(change.prompt.validated(self.volume.geometry.shape)))

    def reset(self) -> None:
        """Forget the objects; what is encoded stays good."""
        self.timelines.clear()
        self._tally.follow(())

    def states(self) -> list[ObjectState]:
        """Every state in memory once, oldest first."""
        steps = [step for timeline in self.timelines.values() for step in timeline.steps if step.state is not None]
        found: dict[int, ObjectState] = {}
        for step in sorted(steps, key=lambda step: step.order):
            newer = []
            for state in step.state.history() if step.state is not None else ():
                if id(state) in found:
                    break
                newer.append(state)
            found |= {id(state): state for state in reversed(newer)}
        return list(found.values())

    def trim(self, budget: int) -> None:
        """Hold at most ``budget`` bytes of states that do not stand: the oldest go."""
        states, tally = self.states(), self._tally
        tally.follow(states)
        if tally.bytes <= budget:
            return
        standing = {id(state) for state in self.objects.values()}
        spare = budget + Tally(state for state in states if id(state) in standing).bytes
        gone: set[int] = set()
        for state in states:
            if tally.bytes > spare and id(state) not in standing:
                tally.remove(state)
                gone.add(id(state))
        for state in states:
            if id(state) not in gone and id(state.before) in gone:
                state.before, state.cut = None, True
        for timeline in self.timelines.values():
            for step in timeline.steps:
                if id(step.state) in gone:
                    step.state = None

    @property
    def volume(self) -> Volume:
        """The image as it is stored."""
        return self.shared.volume

    @property
    def transform(self) -> CanonicalTransform:
        """Stored to canonical voxels and back."""
        return self.shared.transform

    @property
    def image(self) -> np.ndarray:
        """Canonical image (Z, Y, X), contiguous."""
        return self.shared.image

    @property
    def intensity(self) -> SliceIntensity:
        """Grey mapping of the whole volume."""
        return self.shared.intensity

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Canonical spacing (sz, sy, sx) in mm."""
        return self.transform.spacing

    @property
    def bytes(self) -> int:
        """Memory held, what states share counted once: image, states, prompts' masks, the scene.

        Encoded slices are the predictor's, with a budget of their own.
        """
        return self.shared_bytes + self.own_bytes

    @property
    def shared_bytes(self) -> int:
        """The part of :attr:`bytes` that all sessions on the volume share."""
        return self.shared.bytes

    @property
    def own_bytes(self) -> int:
        """The part of :attr:`bytes` that no other session on the volume shares."""
        steps = [step for timeline in self.timelines.values() for step in timeline.steps]
        masks = {id(step.packed): len(step.packed.content) for step in steps if step.packed is not None}
        self._tally.follow(self.states())
        return self._tally.bytes + sum(masks.values())
