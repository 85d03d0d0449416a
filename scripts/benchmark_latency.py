#!/usr/bin/env python
"""Time of a click inside the server process: first click (encoding included), next clicks, and peak memory.

Example: scripts/benchmark_latency.py ct.nii.gz dicom_folder --threads 2 --json latency.json
Without a volume, two generated ones of 122x101x112 and 512x512x20 voxels are used.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np
from computing import add_model_options, computing, load_predictor, said, use_threads
from tqdm import tqdm

from medvl_sam2.errors import MedVLError
from medvl_sam2.files import write_json_atomically
from medvl_sam2.geometry import CanonicalTransform, resample_to
from medvl_sam2.predictor import Predictor
from medvl_sam2.synthesis import generate_case
from medvl_sam2.types import Geometry, Modality, Prompt, Volume
from medvl_sam2.volume_io import read_volume

SHAPES = ((122, 101, 112), (512, 512, 20))


def add_click_options(parser: argparse.ArgumentParser, objects: int) -> None:
    """Options of every benchmark that clicks on volumes; ``objects`` is the default a volume."""
    parser.add_argument("volumes", nargs="*", type=Path, help="image files or DICOM folders")
    parser.add_argument("--objects", type=int, default=objects, help="objects a volume, each in a new session")
    parser.add_argument("--clicks", type=int, default=5, help="clicks an object")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")


def named_volumes(options: argparse.Namespace) -> list[tuple[str, Volume]]:
    """The volumes asked for with their names, or the two generated ones."""
    if options.volumes:
        return [(str(path), read_volume(path)) for path in options.volumes]
    return [("generated " + "x".join(map(str, s)), generated_volume(s, options.seed)) for s in SHAPES]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_click_options(parser, objects=6)
    add_model_options(parser)
    options = parser.parse_args(arguments)
    if options.objects < 1 or options.clicks < 2:
        parser.error("give at least one object and two clicks, else there is no next click to time")
    return options


def generated_volume(shape: tuple[int, int, int], seed: int) -> Volume:
    """A generated CT resampled to ``shape`` stored voxels (x, y, z order, RAS) over the same space."""
    source = generate_case(seed).volume()
    transform = CanonicalTransform(source.geometry)
    extent = np.array(transform.spacing) * np.array(transform.shape)
    spacing = extent[::-1] / np.array(shape)
    affine = np.diag([*spacing, 1.0])
    corners = source.geometry.voxel_to_world(np.array([[0, 0, 0], np.array(source.geometry.shape) - 1]))
    affine[:3, 3] = corners.min(axis=0)
    geometry = Geometry(shape, affine)
    return Volume(resample_to(source.array, source.geometry, geometry, nearest=True), geometry, Modality.CT)


def click_series(volume: Volume, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Stored points (count, 3) within 30 mm of a random body voxel, labels alternating from foreground."""
    limit = -300 if volume.modality is Modality.CT else np.percentile(volume.array, 60)
    sample = rng.integers(0, volume.geometry.shape, size=(4000, 3))
    body = sample[volume.array[tuple(sample.T)] > limit]
    first = (body if len(body) else sample)[0]
    spread = rng.uniform(-30, 30, size=(count, 3)) / np.asarray(volume.geometry.spacing)
    spread[0] = 0
    points = np.clip(np.rint(first + spread), 0, np.array(volume.geometry.shape) - 1)
    return points, np.array([1 if n % 2 == 0 else 0 for n in range(count)])


def time_volume(
    predictor: Predictor, volume: Volume, options: argparse.Namespace, rng: np.random.Generator, bar: tqdm
) -> tuple[list[float], list[float]]:
    """Seconds of every first click (new session) and of every next click."""
    first, later = [], []
    for _ in range(options.objects):
        session = predictor.open(volume)
        points, labels = click_series(volume, options.clicks, rng)
        for placed in range(1, options.clicks + 1):
            started = time.perf_counter()
            predictor.segment_prompt(session, Prompt(points[:placed], labels[:placed]))
            (first if placed == 1 else later).append(time.perf_counter() - started)
            bar.update()
    return first, later


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, 95th percentile and largest of a list of seconds."""
    p50, p95 = np.percentile(seconds, (50, 95))
    return {"p50": float(p50), "p95": float(p95), "max": max(seconds), "count": len(seconds)}


def peak_memory_gib() -> float:
    """Peak resident memory of this process in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 on success, 2 with a message on a bad input."""
    options = parse(arguments)
    use_threads(options)
    rng = np.random.default_rng(options.seed)
    try:
        predictor = load_predictor(options)
        volumes = named_volumes(options)
        results = []
        with tqdm(total=len(volumes) * options.objects * options.clicks, unit="click") as bar:
            for name, volume in volumes:
                bar.set_postfix_str(name)
                first, later = time_volume(predictor, volume, options, rng, bar)
                results.append(
                    {
                        "volume": name,
                        "shape": list(volume.geometry.shape),
                        "first_click_s": summary(first),
                        "next_click_s": summary(later),
                        "peak_rss_gib_so_far": peak_memory_gib(),
                    }
                )
    except MedVLError as error:
        print(f"benchmark_latency: {error}", file=sys.stderr)
        return 2
    for result in results:
        head, after = result["first_click_s"], result["next_click_s"]
        print(
            f"{result['volume']} {result['shape']}: first click p50 {head['p50']:.2f} s, p95 {head['p95']:.2f} s; "
            f"next click p50 {after['p50']:.2f} s, p95 {after['p95']:.2f} s (n={after['count']})"
        )
    facts = computing(predictor)
    print(f"{said(facts)}, peak resident memory {peak_memory_gib():.2f} GiB")
    if options.json is not None:
        write_json_atomically(
            options.json,
            {
                "computing": facts,
                "checkpoint": predictor.meta.version,
                "peak_rss_gib": peak_memory_gib(),
                "volumes": results,
            },
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
