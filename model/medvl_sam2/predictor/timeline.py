"""What was asked of one object, step by step, and how many of the steps stand: undo and redo without limit.

The timeline does not look into prompts: it knows whether two are the same, so every kind can be undone.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from dataclasses import dataclass, field, replace

import numpy as np

from medvl_sam2.predictor.objects import ObjectState
from medvl_sam2.types import Prompt


@dataclass(frozen=True, eq=False)
class Change:
    """One accepted change of an object's timeline, enough to make it again.

    With a ``prompt``: the first ``at`` steps are kept and the prompt comes after them. Without: ``at`` steps stand.
    """

    name: str
    at: int
    prompt: Prompt | None = None


@dataclass(frozen=True, eq=False)
class PackedMask:
    """A prompt's mask as compressed bits: one of 512x512x100 voxels, which has 26 MB, takes some ten kB.

    ``key``: digest by value.
    """

    key: str
    shape: tuple[int, ...]
    content: bytes = field(repr=False)

    @classmethod
    def of(cls, mask: np.ndarray) -> PackedMask:
        """Pack a bool mask."""
        return cls(mask_key(mask), mask.shape, zlib.compress(np.packbits(mask).tobytes(), 1))

    def mask(self) -> np.ndarray:
        """The mask."""
        bits = np.frombuffer(zlib.decompress(self.content), dtype=np.uint8)
        return np.unpackbits(bits, count=math.prod(self.shape)).reshape(self.shape).astype(bool)


@dataclass(eq=False)
class Step:
    """A validated prompt as it was sent, and the state after it.

    ``prompt`` is without its mask, which is packed; ``key`` is the digest of it all. ``state`` is None where the answer
    was ``empty`` (the words found nothing) and where the state was dropped to save memory: computed anew when it is
    needed. ``reply`` is what was said by words that found nothing. ``order`` runs through a session's steps.
    """

    prompt: Prompt
    key: str
    packed: PackedMask | None
    order: int
    state: ObjectState | None = None
    empty: bool = False
    reply: str | None = None

    @classmethod
    def of(cls, prompt: Prompt, order: int) -> Step:
        """A step for a validated prompt, still without its state."""
        packed = None if prompt.mask is None else PackedMask.of(prompt.mask)
        return cls(replace(prompt, mask=None), prompt_key(prompt), packed, order)

    def whole(self) -> Prompt:
        """The prompt as it was sent, with its mask."""
        return self.prompt if self.packed is None else replace(self.prompt, mask=self.packed.mask())

    @property
    def mask_key(self) -> str | None:
        """Digest of the prompt's mask; None without one."""
        return None if self.packed is None else self.packed.key

    @property
    def dropped(self) -> bool:
        """Whether the state has to be computed anew."""
        return self.state is None and not self.empty


@dataclass(eq=False)
class Timeline:
    """``steps[:position]`` stand, those after it were undone and can be redone until another prompt cuts them off."""

    steps: list[Step] = field(default_factory=list)
    position: int = 0

    @property
    def standing(self) -> Step | None:
        """The last step that stands; None at the start."""
        return self.steps[self.position - 1] if self.position else None

    def known(self, count: int) -> ObjectState | None:
        """The state the first ``count`` steps left, which an empty answer does not change; None where there is none."""
        return next((step.state for step in reversed(self.steps[:count]) if not step.empty), None)

    def place_of(self, key: str) -> int | None:
        """How many steps stand once a prompt is placed that is known already; None for a new one.

        The step after the present one is redone; an earlier one is what a client sends that took prompts back.
        """
        if self.position < len(self.steps) and self.steps[self.position].key == key:
            return self.position + 1
        return next((n for n in range(self.position, 0, -1) if self.steps[n - 1].key == key), None)

    def place(self, at: int, step: Step) -> None:
        """Let ``step`` follow the first ``at`` steps; what came after them is gone."""
        alike = next((s for s in self.steps[:at] if self._same_mask(s, step)), None)
        if alike is not None:  # clients send an earlier mask again with every click
            step.packed = alike.packed
        self.steps[at:] = [step]
        self.position = at + 1

    def has_mask(self, step: Step, count: int) -> bool:
        """Whether the mask of ``step`` was sent with one of the first ``count`` ones, too."""
        return any(self._same_mask(other, step) for other in self.steps[:count])

    def missing(self, count: int) -> list[int]:
        """Steps to compute, in order, for the state after the first ``count`` ones."""
        first = count
        while first > 0 and self.steps[first - 1].state is None:
            first -= 1
        return [n for n in range(first, count) if self.steps[n].dropped]

    def drop(self, count: int) -> None:
        """Drop the states of the first ``count`` steps."""
        for step in self.steps[:count]:
            step.state = None

    @staticmethod
    def _same_mask(one: Step, other: Step) -> bool:
        return one.mask_key is not None and one.mask_key == other.mask_key


def prompt_key(prompt: Prompt) -> str:
    """Digest of a validated prompt by value: two with the same key ask for the same."""
    digest = hashlib.sha256()
    for array in (prompt.points, prompt.labels, prompt.box):
        digest.update(repr(None if array is None else (array.shape, array.tolist())).encode())
    digest.update(repr(None if prompt.mask is None else mask_key(prompt.mask)).encode())
    for stroke in prompt.strokes:
        digest.update(repr((stroke.kind.value, stroke.label, stroke.points.shape)).encode() + stroke.points.tobytes())
    digest.update(repr((prompt.text, prompt.accepted, prompt.propagate)).encode())
    return digest.hexdigest()


def mask_key(mask: np.ndarray) -> str:
    """Digest of a bool mask by value."""
    return hashlib.sha256(repr(mask.shape).encode() + np.packbits(mask).tobytes()).hexdigest()
