"""The structures a text rests on, found after the fact in the map of organs and lesions that the text was made from.

The language model reads tokens measured from the scene's map (:mod:`medvl_sam2.modeling.scene`) and does not say which
of them a word came from. So names are matched with the map's elements once the text stands, by class and exact side;
of several lesions that a sentence may mean, those count whose size agrees with a size that it states, and among them
the scene pointer chooses, as it does for a referring sentence. Every ``why`` says so. What the map does not show gets
no mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.modeling.scene_pointer import SceneElements, lesion_hosts
from medvl_sam2.predictor.mentions import Mention, answer_mentions, mentions, sentences
from medvl_sam2.predictor.places import parts_of
from medvl_sam2.types import Answer, Evidence, Sentence
from medvl_sam2.vocabulary import spoken

NOT_FOUND = "not found in the image map"
LESION = "lesion"
_LEAST_SHARE = 0.1
"""Pieces of an organ smaller than this share of its largest are specks."""
_LEAST_CELLS = 4
"""An organ of fewer cells of the map is not there: half a dozen millimetres at the edge of another."""
_SLICES_AT_ONCE = 32
_SAME_SIZE = 1.4
"""Diameters up to this ratio agree: a text rounds, and the map's borders are coarse."""

Pointer = Callable[[str], torch.Tensor]
"""From words for a lesion to scores (E,) over the scene's elements."""


@dataclass(frozen=True, eq=False)
class EvidenceMap:
    """What the map of one volume shows, by name: organ classes, ``lesion_1`` (largest) onwards, all as ``lesion``.

    ``organs`` are the classes of the map's first channels, ``shape`` the canonical volume's (Z, Y, X).
    """

    elements: SceneElements
    organs: tuple[str, ...]
    transform: CanonicalTransform
    shape: tuple[int, int, int]

    def hosts(self) -> dict[str, str]:
        """The lesions that there are, largest first, each with the organ that most of it lies in."""
        return {
            f"{LESION}_{slot + 1}": self.organs[host]
            for slot, host in enumerate(lesion_hosts(self.elements))
            if host is not None
        }

    def mask(self, name: str) -> np.ndarray | None:
        """Bool (I, J, K) on the stored grid; None where the map shows no such thing or has no such name."""
        if name == LESION:
            masks = [self._canonical(self._element(lesion)) for lesion in self.hosts()]
            found = np.logical_or.reduce(masks) if masks else None
        else:
            place = self._element(name)
            found = None if place is None else self._canonical(place)
        if found is None or not found.any():
            return None
        return np.ascontiguousarray(self.transform.inverse_array(found))

    def evidence(self, name: str, why: str) -> Evidence:
        """A structure with its size and centre, or the note that the map does not show it."""
        mask = self.mask(name)
        if mask is None:
            return Evidence(name, 0, None, f"{why}: {NOT_FOUND}")
        centre = [float((np.arange(n) * mask.sum(axis=_others(axis))).sum()) for axis, n in enumerate(mask.shape)]
        voxels = int(np.count_nonzero(mask))
        return Evidence(name, voxels, (centre[0] / voxels, centre[1] / voxels, centre[2] / voxels), why)

    def _element(self, name: str) -> torch.Tensor | None:
        """Logits (d, h, w) of one element without specks; None when there is none."""
        if name in self.hosts():
            return self.elements.maps[self.elements.organs + int(name.rsplit("_", 1)[1]) - 1]
        if name not in self.organs:
            return None
        parts = parts_of(self.elements.maps[self.organs.index(name)])
        sizes = [int(part.found.sum()) for part in parts]
        if not sizes or sizes[0] < _LEAST_CELLS:
            return None
        kept = [part.place for part, size in zip(parts, sizes, strict=True) if size >= _LEAST_SHARE * sizes[0]]
        return torch.stack(kept).amax(dim=0)

    def _canonical(self, place: torch.Tensor | None) -> np.ndarray:
        """Bool (Z, Y, X): the map interpolated linearly between its cells' centres, where it is positive."""
        found = np.zeros(self.shape, dtype=bool)
        if place is None or not bool((place > 0).any()):
            return found
        cells = np.argwhere((place > 0).cpu().numpy())
        axes = list(zip(self.shape, place.shape, cells.min(axis=0), cells.max(axis=0), strict=True))
        spans = [_span(n, size, int(low), int(high)) for n, size, low, high in axes]
        z, y, x = (_weights(n, size, span) for (n, size, _, _), span in zip(axes, spans, strict=True))
        plane = torch.einsum("dhw,yh,xw->dyx", place.float().cpu(), y, x)
        for first in range(0, len(z), _SLICES_AT_ONCE):
            part = torch.einsum("zd,dyx->zyx", z[first : first + _SLICES_AT_ONCE], plane) > 0
            low = spans[0][0] + first
            found[low : low + len(part), slice(*spans[1]), slice(*spans[2])] = part.numpy()
        return found


def ground_answer(answer: Answer, shown: EvidenceMap, point: Pointer) -> tuple[Sentence, ...]:
    """The answer as one sentence with the structures that it and its question name."""
    return (_Finder(shown, point).sentence(answer.text, answer_mentions(answer.question, answer.text)),)


def ground_report(text: str, shown: EvidenceMap, point: Pointer) -> tuple[Sentence, ...]:
    """A report's sentences, each with the structures it names; no lesion serves two sentences of the findings."""
    finder = _Finder(shown, point)
    result = []
    for sentence in sentences(text):
        summary = sentence.lower().startswith("impression")
        result.append(finder.sentence(sentence, mentions(sentence), summary))
    return tuple(result)


class _Finder:
    """Matches the mentions of one text with the map."""

    def __init__(self, shown: EvidenceMap, point: Pointer) -> None:
        self._map = shown
        self._point = point
        self._hosts = shown.hosts()
        self._used: list[str] = []
        self._measured: dict[str, Evidence] = {}

    def sentence(self, text: str, said: Sequence[Mention], summary: bool = False) -> Sentence:
        """A sentence with its evidence; a ``summary`` speaks once more of the lesions that were found before."""
        found: dict[str, Evidence] = {}
        for mention in said:
            items = self._lesions(mention, summary) if mention.lesion else self._organs(mention)
            found |= {item.name: item for item in items if item.name not in found}
        return Sentence(text, tuple(found.values()))

    def _organs(self, mention: Mention) -> list[Evidence]:
        how = "said to be absent" if mention.absent else "named in the text"
        return [
            self._evidence(name, f"{spoken(name)}, {how}; matched by name once the text was written")
            for name in mention.organs
        ]

    def _lesions(self, mention: Mention, summary: bool) -> list[Evidence]:
        where = f" in the {' or '.join(spoken(name) for name in mention.organs)}" if mention.organs else ""
        able = [lesion for lesion, host in self._hosts.items() if not mention.organs or host in mention.organs]
        again = [lesion for lesion in able if lesion in self._used]
        chosen = again if summary and again else [lesion for lesion in able if summary or lesion not in self._used]
        if not chosen:
            return [Evidence(LESION, 0, None, f"{mention.lesion}: {NOT_FOUND}")]
        if len(chosen) == 1:
            only = "the only lesion left" if len(able) > 1 else "the only lesion"
            why = f"{only} of the image map{where}; matched once the text was written"
        elif mention.several or (summary and again):
            why = f"a lesion of the image map{where}; matched once the text was written"
        else:
            chosen, why = self._meant(mention, chosen, where)
        self._used += chosen
        return [self._evidence(lesion, f"{why} (it lies in the {spoken(self._hosts[lesion])})") for lesion in chosen]

    def _meant(self, mention: Mention, able: list[str], where: str) -> tuple[list[str], str]:
        """The one of several lesions that a mention means, and why: by its size, then by the pointer."""
        size = mention.size_mm
        sized = [lesion for lesion in able if size is not None and self._agrees(lesion, size)]
        if len(sized) == 1:
            return sized, f"of {len(able)} lesions{where} the only one of about {size:g} mm"
        left, scores, first = sized or able, self._point(mention.lesion), self._map.elements.organs - 1
        which = f" of about {size:g} mm" if sized else ""
        why = f"of {len(left)} lesions{which}{where} the one the model points at when asked for {mention.lesion!r}"
        return [max(left, key=lambda lesion: float(scores[first + int(lesion.rsplit("_", 1)[1])]))], why

    def _agrees(self, lesion: str, size_mm: float) -> bool:
        """Whether the sphere of a lesion's volume has about this diameter."""
        volume = self._evidence(lesion, "").voxels * abs(np.linalg.det(self._map.transform.geometry.affine[:3, :3]))
        diameter = (6 * volume / np.pi) ** (1 / 3)
        return bool(size_mm / _SAME_SIZE <= diameter <= size_mm * _SAME_SIZE)

    def _evidence(self, name: str, why: str) -> Evidence:
        if name not in self._measured:
            self._measured[name] = self._map.evidence(name, "")
        known = self._measured[name]
        return Evidence(name, known.voxels, known.centroid, why if known.voxels else f"{why}: {NOT_FOUND}")


def _others(axis: int) -> tuple[int, ...]:
    return tuple(n for n in range(3) if n != axis)


def _span(voxels: int, cells: int, low: int, high: int) -> tuple[int, int]:
    """Voxels (first, end) that cells ``low`` to ``high`` and their neighbours reach."""
    scale = voxels / cells
    return max(0, int((low - 1) * scale)), min(voxels, int(np.ceil((high + 2) * scale)))


def _weights(voxels: int, cells: int, span: tuple[int, int]) -> torch.Tensor:
    """Linear interpolation (n, cells) from cells' centres to the centres of the voxels of ``span``."""
    at = np.clip((np.arange(*span) + 0.5) * cells / voxels - 0.5, 0, cells - 1)
    low = np.minimum(at.astype(int), max(0, cells - 2))
    weights = np.zeros((len(at), cells), dtype=np.float32)
    weights[np.arange(len(at)), low] = 1 - (at - low)
    weights[np.arange(len(at)), np.minimum(low + 1, cells - 1)] += at - low
    return torch.from_numpy(weights)
