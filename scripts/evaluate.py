#!/usr/bin/env python
"""Evaluate a checkpoint on generated and unseen real cases, beside controls without a network.

Example: scripts/evaluate.py --generated 8 --real ../shared/data --tasks interactive,semantic --json figures.json
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from medvl_sam2.errors import MedVLError
from medvl_sam2.evaluation.cases import FIRST_SEED, MIN_VOXELS, EvaluationCase, generated_cases, real_cases
from medvl_sam2.evaluation.controls import GrowControl, ShapeControl
from medvl_sam2.evaluation.protocol import Setting
from medvl_sam2.evaluation.runner import TASKS, Plan, Runner
from medvl_sam2.files import write_json_atomically
from medvl_sam2.predictor import Predictor
from medvl_sam2.training.real_cases import UNSEEN_REAL


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="checkpoint folder (default: the shipped weights)")
    parser.add_argument("--controls-only", action="store_true", help="no model: only the controls' click curves")
    parser.add_argument("--generated", type=int, default=0, metavar="N", help="number of generated cases")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED, help="seed of the first generated case")
    parser.add_argument("--real", type=Path, metavar="DIR", help="folder with the unseen real cases")
    parser.add_argument("--cases", help="names of real cases, comma separated (default: all unseen ones)")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma separated (default: %(default)s)")
    parser.add_argument("--settings", default="box,clicks", help="interactive settings (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="clicks an object (default: %(default)s)")
    parser.add_argument("--min-voxels", type=int, default=MIN_VOXELS, help="smallest structure (default: %(default)s)")
    parser.add_argument("--objects-per-case", type=int, default=0, help="interactive objects a case (0: all)")
    parser.add_argument("--sentences-per-case", type=int, default=0, help="referring sentences a case (0: all)")
    parser.add_argument("--nsd", action="store_true", help="also normalised surface Dice at 2 mm (slower)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (0: torch's own choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="write PNG overlays")
    options = parser.parse_args(arguments)
    if options.generated <= 0 and options.real is None:
        parser.error("nothing to evaluate; give --generated N, --real DIR or both")
    return options


def chosen_cases(options: argparse.Namespace) -> tuple[Iterator[EvaluationCase], int]:
    """Cases one by one (volumes are large) and how many there will be."""
    sources = UNSEEN_REAL
    if options.cases:
        wanted = options.cases.split(",")
        sources = tuple(source for source in UNSEEN_REAL if source.name in wanted)
        missing = sorted(set(wanted) - {source.name for source in sources})
        if missing:
            raise MedVLError(f"unknown case {missing[0]!r}; known: {', '.join(s.name for s in UNSEEN_REAL)}")
    if options.real is not None:
        sources = tuple(source for source in sources if (options.real / source.folder).is_dir())

    def produce() -> Iterator[EvaluationCase]:
        yield from generated_cases(options.generated, options.first_seed, options.min_voxels)
        if options.real is not None:
            yield from real_cases(options.real, sources, options.min_voxels)

    return produce(), options.generated + (len(sources) if options.real is not None else 0)


def main(arguments: list[str] | None = None) -> int:
    """Run the evaluation; 0 on success, 2 with a message on a bad input."""
    options = parse(arguments)
    if options.threads > 0:
        torch.set_num_threads(options.threads)
    try:
        predictor = None if options.controls_only else Predictor.load(options.checkpoint)
        settings = options.settings.split(",")
        unknown = sorted(set(settings) - {setting.value for setting in Setting})
        if unknown:
            raise MedVLError(f"unknown setting {unknown[0]!r}; known: {', '.join(s.value for s in Setting)}")
        plan = Plan(
            tasks=tuple(options.tasks.split(",")),
            settings=tuple(Setting(name) for name in settings),
            clicks=options.steps,
            with_nsd=options.nsd,
            objects_per_case=options.objects_per_case,
            sentences_per_case=options.sentences_per_case,
            pictures=options.pictures,
        )
        runner = Runner(plan, predictor, [ShapeControl(), GrowControl()])
        started = time.perf_counter()
        cases, total = chosen_cases(options)
        with tqdm(total=total, unit="case") as bar:
            for case in cases:
                runner.run(case, bar.set_postfix_str)
                bar.update()
        seconds = time.perf_counter() - started
    except MedVLError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    print(runner.text())
    print(f"\n{total} cases in {seconds:.0f} s")
    if options.json is not None:
        figures = runner.figures()
        figures["options"] = {name: str(value) for name, value in vars(options).items()}
        figures["checkpoint"] = None if predictor is None else predictor.meta.version
        figures["weights_sha256"] = None if predictor is None else predictor.meta.sha256
        figures["seconds"] = seconds
        write_json_atomically(options.json, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
