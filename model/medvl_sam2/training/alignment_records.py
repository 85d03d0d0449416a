"""What the alignment stage reads: a volume, its report in one or more wordings, and sentences about its organs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from medvl_sam2.synthesis.language import spoken_size
from medvl_sam2.training.language_data import ORGANS, LanguageCase
from medvl_sam2.vocabulary import spoken


@dataclass(frozen=True)
class Region:
    """A part of a volume and what is said of it; ``cells`` (d, h, w) weigh any grid over the view, such as a mask."""

    cells: np.ndarray
    sentence: str


@dataclass(frozen=True)
class AlignmentRecord:
    """One volume. ``view`` (D, H, W) in [0, 1], ``extent_mm`` (z, y, x).

    Without ``reports`` (wordings of one report) the volume teaches by reconstruction only.
    """

    view: np.ndarray
    extent_mm: tuple[float, float, float]
    reports: tuple[str, ...] = ()
    regions: tuple[Region, ...] = ()


class GeneratedRecords(Sequence[AlignmentRecord]):
    """Generated cases as records; a case is read when asked for."""

    def __init__(self, cases: Sequence[LanguageCase], told: int | None = None) -> None:
        """``told``: only the first so many keep their report; default all."""
        self._cases, self._told = cases, len(cases) if told is None else told

    def __len__(self) -> int:
        return len(self._cases)

    @overload
    def __getitem__(self, index: int) -> AlignmentRecord: ...

    @overload
    def __getitem__(self, index: slice) -> list[AlignmentRecord]: ...

    def __getitem__(self, index: int | slice) -> AlignmentRecord | list[AlignmentRecord]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return record_of(self._cases[number], number < self._told)


def record_of(case: LanguageCase, told: bool = True) -> AlignmentRecord:
    """A generated case with one region per organ that is in it; not ``told``: without any text."""
    if not told:
        return AlignmentRecord(case.view, case.extent_mm)
    return AlignmentRecord(case.view, case.extent_mm, case.reports, tuple(_regions(case)))


def _regions(case: LanguageCase) -> Iterator[Region]:
    for number, organ in enumerate(ORGANS):
        if case.present(organ):
            lesions = [f for f in case.findings if f.organ == organ]
            said = [f"There is a {spoken_size(f.diameter_mm)} {f.kind} in the {f.location}." for f in lesions]
            yield Region(case.organ_cells[number], " ".join(said) or f"The {spoken(organ)} is normal.")
