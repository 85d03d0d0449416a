#!/usr/bin/env python
"""Clicks on one volume: ours beside MONAI Label's sam_3d and the sam2 package's video predictor, same SAM 2.1 tiny.

Example: scripts/benchmark_interactive.py ct.nii.gz --threads 1 --json figures.json --plot scaling.png
Without a volume, generated ones of --shapes are used, which vary in slices and in plane size.

Every contender has the same random weights and gets the same clicks, the first in the middle of the volume. A request
carries all clicks so far and ends with a mask file, as MONAI Label's do; the first one reads the image. Undo is the
request without the last click; for the peers that means starting over, as a removed click stays in their memory
otherwise. Random weights find an object of no particular length, so ours, which stops where the object ends, stands
there twice: as the weights have it, and "ours, long" with an object on every slice. What a next click costs depends on
how far its change is carried, so the slices that were decoded for it stand beside its time. Ratios are theirs over
ours, of processor seconds, which other programs on the machine change least; those of the clock stand in brackets.
Figures of --json are kept as they come: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from benchmark_latency import generated_volume
from interactive_contenders import CONTENDERS, Clicks, Measured, fair_weights, measure
from tqdm import tqdm

from medvl_sam2.errors import ConfigError, MedVLError
from medvl_sam2.files import write_json_atomically
from medvl_sam2.types import Volume
from medvl_sam2.volume_io import read_volume

SHAPES = ("256x256x10", "256x256x20", "256x256x40", "128x128x20", "512x512x20")
OFFSETS_MM = ((0, 0, 0), (14, 0, 0), (-8, 6, 2), (0, -16, 0), (6, 8, -4), (-14, -4, 2), (4, -8, 6))
"""Where clicks lie from the first one, which is in the middle; every second one is background."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volumes", nargs="*", type=Path, help="image files or DICOM folders")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="XxYxZ", help="generated volumes instead")
    parser.add_argument(
        "--only", nargs="+", choices=tuple(CONTENDERS), default=tuple(CONTENDERS), help="(default: all)"
    )
    parser.add_argument("--image-size", type=int, default=1024, help="model pixels of all (default: %(default)s)")
    parser.add_argument("--clicks", type=int, default=3, help="clicks a volume (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and generated volumes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures here, finished ones are not redone")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw next clicks over slices and plane size")
    options = parser.parse_args(arguments)
    if not 2 <= options.clicks <= len(OFFSETS_MM):
        parser.error(f"--clicks {options.clicks} must be 2 to {len(OFFSETS_MM)}, else there is no next click to time")
    return options


def placed_clicks(volume: Volume, count: int) -> Clicks:
    """``count`` clicks round the middle of the volume, on whole voxels inside it."""
    geometry = volume.geometry
    middle = np.array(geometry.shape) // 2
    steps = np.rint(np.array(OFFSETS_MM[:count]) / np.asarray(geometry.spacing))
    points = np.clip(middle + steps, 0, np.array(geometry.shape) - 1)
    return Clicks(points, np.array([(n + 1) % 2 for n in range(count)]))


def named_volumes(options: argparse.Namespace) -> list[tuple[str, Volume]]:
    """The volumes asked for, or the generated ones, with their names."""
    if options.volumes:
        return [(str(path), read_volume(path)) for path in options.volumes]
    found = []
    for text in options.shapes:
        try:
            x, y, z = (int(part) for part in text.split("x"))
        except ValueError as error:
            raise ConfigError(f"shape {text!r} is not three sizes; write it as 256x256x20") from error
        found.append((f"generated {text}", generated_volume((x, y, z), options.seed)))
    return found


def run_alone(name: str, volume: Volume, options: argparse.Namespace) -> Measured:
    """One contender on one volume in a new process and a folder of its own, which is removed."""
    with tempfile.TemporaryDirectory() as folder:
        home, image = Path(folder), Path(folder) / "image.nii.gz"
        nib.save(nib.Nifti1Image(volume.array, volume.geometry.affine), image)
        fair_weights(home, options.image_size, options.seed)
        clicks = placed_clicks(volume, options.clicks)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            work = pool.submit(measure, name, home, image, clicks, options.image_size, options.seed, options.threads)
            return work.result()


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    """What figures must share to stand in one table."""
    return {name: getattr(options, name) for name in ("image_size", "clicks", "threads", "seed")}


def kept_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of an earlier, stopped run; none without a file."""
    if options.json is None or not options.json.is_file():
        return []
    found = json.loads(options.json.read_text(encoding="utf-8"))
    if found["conditions"] != conditions(options):
        raise ConfigError(
            f"{options.json} holds figures under other conditions ({found['conditions']}); give another file"
        )
    if any("decoded" not in row["first"] for row in found["rows"]):
        raise ConfigError(f"{options.json} is older and lacks the number of decoded slices; give another file")
    return found["rows"]


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every contender on every volume; a row each."""
    rows, volumes = kept_rows(options), named_volumes(options)
    done = {(row["volume"], row["contender"]) for row in rows}
    for name, volume in (bar := tqdm(volumes, unit="volume")):
        for contender in options.only:
            if (name, contender) in done:
                continue
            bar.set_postfix_str(f"{contender} on {name}")
            found = asdict(run_alone(contender, volume, options))
            rows.append({"volume": name, "shape": list(volume.geometry.shape), "contender": contender, **found})
            if options.json is not None:
                write_json_atomically(options.json, {"conditions": conditions(options), "rows": rows})
    return rows


def medians(row: dict[str, Any], figure: str) -> dict[str, float]:
    """A figure of the costs of a row by measure."""
    following = float(np.median([cost[figure] for cost in row["following"]]))
    return {"first click": row["first"][figure], "next click": following, "undo": row["undo"][figure]}


def table(rows: list[dict[str, Any]]) -> str:
    """All rows of a volume, then the ratios of every peer over both of ours."""
    lines = []
    for volume in dict.fromkeys(row["volume"] for row in rows):
        here = {row["contender"]: row for row in rows if row["volume"] == volume}
        lines.append(f"{volume} {'x'.join(map(str, next(iter(here.values()))['shape']))}")
        for name, row in here.items():
            cpu, wall = medians(row, "cpu"), medians(row, "wall")
            slices = medians(row, "decoded")
            costs = "".join(f"{m} {cpu[m]:8.2f} s ({wall[m]:8.2f} s, {slices[m]:g} decoded)  " for m in cpu)
            mask = f"{row['slices']} slices in the mask"
            numbers = f"  {row['precision']}" if row.get("precision") else ""  # older files do not say
            lines.append(f"  {name:26}{costs}peak {row['peak_gib']:.2f} GiB  {mask}{numbers}")
        for ours in (name for name in here if name.startswith("ours")):
            for peer in (name for name in here if not name.startswith("ours")):
                lines.append(f"  {f'{peer} / {ours}':26}{ratios(here[peer], here[ours])}")
    return "\n".join(lines)


def ratios(peer: dict[str, Any], ours: dict[str, Any]) -> str:
    """One line of a peer's figures over ours."""
    cpu, wall = ({m: t / medians(ours, c)[m] for m, t in medians(peer, c).items()} for c in ("cpu", "wall"))
    costs = "".join(f"{m} {cpu[m]:8.1f} x ({wall[m]:8.1f} x)  " for m in cpu)
    return f"{costs}peak {peer['peak_gib'] / ours['peak_gib']:.2f} x"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Next-click seconds over the number of slices and over the plane's width, a line a contender."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, axis, other, label in zip(figure.subplots(1, 2), (2, 0), (0, 2), ("slices", "plane width"), strict=True):
        fixed = [row["shape"][other] for row in rows]
        common = max(sorted(set(fixed)), key=fixed.count)
        for name in dict.fromkeys(row["contender"] for row in rows):
            chosen = [row for row in rows if row["contender"] == name and row["shape"][other] == common]
            points = sorted((row["shape"][axis], medians(row, "cpu")["next click"]) for row in chosen)
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(
            xlabel=f"{label} ({'width' if axis == 2 else 'slices'} {common})", ylabel="next click (CPU s)", yscale="log"
        )
        axes.legend()
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 on success, 2 with a message on a bad input."""
    options = parse(arguments)
    try:
        rows = run(options)
    except MedVLError as error:
        print(f"benchmark_interactive: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    print(
        f"image size {options.image_size}, on the processor, threads {options.threads}; its seconds, the clock's in ()"
    )
    if options.plot is not None:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
