"""A predictor without a model: every answer follows from the request, so tests know it beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medvl_sam2.checkpoint import CheckpointMeta
from medvl_sam2.errors import PromptError
from medvl_sam2.types import Answer, Evidence, Prompt, Segmentation, Sentence, Volume
from medvl_sam2.vocabulary import CLASSES, spoken

NOTICE = "Trained on generated volumes."


@dataclass
class FakeSession:
    volume: Volume
    objects: dict[str, Any] = field(default_factory=dict)
    recorder: Any = None

    @property
    def shared_bytes(self) -> int:
        return self.volume.array.nbytes

    @property
    def own_bytes(self) -> int:
        return 0

    @property
    def prompts(self) -> dict[str, Prompt]:
        return dict(self.objects)

    def stands(self, name: str) -> bool:
        return name in self.objects

    def reset(self) -> None:
        self.objects.clear()

    def restore(self, changes: Sequence[Any]) -> None:
        assert not changes  # the fake records nothing


class FakePredictor:
    """Marks exactly the voxels a prompt names; a class is the slice ``k = value - 1`` of the stored grid."""

    device = "cpu"
    precision = "float32"

    def __init__(self, version: str = "shipped-1") -> None:
        self.meta = CheckpointMeta("fake", version, NOTICE)
        self.opened: list[Path | None] = []
        self.prompts: list[tuple[str, Prompt]] = []
        self.moves: list[tuple[str, int]] = []
        self.prepared: list[Path | None] = []
        self.broken = False

    @classmethod
    def load(cls, path: Path | None, **_: str) -> FakePredictor:
        return cls(path.name if path else "shipped-1")

    def close(self) -> None:
        self.opened.clear()

    def prepare(self, session: FakeSession) -> Iterator[None]:
        self.prepared.append(session.volume.source)
        yield

    def open(self, volume: Volume) -> FakeSession:
        self.opened.append(volume.source)
        return FakeSession(volume)

    def segment_prompt(self, session: FakeSession, prompt: Prompt, name: str = "object") -> Segmentation:
        if self.broken:
            raise RuntimeError("the fake is broken")
        prompt = prompt.validated(session.volume.geometry.shape)
        self.prompts.append((name, prompt))
        session.objects[name] = prompt
        if prompt.text and prompt.names_only:
            return self.segment_text(session, prompt.text)
        mask = self._empty(session)
        if prompt.mask is not None:
            mask[prompt.mask] = 1
        if prompt.box is not None:
            low, high = prompt.box.clip(0, np.array(mask.shape) - 1).astype(int)
            mask[low[0] : high[0] + 1, low[1] : high[1] + 1, low[2] : high[2] + 1] = 1
        for point, label in zip(prompt.points.astype(int), prompt.labels, strict=True):
            mask[tuple(point)] = label
        for stroke in prompt.strokes:
            mask[tuple(stroke.points.astype(int).T)] = stroke.label
        return Segmentation(mask, session.volume.geometry, (name,), {name: 0.5})

    def undo(self, session: FakeSession, name: str = "object", count: int = 1) -> Segmentation:
        """An empty mask: the fake forgets the object."""
        if name not in session.objects:
            raise PromptError(f"there is no object {name!r} in this session")
        del session.objects[name]
        self.moves.append((name, -count))
        return Segmentation(self._empty(session), session.volume.geometry, (name,), {name: 0.0})

    def redo(self, session: FakeSession, name: str = "object", count: int = 1) -> Segmentation:
        raise PromptError(f"{count} steps of {name!r} cannot be redone, 0 were undone")

    def segment_classes(self, session: FakeSession, classes: Sequence[str], progress: Any = None) -> Segmentation:
        mask = self._empty(session)
        for value, name in enumerate(classes, start=1):
            k = CLASSES.index(name)
            if k < mask.shape[2]:
                mask[..., k] = value
        return Segmentation(mask, session.volume.geometry, tuple(classes), dict.fromkeys(classes, 0.5))

    def segment_text(self, session: FakeSession, text: str) -> Segmentation:
        mask = self._empty(session)
        mask[0, 0, 0] = 1
        known = [name for name in CLASSES if spoken(name) == text.lower()]
        name = known[0] if known else text.lower().removeprefix("the ")
        return Segmentation(mask, session.volume.geometry, (name,), {name: 0.5}, f"It is {name}.")

    def answer(self, session: FakeSession, question: str) -> Answer:
        said = f"No, to {question!r}."
        return Answer(question, said, NOTICE, (Sentence(said, self._evidence(session)),))

    def report(self, session: FakeSession) -> Answer:
        sentences = (Sentence("Liver: normal.", self._evidence(session)), Sentence("Spleen: normal.", ()))
        return Answer("Write a report.", "Liver: normal. Spleen: normal.", NOTICE, sentences)

    def evidence_mask(self, session: FakeSession, name: str) -> np.ndarray:
        """The liver alone: two voxels."""
        if name != "liver":
            raise PromptError(f"{name!r} is not found in the image map")
        mask = self._empty(session).astype(bool)
        mask[1, 2, 3:5] = True
        return mask

    def _evidence(self, session: FakeSession) -> tuple[Evidence, ...]:
        lost = Evidence("spleen", 0, None, "spleen: not found in the image map")
        return Evidence("liver", 2, (1.0, 2.0, 3.5), "liver, named in the text"), lost

    def uncertainty(self, session: FakeSession) -> float:
        """The image's mean over 1000: the phantom's maker chooses it."""
        return float(session.volume.array.mean()) / 1000

    @staticmethod
    def _empty(session: FakeSession) -> np.ndarray:
        return np.zeros(session.volume.geometry.shape, np.uint8)
