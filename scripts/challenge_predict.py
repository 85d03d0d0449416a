#!/usr/bin/env python
"""Answer the requests of the CVPR 2025 interactive 3D segmentation challenge, as its containers do.

Each npz file in --inputs (imgs, spacing, boxes, clicks) gets a file of the same name with key ``segs`` in --outputs.
No pickle in a request is executed. The challenge starts the command once a step:

  scripts/challenge_predict.py --inputs inputs --outputs outputs
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from computing import add_model_options, computing, exit_code, load_predictor
from tqdm import tqdm

from medvl_sam2.errors import MedVLError
from medvl_sam2.evaluation.challenge.container import predict_file
from medvl_sam2.evaluation.controls import GrowControl, ShapeControl
from medvl_sam2.evaluation.protocol import Interactive, PredictorEngine
from medvl_sam2.files import write_json_atomically

CONTROLS = {"shape": ShapeControl, "grow": GrowControl}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, required=True, metavar="DIR", help="folder with requests")
    parser.add_argument("--outputs", type=Path, required=True, metavar="DIR", help="folder for answers")
    add_model_options(parser)
    parser.add_argument("--control", choices=CONTROLS, help="answer without a network")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write seconds a case, failures, and how computed")
    return parser.parse_args(arguments)


def predict(options: argparse.Namespace) -> int:
    """Answer every request; the number of those that failed, which have no answer then."""
    requests = sorted(options.inputs.glob("*.npz"))
    if not requests:
        raise MedVLError(f"{options.inputs} holds no npz file; give the folder with the challenge's requests")
    predictor = None if options.control else load_predictor(options)
    engine: Interactive = CONTROLS[options.control]() if predictor is None else PredictorEngine(predictor)
    figures: dict[str, Any] = {"computing": computing(predictor), "seconds": {}, "failed": {}}
    for source in tqdm(requests, unit="case"):
        started = time.perf_counter()
        try:
            predict_file(engine, source, options.outputs / source.name)
            figures["seconds"][source.name] = time.perf_counter() - started
        except (MedVLError, RuntimeError, MemoryError) as error:
            figures["failed"][source.name] = str(error)
            print(f"failed: {source.name}: {error}", file=sys.stderr)
    if options.json is not None:
        write_json_atomically(options.json, figures)
    return len(figures["failed"])


def main(arguments: list[str] | None = None) -> int:
    """Answer all requests; 0 on success, 1 where one failed, 2 with a message on a bad input."""
    return exit_code("challenge_predict", parse(arguments), predict)


if __name__ == "__main__":
    sys.exit(main())
