"""What the alignment stage reads: a volume, its report in one or more wordings, and sentences about its organs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from medvl_sam2.synthesis.language import spoken_size
from medvl_sam2.training.language_data import ORGANS, LanguageCase, seeds_of
from medvl_sam2.training.samples import Target
from medvl_sam2.training.taught_cases import TaughtCase
from medvl_sam2.vocabulary import spoken


@dataclass(frozen=True)
class Region:
    """A part of a volume and what is said of it; ``cells`` (d, h, w) weigh any grid over the view, such as a mask."""

    cells: np.ndarray
    sentence: str


@dataclass(frozen=True)
class AlignmentRecord:
    """One volume. ``view`` (D, H, W) in [0, 1], ``extent_mm`` (z, y, x).

    ``reports`` are wordings of one report; without one the volume teaches by reconstruction, and by its ``regions``.
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

    @property
    def names(self) -> tuple[str, ...]:
        """What each case is, for :class:`CaseFeed`."""
        seeds = enumerate(seeds_of(self._cases))
        return tuple(f"generated {seed}{'' if n < self._told else ', not told'}" for n, seed in seeds)

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


def record_of_taught(case: TaughtCase, grid: tuple[int, int, int]) -> AlignmentRecord:
    """A case of a manifest with one region, on ``grid`` (d, h, w), per structure and per sentence with masks.

    Structures say what they are, not how: nobody has read whether they are normal.
    """
    reports = () if case.report is None else (case.report,)
    volume = case.volume
    if volume is None:
        return AlignmentRecord(case.view, case.extent_mm, reports)
    cells = [_cells(labels, grid) for labels in volume.maps]

    def shown(masks: Sequence[Target]) -> np.ndarray:
        return np.sum([cells[m.map][list(m.values)].sum(axis=0) for m in masks], axis=0).astype(np.float32)

    named = [target for target in volume.targets if target.name in case.names]
    regions = [Region(shown([target]), f"This is the {spoken(target.name)}.") for target in named]
    regions += [Region(shown(item.masks), item.text) for item in case.references]
    return AlignmentRecord(case.view, case.extent_mm, reports, tuple(regions))


def _cells(labels: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """Voxels of every value of a label map (Z, Y, X) whose centres lie in each cell: (values, d, h, w).

    Plane by plane, as a whole-body volume with a hundred structures is too large for one mask after another.
    """
    rows, columns, planes = (
        (2 * np.arange(size) + 1) * count // (2 * size)
        for size, count in zip((*labels.shape[1:], labels.shape[0]), (*grid[1:], grid[0]), strict=True)
    )
    values, area = int(labels.max()) + 1, grid[1] * grid[2]
    places = rows[:, None] * grid[2] + columns
    counts = np.zeros((values, grid[0], area), dtype=np.int64)
    for plane, number in zip(labels, planes, strict=True):
        inside = plane > 0
        found = plane[inside].astype(np.int64) * area + places[inside]
        counts[:, number] += np.bincount(found, minlength=values * area).reshape(values, area)
    return counts.reshape(values, *grid)
