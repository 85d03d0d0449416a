#!/usr/bin/env python
"""Say what a model of a preset's size costs, part by part and stage by stage, without making its weights.

Example: scripts/describe_model.py paper --json paper.json
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path

from medvl_sam2.config import ModelConfig
from medvl_sam2.errors import MedVLError
from medvl_sam2.files import write_json_atomically
from medvl_sam2.modeling.footprint import ASSUMPTIONS, STAGES, Footprint, footprint
from medvl_sam2.presets import PRESETS, preset

GIB = 1024**3


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="tiny", help=f"one of {', '.join(PRESETS)} (default: %(default)s)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a checkpoint's config.json instead of a preset")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    return parser.parse_args(arguments)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Left-aligned first column, right-aligned others."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    aligned = (
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))] for line in lines
    )
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def gib(size: int) -> str:
    return f"{size / GIB:.3f}"


def describe(found: Footprint) -> str:
    """The tables as text."""
    total = found.parameters
    parts = [
        [
            part.name,
            f"{part.parameters / 1e6:.3f}",
            *("x" if stage in part.stages else "" for stage in STAGES),
            gib(4 * part.parameters),
            gib(2 * part.parameters),
            f"{part.flops / 1e9:.3f}" if part.unit else "",
            part.unit,
        ]
        for part in found.parts
    ]
    trained = [f"{stage.trained / 1e6:.1f}" for stage in found.training]
    parts.append(["model (without LoRA)", f"{total / 1e6:.3f}", *[""] * 5, gib(4 * total), gib(2 * total), "", ""])
    parts.append(["trained, M", "", *trained, "", "", "", ""])
    stages = [
        [f"stage {s.name}", f"{s.trained / 1e6:.3f}", gib(s.weights), gib(s.results), gib(s.weights + s.results)]
        for s in found.training
    ]
    use = dataclasses.asdict(found.inference)
    return "\n\n".join(
        [
            f"{found.name}: {total / 1e6:.2f} M parameters",
            table(
                ["part", "M", *(f"stage {stage}" for stage in STAGES), "fp32 GiB", "bf16 GiB", "GFLOPs", "one forward"],
                parts,
            ),
            table(["inference, GiB", *use, "total"], [["", *map(gib, use.values()), gib(sum(use.values()))]]),
            table(["training step, GiB", "trained, M", "weights and optimiser", "results", "total"], stages),
            "\n".join(ASSUMPTIONS),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; 0 on success, 2 with a message on a bad input."""
    options = parse(arguments)
    try:
        if options.config is None:
            config = preset(options.preset)
        else:
            config = ModelConfig.from_json(options.config.read_text(encoding="utf-8"))
        found = footprint(config)
    except (MedVLError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(describe(found))
    if options.json is not None:
        figures = {**dataclasses.asdict(found), "parameters": found.parameters, "assumptions": ASSUMPTIONS}
        write_json_atomically(options.json, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
