"""Cases as the language phase trains on them: a global view, coarse label cells and texts, cached on disk."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch.nn import functional

from medvl_sam2.config import VisionConfig
from medvl_sam2.errors import DataError
from medvl_sam2.geometry import global_view
from medvl_sam2.intensity import global_channel
from medvl_sam2.synthesis.case import GeneratorConfig, generate_case
from medvl_sam2.synthesis.language import write_texts
from medvl_sam2.synthesis.records import QA, Case, Referring
from medvl_sam2.vocabulary import CLASSES

ORGANS: tuple[str, ...] = tuple(name for name in CLASSES if name != "lesion")
"""Classes of the organ cells, in channel order."""

_VERSION = 3
"""Part of the cache file name; raise it when the generator or the record changes."""


@dataclass(frozen=True)
class FindingRecord:
    """What the texts may say about one lesion."""

    organ: str
    kind: str
    location: str
    diameter_mm: float


@dataclass(frozen=True)
class ReferringRecord:
    """A sentence, the short name of its mask, the class of the target and, for lesions, their finding indices."""

    text: str
    name: str
    target: str
    lesions: tuple[int, ...]


@dataclass(frozen=True)
class LanguageCase:
    """One case on the stem's cell grid (d, h, w) = view / 4.

    ``view`` float16 (D, H, W) in [0, 1]; ``extent_mm`` (z, y, x); ``organ_cells`` uint8 (organs, d, h, w), share of
    the cell in 1/255; ``lesion_cells`` bool (findings, d, h, w), any contact. ``reports``, ``qa`` and ``referring``
    may hold several wordings of the same facts.
    """

    seed: int
    view: np.ndarray
    extent_mm: tuple[float, float, float]
    organ_cells: np.ndarray
    lesion_cells: np.ndarray
    findings: tuple[FindingRecord, ...]
    reports: tuple[str, ...]
    qa: tuple[QA, ...]
    referring: tuple[ReferringRecord, ...]
    phase: str

    def present(self, organ: str) -> bool:
        """True when the organ fills at least half a cell."""
        return bool(self.organ_cells[ORGANS.index(organ)].sum(dtype=np.int64) >= 128)


def prepare_case(case: Case, vision: VisionConfig, wordings: int = 1) -> LanguageCase:
    """Reduce a generated case to what the language phase needs.

    With ``wordings`` above 1 the texts are written that many times: other phrases, choices and asked organs.
    """
    reports, questions, sentences = [case.report], list(case.qa), list(case.referring)
    for number in range(1, wordings):
        rng = np.random.default_rng([case.seed, number])
        report, qa, referring = write_texts(
            rng, case.organs, case.lesions, case.spacing, case.phase, case.region, case.removed, case.findings
        )
        reports.append(report)
        questions.extend(qa)
        sentences.extend(referring)
    grid = vision.grid(0)
    view = global_view(global_channel(case.image, case.modality), vision.input_size)[0]
    organs = torch.from_numpy(case.organs)
    values = [CLASSES.index(name) + 1 for name in ORGANS]
    organ_cells = torch.stack([_share(organs == value, grid) for value in values])
    lesions = torch.from_numpy(case.lesions)
    lesion_cells = [_touch(lesions == finding.value, grid) for finding in case.findings]
    empty = torch.zeros((0, *grid), dtype=torch.bool)
    edges = [float(step * count) for step, count in zip(case.spacing, case.image.shape, strict=True)]
    return LanguageCase(
        seed=case.seed,
        view=view.to(torch.float16).numpy(),
        extent_mm=(edges[0], edges[1], edges[2]),
        organ_cells=(organ_cells * 255).round().to(torch.uint8).numpy(),
        lesion_cells=(torch.stack(lesion_cells) if lesion_cells else empty).numpy(),
        findings=tuple(FindingRecord(f.organ, f.kind, f.location, float(f.diameter_mm)) for f in case.findings),
        reports=tuple(dict.fromkeys(reports)),
        qa=tuple(dict.fromkeys(questions)),
        referring=tuple(dict.fromkeys(_record(item) for item in sentences)),
        phase=case.phase,
    )


class CaseStore(Sequence[LanguageCase]):
    """The cases of ``seeds`` in a folder (about 2.5 MB each): read when asked for, generated when missing."""

    def __init__(
        self,
        seeds: Sequence[int],
        vision: VisionConfig,
        folder: Path,
        wordings: int = 1,
        generator: GeneratorConfig | None = None,
    ):
        if not seeds:
            raise DataError("no seed given; ask for at least one case")
        folder.mkdir(parents=True, exist_ok=True)
        self.seeds = tuple(seeds)
        self._vision = vision
        self._folder = folder
        self._wordings = wordings
        self._generator = generator
        shape = "x".join(str(size) for size in vision.input_size)
        population = "" if generator is None else f"_{zlib.crc32(repr(generator).encode()):08x}"
        self._name = f"language_v{_VERSION}_{shape}_w{wordings}{population}"

    def __len__(self) -> int:
        return len(self.seeds)

    @overload
    def __getitem__(self, index: int) -> LanguageCase: ...

    @overload
    def __getitem__(self, index: slice) -> list[LanguageCase]: ...

    def __getitem__(self, index: int | slice) -> LanguageCase | list[LanguageCase]:
        if isinstance(index, slice):
            return [self._case(seed) for seed in self.seeds[index]]
        return self._case(self.seeds[index])

    def _case(self, seed: int) -> LanguageCase:
        path = self._folder / f"{self._name}_{seed:08d}.npz"
        if not path.exists():
            write_case(prepare_case(generate_case(seed, self._generator), self._vision, self._wordings), path)
        return read_case(path)


class JoinedCases(Sequence[LanguageCase]):
    """Two sequences of cases, one after the other; cases are read when asked for."""

    def __init__(self, first: Sequence[LanguageCase], second: Sequence[LanguageCase]):
        self._first, self._second = first, second

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of all cases, in order."""
        return (*seeds_of(self._first), *seeds_of(self._second))

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    @overload
    def __getitem__(self, index: int) -> LanguageCase: ...

    @overload
    def __getitem__(self, index: slice) -> list[LanguageCase]: ...

    def __getitem__(self, index: int | slice) -> LanguageCase | list[LanguageCase]:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return self._first[number] if number < len(self._first) else self._second[number - len(self._first)]


def seeds_of(cases: Sequence[LanguageCase]) -> tuple[int, ...]:
    """Seeds of ``cases``, in order; those that lie in a folder are not read for it."""
    return cases.seeds if isinstance(cases, CaseStore | JoinedCases) else tuple(case.seed for case in cases)


def write_case(case: LanguageCase, path: Path) -> None:
    """Store a case as npz without pickles (texts as JSON), replacing the file in one step."""
    texts = {
        "extent_mm": case.extent_mm,
        "findings": [asdict(finding) for finding in case.findings],
        "reports": case.reports,
        "qa": [asdict(item) for item in case.qa],
        "referring": [asdict(item) for item in case.referring],
        "phase": case.phase,
        "seed": case.seed,
    }
    partial = path.with_suffix(f".{os.getpid()}.partial.npz")
    np.savez(
        partial,
        view=case.view,
        organ_cells=case.organ_cells,
        lesion_cells=case.lesion_cells,
        texts=np.frombuffer(json.dumps(texts).encode(), dtype=np.uint8),
    )
    partial.replace(path)


def read_case(path: Path) -> LanguageCase:
    """Read :func:`write_case` output."""
    with np.load(path, allow_pickle=False) as data:
        texts = json.loads(data["texts"].tobytes())
        z, y, x = texts["extent_mm"]
        return LanguageCase(
            seed=texts["seed"],
            view=data["view"],
            extent_mm=(z, y, x),
            organ_cells=data["organ_cells"],
            lesion_cells=data["lesion_cells"],
            findings=tuple(FindingRecord(**finding) for finding in texts["findings"]),
            reports=tuple(texts["reports"]),
            qa=tuple(QA(**{**item, "choices": tuple(item["choices"])}) for item in texts["qa"]),
            referring=tuple(
                ReferringRecord(**{**item, "lesions": tuple(item["lesions"])}) for item in texts["referring"]
            ),
            phase=texts["phase"],
        )


def _record(item: Referring) -> ReferringRecord:
    if item.kind == "lesion":
        return ReferringRecord(item.text, item.name, "lesion", tuple(value - 1 for value in item.values))
    return ReferringRecord(item.text, item.name, CLASSES[item.values[0] - 1], ())


def _share(mask: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    return functional.adaptive_avg_pool3d(mask[None, None].float(), grid)[0, 0]


def _touch(mask: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    return functional.adaptive_max_pool3d(mask[None, None].float(), grid)[0, 0] > 0
