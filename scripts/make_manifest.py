#!/usr/bin/env python
"""Make the manifest of a public data set from its own folder, and name every case that is missing or broken.

    scripts/make_manifest.py totalsegmentator DIR --out DIR/manifest.jsonl --check --json report.json

Sources share patients (M3D-Seg holds cases of AMOS, BTCV, MSD and TotalSegmentator). Name the manifests written before
with --against, so that nobody is trained on in one and tested on in another.

    scripts/make_manifest.py store STUDIES --out STUDIES/manifest.jsonl --holdout STORE/holdout.json

takes what annotators submitted to a MONAI Label server (STUDIES its folder of images): labels and corrected texts.

Paths in the manifest start from DIR. Put it there, or give DIR again as the root when it is read.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medvl_sam2.datasets.manifest import CaseRecord, Split, read_manifest, write_manifest
from medvl_sam2.datasets.registry import SOURCES, Collection, collected, findings
from medvl_sam2.datasets.source import Problem
from medvl_sam2.datasets.volumes import read_case
from medvl_sam2.errors import DataError, MedVLError
from medvl_sam2.files import write_json_atomically
from medvl_sam2.training import store_manifest

_SHOWN = 20


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted([*SOURCES, store_manifest.SOURCE])
    parser.add_argument("source", choices=known, metavar="SOURCE", help=", ".join(known))
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder the data set was unpacked into")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="manifest to write (.jsonl)")
    parser.add_argument("--check", action="store_true", help="open every case; one that cannot be read is left out")
    parser.add_argument(
        "--against", type=Path, nargs="+", default=[], metavar="FILE", help="manifests whose patients keep their side"
    )
    parser.add_argument(
        "--holdout", type=Path, metavar="FILE", help="store only: whom finetuning holds out (holdout.json of its store)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write counts and the full list of problems")
    return parser.parse_args(arguments)


def checked(records: Iterable[CaseRecord], root: Path) -> tuple[list[CaseRecord], list[Problem]]:
    """Open every case; those that can be read, and why the others cannot."""
    good, broken = [], []
    for record in tqdm(list(records), desc="check", unit="case"):
        try:
            read_case(record, root)
        except (MedVLError, OSError) as error:
            broken.append(Problem(record.id, str(error)))
        else:
            good.append(record)
    return good, broken


def figures(found: Collection) -> dict[str, Any]:
    """Counts of what is in the manifest, and all problems."""
    records = found.records
    return {
        "cases": len(records),
        "patients": len({record.patient for record in records}),
        "cases_by_split": {split: sum(record.split is split for record in records) for split in Split},
        "cases_by_modality": dict(Counter(record.modality for record in records)),
        "with_labels": sum(bool(record.labels) for record in records),
        "with_report": sum(record.report is not None for record in records),
        "questions": sum(len(record.questions) for record in records),
        "references": sum(len(record.references) for record in records),
        "skipped": sum(problem.skipped for problem in found.problems),
        "problems": [{"case": p.case, "reason": p.reason, "skipped": p.skipped} for p in found.problems],
    }


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The report as text; of many problems only the first are listed."""
    for name, value in report.items():
        if name != "problems":
            yield f"{name.replace('_', ' ')}: {value if not isinstance(value, dict) else pairs(value)}"
    for problem in report["problems"][:_SHOWN]:
        yield f"  {'skipped' if problem['skipped'] else 'note'} {problem['case']}: {problem['reason']}"
    if len(report["problems"]) > _SHOWN:
        yield f"  ... and {len(report['problems']) - _SHOWN} more; --json FILE lists them all"


def pairs(counts: dict[str, int]) -> str:
    """Counts on one line."""
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def main(arguments: list[str] | None = None) -> int:
    """Write the manifest and the report; 0 on success, 2 with a message when there is nothing to write."""
    options = parse(arguments)
    try:
        written = [record for path in options.against for record in read_manifest(path).records]
        if options.source == store_manifest.SOURCE:
            listed = store_manifest.read(options.folder, options.holdout)
        else:
            listed = findings(options.source, options.folder)
        cases = tqdm(listed, desc=options.source, unit="case")
        found = collected(cases, written)
        if options.check:
            good, broken = checked(found.records, options.folder)
            found = Collection(tuple(good), (*found.problems, *broken))
        report = figures(found)
        print("\n".join(lines(report)))
        if options.json is not None:
            write_json_atomically(options.json, {"source": options.source, "checked": options.check, **report})
        if not found.records:
            raise DataError(f"{options.folder} holds no readable case of {options.source}; see the problems above")
        write_manifest(options.out, found.records)
    except (MedVLError, OSError) as error:
        print(f"make_manifest: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.out}; its paths start from {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
