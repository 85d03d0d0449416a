#!/usr/bin/env python
"""Evaluate clicks by the CVPR 2025 interactive 3D segmentation protocol, beside controls without a network.

Cases come from the challenge's npz files, from an image and its mask, from the unseen real cases, or are generated.
With --json a run that is stopped goes on where it was: a case that is done is not run again. It is read again, and
refused where the file's figures are of another volume, other labels or boxes, or of other settings.

Examples:
  scripts/evaluate_interactive.py --npz DIR --gts DIR --json FILE
  scripts/evaluate_interactive.py --image ct.nii.gz --mask labels.nrrd
  scripts/evaluate_interactive.py --real ../shared/data --json FILE
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from computing import add_model_options, computing, exit_code, load_predictor, said
from tqdm import tqdm

from medvl_sam2.errors import MedVLError
from medvl_sam2.evaluation.cases import FIRST_SEED, MIN_VOXELS, from_generated, from_real
from medvl_sam2.evaluation.challenge.case import ChallengeCase, case_from_evaluation, case_from_files, case_from_npz
from medvl_sam2.evaluation.challenge.loop import run_case
from medvl_sam2.evaluation.challenge.results import Results, margin, row, text
from medvl_sam2.evaluation.controls import GrowControl, ShapeControl
from medvl_sam2.evaluation.metrics import CLICKS_IN_AUC
from medvl_sam2.evaluation.protocol import Interactive, PredictorEngine
from medvl_sam2.synthesis.case import generate_case
from medvl_sam2.training.real_cases import UNSEEN_REAL, RealSource, load_case
from medvl_sam2.training.run_settings import plain_settings

Load = Callable[[], ChallengeCase]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npz", type=Path, metavar="DIR", help="folder with npz files of the challenge")
    parser.add_argument("--gts", type=Path, metavar="DIR", help="their truths, where 'gts' does not lie in them")
    parser.add_argument("--image", type=Path, help="an image: NIfTI, NRRD or DICOM")
    parser.add_argument("--mask", type=Path, help="its label map, 0 for background")
    parser.add_argument("--real", type=Path, metavar="DIR", help="folder with the unseen real cases")
    parser.add_argument("--generated", type=int, default=0, metavar="N", help="number of generated cases")
    parser.add_argument("--cases", help="names of cases, comma separated (default: all)")
    parser.add_argument("--objects-per-case", type=int, default=0, help="of real and generated cases (0: all)")
    parser.add_argument("--min-voxels", type=int, default=MIN_VOXELS, help="smallest object of those")
    parser.add_argument("--no-box", action="store_true", help="start with a click, also where there is a box")
    parser.add_argument("--clicks", type=int, default=CLICKS_IN_AUC, help="clicks a class (default: %(default)s)")
    parser.add_argument("--human", type=int, metavar="SEED", help="draw clicks inside the error, as people place them")
    add_model_options(parser)
    parser.add_argument("--controls-only", action="store_true", help="no model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, and go on from there")
    options = parser.parse_args(arguments)
    if (options.image is None) != (options.mask is None):
        parser.error("an image needs its mask; give --image and --mask together")
    if options.gts is not None and options.npz is None:
        parser.error("--gts holds truths of --npz files; give --npz too")
    if options.generated <= 0 and not (options.npz or options.image or options.real):
        parser.error("nothing to evaluate; give --npz DIR, --image FILE --mask FILE, --real DIR or --generated N")
    return options


def sources(options: argparse.Namespace) -> dict[str, Load]:
    """How to load each case that the options give, by name: volumes are large, one is held at a time."""
    found: list[tuple[str, Load]] = []
    if options.npz is not None:
        for path in sorted(options.npz.glob("*.npz")):
            found.append((path.stem, partial(case_from_npz, path, options.gts and options.gts / path.name)))
    if options.image is not None:
        found.append((options.image.name.split(".")[0], partial(case_from_files, options.image, options.mask)))
    if options.real is not None:
        for source in UNSEEN_REAL:
            if (options.real / source.folder).is_dir():
                found.append((source.name, partial(real_case, options, source)))
    for seed in range(FIRST_SEED, FIRST_SEED + options.generated):
        found.append((f"generated_{seed}", partial(generated_case, options, seed)))
    names = [name for name, _ in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise MedVLError(f"two cases are called {twice[0]!r}; rename one of the files")
    return dict(found)


def chosen(options: argparse.Namespace, known: dict[str, Load], results: Results) -> dict[str, Load]:
    """The cases to run, when those that are done are known and unchanged; nothing was run or written before."""
    wanted = list(known) if not options.cases else options.cases.split(",")
    unknown = sorted(set(wanted) - set(known))
    if unknown or not wanted:
        raise MedVLError(f"unknown case {unknown[:1]}; known: {', '.join(known) or 'none'}")
    strange = sorted(results.cases() - set(known))
    if strange:
        raise MedVLError(f"{options.json} holds case {strange[0]!r}, which this run has not; name another file")
    for name in tqdm(sorted(results.cases()), desc="comparing cases that are done", unit="case"):
        results.require_case(loaded(options, known[name]))
    return {name: load for name, load in known.items() if name in wanted}


def loaded(options: argparse.Namespace, load: Load) -> ChallengeCase:
    """A case as it is run."""
    case = load()
    return case.without_boxes() if options.no_box else case


def real_case(options: argparse.Namespace, source: RealSource) -> ChallengeCase:
    case = from_real(load_case(options.real, source), options.min_voxels)
    return case_from_evaluation(case, options.objects_per_case)


def generated_case(options: argparse.Namespace, seed: int) -> ChallengeCase:
    case = from_generated(generate_case(seed, None), options.min_voxels)
    return case_from_evaluation(case, options.objects_per_case)


def run(options: argparse.Namespace, engines: list[Interactive], results: Results) -> None:
    """Every case with every engine, but for those that are done."""
    loads = chosen(options, sources(options), results)
    with tqdm(total=len(loads) * len(engines), unit="run") as bar:
        for name, load in loads.items():
            waiting = [engine for engine in engines if not results.has(name, engine.name)]
            bar.update(len(engines) - len(waiting))
            if not waiting:
                continue
            try:
                case = loaded(options, load)
            except MedVLError as error:
                results.fail(name, "not read", error)
                bar.update(len(waiting))
                continue
            for engine in waiting:
                bar.set_postfix_str(f"{name}: {engine.name}")
                try:
                    results.add(row(case, engine.name, run_case(engine, case, options.clicks, options.human)))
                except (MedVLError, RuntimeError, MemoryError) as error:
                    results.fail(name, engine.name, error)
                bar.update()


def evaluate(options: argparse.Namespace) -> int:
    """Run, print the table, and return the number of failures."""
    controls: list[Interactive] = [ShapeControl(), GrowControl()]
    predictor = None if options.controls_only else load_predictor(options)
    engines = controls if predictor is None else [PredictorEngine(predictor), *controls]
    settings = {
        name: getattr(options, name) for name in ("clicks", "human", "no_box", "objects_per_case", "min_voxels")
    }
    if predictor is not None:
        settings |= {"weights_sha256": predictor.meta.sha256, "device": predictor.device}
        settings["precision"] = predictor.precision
        engine = plain_settings(predictor.interactive.config)
        settings |= {f"interactive.{name}": value for name, value in engine.items()}
    results = Results(options.json, settings)
    run(options, engines, results)
    results.save()
    if results.rows:
        print(text(results.summary()))
    for setting in ("box", "clicks"):
        found = margin(results.rows, setting, "model", [control.name for control in controls])
        for figure in ("dsc_final", "dsc_auc") if found else ():
            value = found[figure]
            print(
                f"{setting}: model minus {found['best_control']}, {figure}: "
                f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"
            )
    for what, reason in results.failed.items():
        print(f"failed, not scored: {what}: {reason}", file=sys.stderr)
    print(said(computing(predictor)))
    print(f"{len(results.rows)} runs scored, {len(results.failed)} failed")
    return len(results.failed)


def main(arguments: list[str] | None = None) -> int:
    """Run the evaluation; 0 on success, 1 where a case failed, 2 with a message on a bad input."""
    return exit_code("evaluate_interactive", parse(arguments), evaluate)


if __name__ == "__main__":
    sys.exit(main())
