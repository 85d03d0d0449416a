#!/usr/bin/env python
"""Evaluate a checkpoint on generated and unseen real cases, beside controls without a network.

Example: scripts/evaluate.py --generated 8 --text-cases 200 --real ../shared/data --json FILE --html FILE
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from computing import add_model_options, computing, exit_code, load_predictor, said
from tqdm import tqdm

from medvl_sam2.checkpoint import ALIGNMENT_FOLDER, read_meta, shipped_checkpoint
from medvl_sam2.errors import MedVLError
from medvl_sam2.evaluation.cases import FIRST_SEED, MIN_VOXELS, EvaluationCase, generated_cases, real_cases
from medvl_sam2.evaluation.controls import GrowControl, ShapeControl
from medvl_sam2.evaluation.html_report import About, html_report
from medvl_sam2.evaluation.kept_scenes import KeptScenes
from medvl_sam2.evaluation.overview import overview
from medvl_sam2.evaluation.protocol import Setting
from medvl_sam2.evaluation.runner import EXTRA_TASKS, TASKS, TEXT_TASKS, Plan, Runner
from medvl_sam2.evaluation.text_scores import TextScorer, load_bertscore
from medvl_sam2.files import write_json_atomically
from medvl_sam2.training.real_cases import UNSEEN_REAL


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--controls-only", action="store_true", help="no model: only the controls' click curves")
    parser.add_argument("--generated", type=int, default=0, metavar="N", help="number of generated cases")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED, help="seed of the first generated case")
    parser.add_argument(
        "--text-cases",
        type=int,
        default=0,
        metavar="N",
        help=f"further generated cases for {', '.join(TEXT_TASKS)} only",
    )
    parser.add_argument(
        "--retrieval-pool",
        type=int,
        default=0,
        metavar="N",
        help="generated cases that retrieval runs on (usual: 500); those above come first (default: they alone)",
    )
    parser.add_argument(
        "--scenes",
        type=Path,
        metavar="DIR",
        help="keep what is measured of the cases that only retrieval runs on, so that an interrupted run goes on",
    )
    parser.add_argument("--real", type=Path, metavar="DIR", help="folder with the unseen real cases")
    parser.add_argument("--cases", help="names of real cases, comma separated (default: all unseen ones)")
    parser.add_argument(
        "--tasks",
        default=",".join(TASKS),
        help=f"comma separated (default: %(default)s; on request: {', '.join(EXTRA_TASKS)})",
    )
    parser.add_argument("--settings", default="box,clicks", help="interactive settings (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="clicks an object (default: %(default)s)")
    parser.add_argument("--min-voxels", type=int, default=MIN_VOXELS, help="smallest structure (default: %(default)s)")
    parser.add_argument("--objects-per-case", type=int, default=0, help="interactive objects a case (0: all)")
    parser.add_argument("--sentences-per-case", type=int, default=0, help="referring sentences a case (0: all)")
    parser.add_argument("--nsd", action="store_true", help="also normalised surface Dice at 2 mm (slower)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="write PNG overlays")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page with tables and pictures")
    parser.add_argument(
        "--bertscore", type=Path, metavar="DIR", help="local roberta-large for BERTScore (needs the extra [bertscore])"
    )
    options = parser.parse_args(arguments)
    if max(options.generated, options.text_cases, options.retrieval_pool) <= 0 and options.real is None:
        parser.error("nothing to evaluate; give --generated N, --text-cases N, --retrieval-pool N or --real DIR")
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


def plan_of(options: argparse.Namespace) -> Plan:
    """What to run."""
    settings = options.settings.split(",")
    unknown = sorted(set(settings) - {setting.value for setting in Setting})
    if unknown:
        raise MedVLError(f"unknown setting {unknown[0]!r}; known: {', '.join(s.value for s in Setting)}")
    return Plan(
        tasks=tuple(options.tasks.split(",")),
        settings=tuple(Setting(name) for name in settings),
        clicks=options.steps,
        with_nsd=options.nsd,
        objects_per_case=options.objects_per_case,
        sentences_per_case=options.sentences_per_case,
        pictures=options.pictures,
    )


def run(runner: Runner, options: argparse.Namespace, kept: KeptScenes | None = None) -> None:
    """Run all cases, then those of the text tasks and of retrieval, whose seeds follow."""
    cases, total = chosen_cases(options)
    told = options.generated + options.text_cases
    more = max(0, options.retrieval_pool - told) if runner.retrieves else 0
    with tqdm(total=total + options.text_cases + more, unit="case") as bar:
        for case in cases:
            runner.run(case, bar.set_postfix_str)
            bar.update()
        for case in generated_cases(options.text_cases, options.first_seed + options.generated, options.min_voxels):
            runner.run_text(case, bar.set_postfix_str)
            bar.update()
        for seed in range(options.first_seed + told, options.first_seed + told + more):
            if kept is None:
                (case,) = generated_cases(1, seed, options.min_voxels)
                runner.run_retrieval(case)
            else:
                runner.pairs.append(kept.pair(seed))
            bar.update()


def about(options: argparse.Namespace, figures: dict[str, Any]) -> About:
    """Head of the HTML page."""
    real = sorted(case for case in figures["left_out_below_voxel_limit"] if not case.startswith("generated_"))
    facts = {
        "checkpoint": str(figures["checkpoint"] or "none: controls only"),
        "weights": str(figures["weights_sha256"] or "-")[:16],
        "generated cases": str(options.generated),
        "further text cases": str(options.text_cases),
        "retrieval pool": str(max(options.retrieval_pool, options.generated + options.text_cases)),
        "real cases": ", ".join(real) or "none",
        "seconds": f"{figures['seconds']:.0f}",
        "computed on": said(figures["computing"]).removeprefix("computed on "),
    }
    return About(f"MedVL-SAM2 evaluation: {figures['checkpoint'] or 'controls'}", facts, figures["options"])


def evaluate(options: argparse.Namespace) -> None:
    """Run, print the tables, write the files asked for."""
    plan = plan_of(options)
    scorer = TextScorer(None if options.bertscore is None else load_bertscore(options.bertscore))
    predictor = None if options.controls_only else load_predictor(options)
    with tempfile.TemporaryDirectory() as scratch:
        if options.html is not None and plan.pictures is None:
            plan = dataclasses.replace(plan, pictures=Path(scratch))
        runner = Runner(plan, predictor, [ShapeControl(), GrowControl()], scorer)
        started = time.perf_counter()
        kept = None if options.scenes is None or predictor is None else KeptScenes(predictor, options.scenes)
        run(runner, options, kept)
        seconds = time.perf_counter() - started
        figures = runner.figures()
        print(overview(figures))
        print(f"\n{len(runner.left_out)} cases and {options.text_cases} text cases in {seconds:.0f} s")
        figures["computing"] = computing(predictor)
        print(said(figures["computing"]))
        figures["options"] = {name: str(value) for name, value in vars(options).items()}
        figures["checkpoint"] = None if predictor is None else predictor.meta.version
        figures["weights_sha256"] = None if predictor is None else predictor.meta.sha256
        beside = (options.checkpoint or shipped_checkpoint()) / ALIGNMENT_FOLDER
        if "retrieval" in figures:
            figures["image_text_sha256"] = read_meta(beside).sha256
        figures["seconds"] = seconds
        if options.json is not None:
            write_json_atomically(options.json, figures)
        if options.html is not None:
            options.html.parent.mkdir(parents=True, exist_ok=True)
            options.html.write_text(html_report(about(options, figures), figures, runner.pictures), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run the evaluation; 0 on success, 2 with a message on a bad input."""
    return exit_code("evaluate", parse(arguments), evaluate)


if __name__ == "__main__":
    sys.exit(main())
