"""Every source by name, and the one way to turn its folder into records and a report of problems."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medvl_sam2.datasets import (
    amos,
    btcv,
    ct_rate,
    m3d_cap,
    m3d_refseg,
    m3d_seg,
    m3d_vqa,
    medmnist,
    msd,
    totalsegmentator,
)
from medvl_sam2.datasets.manifest import CaseRecord
from medvl_sam2.datasets.source import Finding, Problem, settled
from medvl_sam2.errors import DataError

SOURCES: Mapping[str, Callable[[Path], Iterator[Finding]]] = {
    "amos": amos.read,
    "btcv": btcv.read,
    "ct-rate": ct_rate.read,
    "m3d-cap": m3d_cap.read,
    "m3d-refseg": m3d_refseg.read,
    "m3d-seg": m3d_seg.read,
    "m3d-vqa": m3d_vqa.read,
    "medmnist": medmnist.read,
    "msd": msd.read,
    "totalsegmentator": totalsegmentator.read,
}


@dataclass(frozen=True)
class Collection:
    """What a folder holds: its cases, every patient on one side, and what is wrong with it."""

    records: tuple[CaseRecord, ...]
    problems: tuple[Problem, ...]


def findings(source: str, root: Path) -> Iterator[Finding]:
    """Records and problems of the folder ``root``; :class:`DataError` for an unknown source or a missing folder."""
    if source not in SOURCES:
        raise DataError(f"unknown source {source!r}; known: {', '.join(SOURCES)}")
    if not Path(root).is_dir():
        raise DataError(f"{root} is no folder; give the folder {source} was unpacked into")
    return SOURCES[source](Path(root))


def collected(found: Iterable[Finding], written: Sequence[CaseRecord] = ()) -> Collection:
    """Sort findings into records and problems; a case listed twice is kept once.

    Patients of the ``written`` records of other manifests go to the side they have there.
    """
    records: dict[str, CaseRecord] = {}
    problems: list[Problem] = []
    for finding in found:
        if isinstance(finding, Problem):
            problems.append(finding)
        elif finding.id in records:
            problems.append(Problem(finding.id, "listed twice; the first one is kept", skipped=False))
        else:
            records[finding.id] = finding
    kept, moved = settled(list(records.values()), written)
    return Collection(tuple(kept), (*problems, *moved))
