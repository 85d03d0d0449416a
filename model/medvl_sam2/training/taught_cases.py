"""Cases of a manifest as the stages learn from them: a view, texts, and masks by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch

from medvl_sam2.config import VisionConfig
from medvl_sam2.datasets.label_layers import LabelLayers
from medvl_sam2.datasets.label_names import opposite_side
from medvl_sam2.datasets.manifest import CaseRecord, Question, Reference
from medvl_sam2.datasets.volumes import LoadedCase
from medvl_sam2.errors import DataError
from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.modeling.tokenizer import SEG
from medvl_sam2.modeling.unified import language_view
from medvl_sam2.training.real_cases import vocabulary_class
from medvl_sam2.training.samples import LabelledVolume, Target
from medvl_sam2.types import Modality
from medvl_sam2.vocabulary import CLASSES, merge_class

_PARTS: Mapping[str, int] = MappingProxyType({"lung_left": 2, "lung_right": 3, "heart": 5, "vertebrae": 24})
"""Structures that some sources label in so many parts; with fewer of them the whole is unknown."""
_UNSPOKEN = re.compile(r"region_\d+")
"""Names of masks that only their sentences describe (M3D-RefSeg)."""
_SIDE = re.compile(r"\b(left|right)", re.IGNORECASE)


@dataclass(frozen=True)
class TaughtReference:
    """A sentence, the answer with one ``[SEG]`` for each of ``masks``."""

    text: str
    answer: str
    masks: tuple[Target, ...]


@dataclass(frozen=True, eq=False)
class TaughtCase:
    """One case.

    ``view`` (D, H, W) float16 in [0, 1] and its edges ``extent_mm`` (z, y, x); ``volume`` with its masks, or None where
    no mask has a voxel. ``names``: structures whose presence or absence is known and that may be asked for.
    """

    id: str
    view: np.ndarray
    extent_mm: tuple[float, float, float]
    volume: LabelledVolume | None
    names: tuple[str, ...] = ()
    report: str | None = None
    questions: tuple[Question, ...] = ()
    references: tuple[TaughtReference, ...] = ()


def taught_case(case: LoadedCase, vision: VisionConfig) -> TaughtCase:
    """:func:`reduced_case`; raises :class:`DataError` when no text and no mask is left to learn."""
    taught = reduced_case(case, vision)
    if not (taught.report or taught.questions or taught.names or taught.references or taught.volume):
        raise DataError(f"case {taught.id!r} teaches nothing: no text and no mask is left whose sides are certain")
    return taught


def reduced_case(case: LoadedCase, vision: VisionConfig) -> TaughtCase:
    """Reduce a case to what is learned from it, at least its view.

    Where left and right are not certain, no text and no name with a side is kept.
    """
    record, transform = case.record, CanonicalTransform(case.volume.geometry)
    image = np.ascontiguousarray(transform.forward_array(case.volume.array))
    image = image.astype(np.int16 if case.volume.modality is Modality.CT else np.float32)
    view, extent = language_view(image, transform.spacing, case.volume.modality, vision.input_size)
    z, y, x = (float(edge) for edge in extent[0])

    def certain(*texts: str) -> bool:
        return case.sides_known or not any(map(_SIDE.search, texts))

    names: tuple[str, ...] = ()
    volume, references = None, tuple[TaughtReference, ...]()
    if case.labels is not None:
        masks = _Masks(case.labels, transform)
        for name, members in _named(case.labels.names).items():
            if case.sides_known or all(opposite_side(n) is None for n in (name, *members)):
                masks.add(name, members)
                names += (name,)
        found = [masks.reference(item) for item in record.references if certain(item.text, item.answer)]
        references = tuple(item for item in found if item is not None)
        if masks.targets:
            volume = masks.volume(image, transform.spacing, case.volume.modality, frozenset(names), record.patient)
    return TaughtCase(
        id=record.id,
        view=view[0, 0].to(torch.float16).numpy(),
        extent_mm=(z, y, x),
        volume=volume,
        names=tuple(name for name in names if not _UNSPOKEN.fullmatch(name)),
        report=record.report if record.report and certain(record.report) else None,
        questions=tuple(q for q in record.questions if certain(q.text, q.answer, *q.choices)),
        references=references,
    )


def _named(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The labels by name, and vocabulary classes that are labelled in parts, whole ones only."""
    named: dict[str, tuple[str, ...]] = {name: (name,) for name in names}
    merged = Counter(merge_class(name) for name in names if merge_class(name) != name)
    for whole, parts in _PARTS.items():
        if whole in CLASSES and whole not in named and merged[whole] >= parts:
            named[whole] = tuple(name for name in names if merge_class(name) == whole)
    return named


class _Masks:
    """Label layers in canonical order, as the maps and targets of a :class:`LabelledVolume`."""

    def __init__(self, labels: LabelLayers, transform: CanonicalTransform) -> None:
        self._names = labels.names
        self._maps = [np.ascontiguousarray(transform.forward_array(layer)) for layer in labels.maps]
        self._values = [frozenset(np.unique(layer).tolist()) for layer in self._maps]
        self.targets: dict[str, Target] = {}

    def add(self, name: str, members: Sequence[str]) -> Target | None:
        """The target that is all ``members``; None where none of them has a voxel."""
        if name in self.targets:
            return self.targets[name]
        wanted = {self._names.index(member) + 1 for member in members}
        layers = [number for number, values in enumerate(self._values) if values & wanted]
        if not layers:
            return None
        if len(layers) == 1:
            target = Target(name, layers[0], tuple(sorted(self._values[layers[0]] & wanted)))
        else:
            united = np.any([np.isin(self._maps[n], list(wanted)) for n in layers], axis=0)
            self._maps.append(united.astype(np.uint8))
            self._values.append(frozenset())  # no label of its own
            target = Target(name, len(self._maps) - 1, (1,))
        self.targets[name] = target
        return target

    def reference(self, item: Reference) -> TaughtReference | None:
        """A sentence with its masks: one for every ``[SEG]``, or one of all its targets together."""
        count = item.answer.count(SEG)
        answer = item.answer if count else f"{item.answer} {SEG}".strip()
        groups = [(name,) for name in item.targets] if count == len(item.targets) else [item.targets]
        if count > len(groups):
            return None
        masks = [self._united(group) for group in groups]
        return TaughtReference(item.text, answer, tuple(m for m in masks if m)) if all(masks) else None

    def _united(self, group: Sequence[str]) -> Target | None:
        """The target that is a group of labels together."""
        target = self.add(" and ".join(group), group)
        if target is not None and len(group) > 1:
            target = self.targets[target.name] = replace(target, members=tuple(vocabulary_class(n) or n for n in group))
        return target

    def volume(
        self,
        image: np.ndarray,
        spacing: tuple[float, float, float],
        modality: Modality,
        known: frozenset[str],
        patient: str,
    ) -> LabelledVolume:
        targets = tuple(self.targets.values())
        return LabelledVolume(image, spacing, modality, tuple(self._maps), targets, known, patient)


def record_offers(record: CaseRecord) -> frozenset[str]:
    """Kinds of task that a record may give: report, vqa, semantic, referring, interactive."""
    named = any(not _UNSPOKEN.fullmatch(name) for name in record.label_names)
    offers = {
        "report": bool(record.report),
        "vqa": bool(record.questions),
        "semantic": named,
        "referring": bool(record.references),
        "interactive": bool(record.labels),
    }
    return frozenset(kind for kind, there in offers.items() if there)
