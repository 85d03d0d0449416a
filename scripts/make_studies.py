#!/usr/bin/env python3
"""Write generated demo studies as CT NIfTI files, with ground truth beside them when asked.

    python scripts/make_studies.py --count 6 --out studies
    python scripts/make_studies.py --count 6 --out studies --with-labels

Images go to OUT/study_<seed>.nii.gz. Ground truth goes to OUT/truth/, out of the way of a datastore that lists OUT:
study_<seed>_labels.nii.gz (vocabulary values, an organ includes its lesions), study_<seed>_lesions.nii.gz (lesion ids)
and study_<seed>.json (report, findings, questions, referring sentences).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

try:
    from medvl_sam2.synthesis import Case, generate_case
except ModuleNotFoundError:  # run from a checkout without an installed package
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "model"))
    from medvl_sam2.synthesis import Case, generate_case


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write generated demo studies as CT NIfTI files.")
    parser.add_argument("--count", type=int, default=6, help="number of studies (default 6)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; made when missing")
    parser.add_argument("--seed", type=int, default=900_000, help="seed of the first study; study n has seed + n")
    parser.add_argument("--with-labels", action="store_true", help="write ground truth and texts to OUT/truth")
    parser.add_argument("--json", type=Path, help="write a summary of the studies to this file")
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error(f"--count {options.count} must be at least 1")
    if options.seed < 0:
        parser.error(f"--seed {options.seed} must not be negative")
    return options


def save_nifti(path: Path, array: np.ndarray, spacing: tuple[float, float, float]) -> None:
    """Write a canonical (Z, Y, X) array in the usual order of CT files: x to Left, y to Posterior, z to Superior."""
    sz, sy, sx = spacing
    image = nib.Nifti1Image(np.ascontiguousarray(array.transpose(2, 1, 0)), np.diag([-sx, -sy, sz, 1.0]))
    image.header.set_xyzt_units("mm")
    image.set_qform(image.affine, 1)
    image.set_sform(image.affine, 1)
    # A reader that finds the name finds a whole file.
    partial = path.with_name(f".{path.name.removesuffix('.nii.gz')}.partial.nii.gz")
    nib.save(image, partial)
    os.replace(partial, path)


def write_study(case: Case, folder: Path, with_labels: bool) -> Path:
    """Write one study; returns the path of its image."""
    name = f"study_{case.seed:06d}"
    path = folder / f"{name}.nii.gz"
    if with_labels:
        truth = folder / "truth"
        truth.mkdir(exist_ok=True)
        save_nifti(truth / f"{name}_labels.nii.gz", case.organs, case.spacing)
        save_nifti(truth / f"{name}_lesions.nii.gz", case.lesions, case.spacing)
        record = {
            "seed": case.seed,
            "phase": case.phase,
            "region": case.region,
            "removed": case.removed,
            "report": case.report,
            "findings": [dataclasses.asdict(finding) for finding in case.findings],
            "questions": [{"prompt": qa.prompt, "answer": qa.answer, "kind": qa.kind} for qa in case.qa],
            "referring": [dataclasses.asdict(referring) for referring in case.referring],
        }
        (truth / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    save_nifti(path, case.image, case.spacing)
    return path


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    summary = []
    for seed in tqdm(range(options.seed, options.seed + options.count), desc="studies", unit="study"):
        case = generate_case(seed)
        path = write_study(case, options.out, options.with_labels)
        facts = {"shape": case.image.shape, "spacing_mm": case.spacing, "report": case.report}
        summary.append({"file": path.name, **facts})
    if options.json:
        options.json.write_text(json.dumps(summary, indent=1) + "\n")
    print(f"{options.count} studies in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
