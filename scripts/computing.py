"""What the programs that load a model have in common: which one, on which device, in which numbers; how they end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch

from medvl_sam2.errors import MedVLError
from medvl_sam2.modeling.compute import Precision, processor_name
from medvl_sam2.predictor import Predictor


def add_model_options(parser: argparse.ArgumentParser, threads: int = 0) -> None:
    """Options that :func:`load_predictor` reads; ``threads`` is the default number."""
    parser.add_argument("--checkpoint", type=Path, help="checkpoint folder (default: the shipped weights)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: a CUDA GPU where there is one)")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="auto",
        help="number format of slices (default: bfloat16 where the device has units for it and that pays)",
    )
    default = f"default: {threads}" if threads else "0: torch's own choice"
    parser.add_argument("--threads", type=int, default=threads, help=f"torch threads ({default})")


def use_threads(options: argparse.Namespace) -> None:
    """Compute with as many torch threads as asked for."""
    if options.threads > 0:
        torch.set_num_threads(options.threads)


def exit_code(program: str, options: argparse.Namespace, work: Callable[[argparse.Namespace], int | None]) -> int:
    """Do ``work``: 0, 1 where it returns a number of failures, 2 with a message on a bad input."""
    use_threads(options)
    try:
        return 1 if work(options) else 0
    except MedVLError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2


def load_predictor(options: argparse.Namespace) -> Predictor:
    """The predictor that the options ask for.

    Raises:
        CheckpointError: the checkpoint is damaged, or not one.
        ConfigError: this machine has no such device.
    """
    return Predictor.load(options.checkpoint, options.device, options.precision)


def computing(predictor: Predictor | None) -> dict[str, Any]:
    """Where and how figures were computed, as JSON values; without a model (None) on the processor."""
    device = "cpu" if predictor is None else predictor.device
    return {
        "device": device,
        "processor": processor_name(device),
        "precision": None if predictor is None else predictor.precision,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def said(facts: dict[str, Any]) -> str:
    """:func:`computing` in one line."""
    numbers = f", {facts['precision']}" if facts["precision"] else ""
    return f"computed on {facts['device']} ({facts['processor']}){numbers}, torch threads {facts['threads']}"
