#!/usr/bin/env python
"""Many annotators at once, over HTTP: what each of them waits for, and that no mask of one reaches another.

Example: scripts/benchmark_annotators.py --json annotators.json
Starts a server of this checkout for itself and stops it at the end. Eight annotators work on a generated image each,
then two on one image, all at the same time: a box, then clicks, sent cumulatively as clients do. Every mask is compared
with the one a lone annotator gets for the same prompts. Exit code 1 when one differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from benchmark_latency import generated_volume, summary
from local_server import OwnServer, computing_of, own_server, said
from monailabel.client.client import MONAILabelClient, MONAILabelClientException
from tqdm import tqdm

from medvl_sam2.errors import MedVLError
from medvl_sam2.files import write_json_atomically
from medvl_sam2.types import Volume
from medvl_sam2.volume_io import read_mask

BOX_MM = 40.0
"""Edge of the boxes drawn."""


@dataclass(frozen=True)
class Job:
    """What one annotator does: requests on an ``image``, each with all prompts so far."""

    annotator: str
    image: str
    requests: tuple[dict[str, Any], ...]


@dataclass
class Done:
    """Masks (I, J, K) bool and seconds of a job's requests, in order."""

    masks: list[np.ndarray] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotators", type=int, default=8, help="annotators who each work on an image of their own")
    parser.add_argument("--clicks", type=int, default=5, help="clicks after the box")
    parser.add_argument("--shape", default="128x112x60", help="voxels of the generated images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    options = parser.parse_args(arguments)
    sizes = options.shape.split("x")
    if len(sizes) != 3 or not all(size.isdigit() and int(size) > 3 for size in sizes):
        parser.error(f"shape {options.shape!r} must be like 128x112x60")
    options.shape = tuple(int(size) for size in sizes)
    if options.annotators < 1 or options.clicks < 1:
        parser.error("give at least one annotator and one click")
    return options


def job(annotator: str, image: str, volume: Volume, clicks: int, rng: np.random.Generator) -> Job:
    """A box round a random voxel of the body, and clicks within it."""
    upper = np.array(volume.geometry.shape) - 1
    body = np.argwhere(volume.array > -300)
    center = body[rng.integers(len(body))]
    half = BOX_MM / 2 / np.array(volume.geometry.spacing)
    box = np.clip(np.rint([center - half, center + half]), 0, upper).astype(int)
    points = rng.integers(box[0], box[1] + 1, size=(clicks, 3)).tolist()
    requests = []
    for placed in range(clicks + 1):
        shown = points[:placed]
        request = {"label": "object", "box": box.tolist(), "foreground": shown[::2], "background": shown[1::2]}
        requests.append(request | {"result_extension": ".nrrd", "result_dtype": "uint8"})
    return Job(annotator, image, tuple(requests))


def work(server: OwnServer, task: Job, bar: tqdm, start: threading.Barrier | None = None) -> Done:
    """Send the requests of one annotator, one after another; with a barrier, begin together with the others."""
    client, done = MONAILabelClient(server.address, client_id=task.annotator), Done()
    if start is not None:
        start.wait()
    for request in task.requests:
        began = time.perf_counter()
        file, _ = client.infer("medvl_interactive", task.image, dict(request))
        done.seconds.append(time.perf_counter() - began)
        done.masks.append(read_mask(file)[0] > 0)
        Path(file).unlink()
        bar.update()
    return done


def together(server: OwnServer, jobs: list[Job], bar: tqdm) -> tuple[list[Done], float]:
    """All annotators at once; also the seconds it took."""
    start = threading.Barrier(len(jobs))
    began = time.perf_counter()
    with ThreadPoolExecutor(len(jobs)) as pool:
        done = list(pool.map(lambda task: work(server, task, bar, start), jobs))
    return done, time.perf_counter() - began


def measure(server: OwnServer, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    client, rng = MONAILabelClient(server.address), np.random.default_rng(options.seed)
    volumes = {f"study{n}": generated_volume(options.shape, options.seed + n) for n in range(options.annotators + 1)}
    for image, volume in volumes.items():
        path = folder / f"{image}.nii.gz"
        nib.save(nib.Nifti1Image(volume.array, volume.geometry.affine), path)
        client.upload_image(path, image, {"PatientID": image})
    *own, shared = volumes
    rounds = {
        "different images": [job(f"annotator {n}", i, volumes[i], options.clicks, rng) for n, i in enumerate(own)],
        "one image": [job(f"neighbour {n}", shared, volumes[shared], options.clicks, rng) for n in range(2)],
    }
    record: dict[str, Any] = {"shape": list(options.shape), "rounds": {}}
    count = 2 * sum(len(task.requests) for jobs in rounds.values() for task in jobs)
    with tqdm(total=count, unit="request") as bar:
        for name, jobs in rounds.items():
            done, seconds = together(server, jobs, bar)
            differing = 0
            for task, result in zip(jobs, done, strict=True):
                alone = work(server, Job(f"{task.annotator} alone", task.image, task.requests), bar)
                pairs = zip(result.masks, alone.masks, strict=True)
                differing += sum(not np.array_equal(one, other) for one, other in pairs)
            record["rounds"][name] = {
                "annotators": len(jobs),
                "masks": sum(len(result.masks) for result in done),
                "voxels": int(sum(mask.sum() for result in done for mask in result.masks)),
                "differing_masks": differing,
                "requests_per_s": sum(len(result.masks) for result in done) / seconds,
                "first_s": summary([result.seconds[0] for result in done]),
                "next_s": summary([value for result in done for value in result.seconds[1:]]),
            }
    record["computing"] = computing_of(server.address)
    record["peak_memory_mib"] = server.peak_memory_mib()
    return record


def show(record: dict[str, Any]) -> None:
    """Print the figures."""
    for name, result in record["rounds"].items():
        first, later = result["first_s"], result["next_s"]
        same = f"{result['differing_masks']} of {result['masks']} masks differ from a lone annotator's"
        print(
            f"{result['annotators']} annotators, {name}: {result['requests_per_s']:.2f} requests/s; box p50 "
            f"{first['p50']:.2f} s, p95 {first['p95']:.2f} s; next click p50 {later['p50']:.2f} s, p95 "
            f"{later['p95']:.2f} s; {same}"
        )
    print(said(record["computing"]))
    print(f"peak resident memory of the server {record['peak_memory_mib']:.0f} MiB")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 on success, 1 when a mask differs, 2 with a message otherwise."""
    options = parse(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="benchmark-annotators-") as name, own_server(Path(name)) as server:
            record = measure(server, Path(name), options)
    except (MedVLError, OSError) as error:
        print(f"benchmark_annotators: {error}", file=sys.stderr)
        return 2
    except MONAILabelClientException as error:
        print(f"benchmark_annotators: the server refused: {error.msg}", file=sys.stderr)
        return 2
    show(record)
    if options.json is not None:
        write_json_atomically(options.json, record)
    return 1 if any(result["differing_masks"] or not result["voxels"] for result in record["rounds"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
