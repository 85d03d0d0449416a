#!/usr/bin/env python
"""Convert published weights of a relative into parts of the unified model.

SOURCE is a weight file, the folder it lies in, or the name of a model on a hub (owner/model or owner/model/file).
OUT gets a folder for every part (vision, projector, language, slices, alignment) with safetensors and their
configuration, and conversion.json, which says what became of every tensor. A tensor that is missing, unused or of
another shape stops the conversion; nothing is written then.

Example: scripts/convert_weights.py sam2.1_hiera_tiny.pt --kind sam2.1_tiny --out weights/sam2.1_tiny
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from medvl_sam2.converters import KINDS, Conversion, convert, locate, open_source
from medvl_sam2.converters.convert import conversion_json
from medvl_sam2.errors import MedVLError
from medvl_sam2.files import write_json_atomically


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="weight file, folder, or hub name")
    parser.add_argument("--kind", required=True, choices=list(KINDS), help="what the weights are")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the converted parts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report, every tensor named")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 when converted, 1 on an error."""
    options = parse(arguments)
    bar = tqdm(desc="converting", unit="tensor")

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    try:
        result = convert(open_source(locate(options.source)), options.kind, options.out, progress=show)
        if options.json:
            write_json_atomically(options.json, conversion_json(result))
    except (MedVLError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        bar.close()
    report(result)
    return 0


def report(result: Conversion) -> None:
    """Print what went where, what was left out and why."""
    for name, part in result.parts.items():
        print(f"{name}: {part.tensors} tensors, {part.numbers / 1e6:.2f} M numbers to {part.folder}")
    for reason, count in Counter(result.dropped.values()).items():
        example = next(name for name, why in result.dropped.items() if why == reason)
        print(f"left out {count} tensors such as {example!r}: {reason}")
    if result.ignored:
        print(f"no weights, left out: {', '.join(result.ignored)}")
    if result.appended:
        print(f"{result.appended} vocabulary entries appended; their embeddings are the mean of the others")


if __name__ == "__main__":
    sys.exit(main())
