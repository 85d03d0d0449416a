#!/usr/bin/env python
"""Finetune from corrected labels, exactly as the server does, and publish if the result is better.

FOLDER is a studies folder of MONAI Label, or holds volumes with labels/<same name> and labels/labels.json (names by
mask value). STORE holds published versions, the fixed hold-out and the runs; the server's is apps/medvl_sam2/model.
Settings come from a YAML file (training/stages/finetune.yaml explains them); what is given here wins over it.

Example: scripts/finetune.py studies/demo --store apps/medvl_sam2/model --minutes 10 --json result.json

Under torchrun all processes train together, and torchrun calls every exit status but 0 a failure.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from medvl_sam2.errors import MedVLError
from medvl_sam2.files import write_json_atomically
from medvl_sam2.training.finetune import run_finetune
from medvl_sam2.training.finetune_records import FinetuneConfig, FinetuneProgress
from medvl_sam2.training.finetune_samples import samples_from_folder
from medvl_sam2.training.finetune_stage import default_backend
from medvl_sam2.training.ranks import Ranks
from medvl_sam2.training.stage_config import read_stage_config


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line options; every field of :class:`FinetuneConfig` that a person may want to set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="volumes with corrected labels")
    parser.add_argument("--store", type=Path, required=True, help="folder of published versions and runs")
    parser.add_argument("--base", type=Path, help="checkpoint to start from (default: the served one)")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML file of settings (default: the values of training/stages/finetune.yaml)",
    )
    for name in ("epochs", "steps_per_epoch", "clicks", "objects", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    for name in ("minutes", "learning_rate", "replay_share", "margin", "forgetting"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float)
    parser.add_argument(
        "--trust-labels", action="store_true", default=None, help="publish although the labels look implausible"
    )
    parser.add_argument("--device", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (0: torch's own choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result with all figures")
    return parser.parse_args(arguments)


def settings(options: argparse.Namespace) -> FinetuneConfig:
    """Settings of the YAML file with what was given on the command line in their place."""
    config = FinetuneConfig() if options.config is None else read_stage_config(options.config, FinetuneConfig)
    given = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(FinetuneConfig)}
    return dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 when published, 3 when trained and not published, 130 when stopped, 1 on an error."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    stop = threading.Event()
    # The first interrupt ends after the step in progress, so that the run can be resumed; the second one kills.
    signal.signal(signal.SIGINT, lambda *_: (stop.set(), signal.signal(signal.SIGINT, signal.default_int_handler)))
    try:
        config = settings(options)
        samples = samples_from_folder(options.folder)
        result = run_finetune(
            config, samples, options.base, options.store, _show, stop.is_set, default_backend(config.device)
        )
    except (MedVLError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not Ranks.join(config.place).first:
        return 130 if result.stopped else 0
    for line in result.skipped:
        print(f"left out: {line}")
    for gate in result.gates:
        print(f"{'pass' if gate.passed else 'FAIL'}  {gate.name}: {gate.detail}")
    print(f"{result.reason}\nrun folder: {result.run}")
    if options.json:
        plain = dataclasses.asdict(result)
        plain.update(run=result.run.name, published=None if result.published is None else result.published.name)
        write_json_atomically(options.json, plain)
    if result.stopped:
        return 130
    return 0 if result.published is not None else 3


def _show(progress: FinetuneProgress) -> None:
    """A line a measurement and an epoch; the trainer's bar counts steps."""
    figures = {"loss": progress.loss, "hold-out": progress.best_metric}
    said = [progress.message, *(f"{name} {value:.3f}" for name, value in figures.items() if value is not None)]
    print(f"{progress.stage}, epoch {progress.epoch} of {progress.total_epochs}: {', '.join(filter(None, said))}")


if __name__ == "__main__":
    sys.exit(main())
