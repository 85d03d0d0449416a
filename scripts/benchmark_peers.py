#!/usr/bin/env python
"""Our model beside MONAI DeepEdit, MONAI DynUNet and (on a GPU) SAM2-tiny alone: same cases, minutes, threads.

Example: scripts/benchmark_peers.py --out runs/peers --minutes 15 --real ../shared/data --cases 4 --html FILE

Everything is kept in --out; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from medvl_sam2.errors import ConfigError, MedVLError
from medvl_sam2.evaluation.cases import FIRST_SEED, EvaluationCase, generated_cases, real_cases
from medvl_sam2.evaluation.html_report import About, html_report
from medvl_sam2.evaluation.peers.benchmark import figures, score, text
from medvl_sam2.evaluation.peers.contenders import OWN, SHIPPED, Conditions, contenders
from medvl_sam2.evaluation.peers.view_peers import ViewConfig
from medvl_sam2.evaluation.runner import Plan
from medvl_sam2.files import write_json_atomically
from medvl_sam2.modeling.compute import processor_name
from medvl_sam2.training.run_settings import require_same
from medvl_sam2.training.volume_sources import SourceConfig


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for trainings and scores")
    parser.add_argument("--minutes", type=float, default=15.0, help="training of each contender (default: %(default)s)")
    parser.add_argument("--training-cases", type=int, default=60, metavar="N", help="generated (default: %(default)s)")
    parser.add_argument("--real", type=Path, metavar="DIR", help="folder with real cases: trains on the trainable ones")
    parser.add_argument("--real-copies", type=int, default=4, help="deformed and synthesised copies of each organ map")
    parser.add_argument("--cases", type=int, default=4, metavar="N", help="generated evaluation cases")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED, help="seed of the first evaluation case")
    parser.add_argument("--evaluate-real", action="store_true", help="also score on the unseen real cases of --real")
    parser.add_argument("--objects-per-case", type=int, default=5, help="interactive objects a case (0: all)")
    parser.add_argument("--steps", type=int, default=5, help="clicks an object (default: %(default)s)")
    parser.add_argument("--only", default="", help="keys of contenders, comma separated (default: all)")
    parser.add_argument("--grid", default="64,80,80", help="grid of the MONAI peers (default: %(default)s)")
    parser.add_argument("--filters", default="8,16,32,64,128", help="their filters a level (default: %(default)s)")
    parser.add_argument("--gpu", action="store_true", help="train on the GPU, and SAM2-tiny too")
    parser.add_argument("--sam2", type=Path, metavar="DIR", help="converted slices of SAM 2.1 tiny")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page with the curves and every structure")
    options = parser.parse_args(arguments)
    if options.evaluate_real and options.real is None:
        parser.error("--evaluate-real needs --real DIR")
    return options


def conditions_of(options: argparse.Namespace) -> Conditions:
    """What is equal for all; :class:`ConfigError` for a GPU that is not there."""
    if options.gpu and not torch.cuda.is_available():
        raise ConfigError("--gpu was given, but torch finds no CUDA device; leave it out to train on the processor")
    copies = options.real_copies
    source = SourceConfig(
        generated=options.training_cases, real=options.real, real_copies=copies, label_copies=copies,
        cache=options.out / "cache",
    )  # fmt: skip
    z, y, x = (int(edge) for edge in options.grid.split(","))
    view = ViewConfig((z, y, x), tuple(int(count) for count in options.filters.split(",")))
    device = "cuda" if options.gpu else "cpu"
    return Conditions(
        source, options.minutes, device, view, options.sam2, threads=options.threads, processor=processor_name(device)
    )


def claim(out: Path, conditions: Conditions) -> None:
    """Write down what the trainings in ``out`` have in common.

    Raises :class:`CheckpointError` naming what differs from the conditions that stand there.
    """
    path, own = out / "conditions.json", conditions.shared()
    if path.exists():
        require_same(path, json.loads(path.read_text(encoding="utf-8")), own)
    write_json_atomically(path, own)


def benchmark(options: argparse.Namespace) -> None:
    """Train, score, print the table, write the files asked for."""

    def cases() -> Iterator[EvaluationCase]:
        yield from generated_cases(options.cases, options.first_seed)
        if options.evaluate_real:
            yield from real_cases(options.real)

    conditions = conditions_of(options)
    everyone = contenders(conditions)
    wanted = options.only.split(",") if options.only else [contender.key for contender in everyone]
    unknown = sorted(set(wanted) - {contender.key for contender in everyone})
    if unknown:
        raise MedVLError(f"unknown contender {unknown[0]!r}; known: {', '.join(c.key for c in everyone)}")
    plan = Plan(("interactive", "semantic"), clicks=options.steps, objects_per_case=options.objects_per_case)
    claim(options.out, conditions)
    entries = []
    with tqdm([c for c in everyone if c.key in wanted], unit="contender", desc="peers") as bar:
        for contender in bar:
            entries.append(score(contender, options.out, plan, cases, bar.set_postfix_str))
    numbers = figures(entries, OWN, SHIPPED) | about(options, conditions)
    print(text(numbers))
    if options.json is not None:
        write_json_atomically(options.json, numbers)
    if options.html is not None:
        options.html.parent.mkdir(parents=True, exist_ok=True)
        options.html.write_text(page(numbers), encoding="utf-8")


def about(options: argparse.Namespace, conditions: Conditions) -> dict[str, Any]:
    """Where and how it was measured."""
    machine = f"{platform.machine()}, {torch.get_num_threads()} torch threads, torch {torch.__version__}"
    return {
        "options": {name: str(value) for name, value in vars(options).items()},
        "machine": f"{machine}, trained on {conditions.device} ({conditions.processor}), "
        f"scored on cpu ({processor_name('cpu')}) in float32",
    }


def page(numbers: dict[str, Any]) -> str:
    """The page every evaluation has, with a contender a curve."""
    facts = {fact["title"]: fact["skipped"] or f"{fact['seconds'] / 60:.1f} min, {fact['steps']} steps; {fact['note']}"
             for fact in numbers["contenders"]}  # fmt: skip
    semantic = [
        record | {"split": f"{record['split']}, {record['contender']},"} for record in numbers.get("semantic", [])
    ]
    shown = numbers | ({"semantic": semantic} if semantic else {}) | {"left_out_below_voxel_limit": {}, "skipped": {}}
    return html_report(About("MedVL-SAM2 and its peers", facts, numbers["options"]), shown)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 on success, 2 with a message on a bad input."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    try:
        benchmark(options)
    except MedVLError as error:
        print(f"benchmark_peers: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
