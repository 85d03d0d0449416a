#!/usr/bin/env python
"""What an annotator waits for, over HTTP: /info/ idle and under load, clicks with mask transfer, text requests, memory.

Example: scripts/benchmark_server.py ct.nii.gz --json server.json
Starts a server of this checkout for itself and stops it at the end. Without a volume, two generated ones of
122x101x112 and 512x512x20 voxels are used. Linux: the memory is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from benchmark_latency import add_click_options, click_series, named_volumes, summary
from local_server import OwnServer, computing_of, own_server, said
from monailabel.client.client import MONAILabelClient, MONAILabelClientException
from tqdm import tqdm

from medvl_sam2.errors import MedVLError
from medvl_sam2.files import write_json_atomically
from medvl_sam2.types import Volume

_TEXT_REQUESTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("medvl_semantic", {"result_extension": ".nrrd"}),
    ("medvl_referring", {"prompt": "the liver", "result_extension": ".nrrd"}),
    ("medvl_vqa", {"question": "Is there a lesion in the liver?"}),
    ("medvl_report", {}),
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_click_options(parser, objects=4)
    parser.add_argument("--infos", type=int, default=40, help="GET /info/ requests on the idle server")
    parser.add_argument(
        "--back-to-back", type=float, default=20, metavar="SECONDS", help="how long two clients ask without a pause"
    )
    parser.add_argument("--changed-box", action="store_true", help="ask for what changed of a mask, not for all of it")
    parser.add_argument("--clicks-only", action="store_true", help="leave the text requests out")
    options = parser.parse_args(arguments)
    if options.objects < 1 or options.clicks < 2 or options.infos < 1 or options.back_to_back <= 0:
        parser.error("give at least one object, two clicks, one /info/ request and some seconds back to back")
    return options


def timed(request: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    request()
    return time.perf_counter() - started


def info(address: str) -> None:
    """GET /info/ as every client does first."""
    with urllib.request.urlopen(f"{address}/info/", timeout=60) as reply:
        reply.read()


def clicks(address: str, image: str, volume: Volume, options: argparse.Namespace, bar: tqdm) -> dict[str, Any]:
    """Seconds of first and next clicks, mask transfer included; every object has an annotator of its own."""
    rng = np.random.default_rng(options.seed)
    first, later, received = [], [], []
    for number in range(options.objects):
        points, labels = click_series(volume, options.clicks, rng)
        points = points.astype(int)
        client = MONAILabelClient(address, client_id=f"annotator {number}")  # it puts its own id into every request
        for placed in range(1, options.clicks + 1):
            request: dict[str, Any] = {
                "label": "object",
                "foreground": points[:placed][labels[:placed] == 1].tolist(),
                "background": points[:placed][labels[:placed] == 0].tolist(),
                "result_extension": ".nrrd",
                "result_dtype": "uint8",
                "changed_box": options.changed_box,
            }
            started = time.perf_counter()
            reply = infer(client, "medvl_interactive", image, request)
            seconds = time.perf_counter() - started
            (first if placed == 1 else later).append(seconds)
            if placed > 1:
                received.append(replace(reply, transfer_s=seconds - reply.infer_s))
            bar.update()
    return {
        "first_click_s": summary(first),
        "next_click_s": summary(later),
        "next_write_and_transfer_s": summary([reply.transfer_s for reply in received]),
        "next_bytes": float(np.mean([reply.size for reply in received])),
    }


@dataclass(frozen=True)
class Received:
    """Bytes of a reply's mask, seconds until it was there to write, and seconds to write, send and receive it."""

    size: int
    infer_s: float
    transfer_s: float = 0.0


def infer(client: Any, model: str, image: str, request: dict[str, Any]) -> Received:
    """One request; the mask it returns is thrown away."""
    file, params = client.infer(model, image, request)
    # A reply without a mask comes as it was sent.
    latencies = (json.loads(params) if isinstance(params, bytes) else params)["latencies"]
    size = 0
    if file is not None:
        size = Path(file).stat().st_size
        Path(file).unlink()
    return Received(size, latencies["pre"] + latencies["infer"])


def under_load(server: OwnServer, work: Callable[[], None]) -> tuple[float, list[float]]:
    """Seconds of ``work`` and of every /info/ answered meanwhile (one every 0.2 s)."""
    waits: list[float] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            waits.append(timed(lambda: info(server.address)))
            done.wait(0.2)

    watcher = threading.Thread(target=ask)
    watcher.start()
    try:
        seconds = timed(work)
    finally:
        done.set()
        watcher.join()
    return seconds, waits


def without_a_pause(client: Any, image: str, seconds: float) -> int:
    """Inferences that two clients got done one after the other in ``seconds``, so that the model never rests."""
    end, done = time.monotonic() + seconds, [0, 0]

    def ask(number: int) -> None:
        while time.monotonic() < end:
            request = {"client_id": f"busy {number}", "classes": "liver", "result_extension": ".nrrd"}
            infer(client, "medvl_semantic", image, request)
            done[number] += 1

    with ThreadPoolExecutor(len(done)) as pool:
        list(pool.map(ask, range(len(done))))
    return sum(done)


def measure(server: OwnServer, folder: Path, volumes: list[tuple[str, Volume]], options: argparse.Namespace) -> dict:
    """All figures."""
    client = MONAILabelClient(server.address)
    info(server.address)
    record: dict[str, Any] = {
        "info_idle_s": summary([timed(lambda: info(server.address)) for _ in range(options.infos)])
    }
    record["volumes"], busy = [], []
    texts = 0 if options.clicks_only else len(_TEXT_REQUESTS)
    with tqdm(total=len(volumes) * (options.objects * options.clicks + texts), unit="request") as bar:
        for number, (name, volume) in enumerate(volumes):
            bar.set_postfix_str(name)
            image, path = f"study{number}", folder / f"study{number}.nii.gz"
            nib.save(nib.Nifti1Image(volume.array, volume.geometry.affine), path)
            client.upload_image(path, image, {"PatientID": image})
            result: dict[str, Any] = {"volume": name, "shape": list(volume.geometry.shape)}
            result.update(clicks(server.address, image, volume, options, bar))
            for model, request in () if options.clicks_only else _TEXT_REQUESTS:
                seconds, waits = under_load(server, partial(infer, client, model, image, dict(request)))
                result[f"{model}_s"] = seconds
                busy += waits
                bar.update()
            result["peak_memory_mib_so_far"] = server.peak_memory_mib()
            record["volumes"].append(result)
    if busy:
        record["info_busy_s"] = summary(busy)
        counted: list[int] = []
        work = partial(without_a_pause, client, "study0", options.back_to_back)
        seconds, waits = under_load(server, lambda: counted.append(work()))
        record["info_back_to_back_s"] = summary(waits)
        record["back_to_back"] = {"seconds": seconds, "inferences": counted[0]}
    record["computing"] = computing_of(server.address)
    record["peak_memory_mib"] = server.peak_memory_mib()
    return record


def show(record: dict[str, Any]) -> None:
    """Print the figures."""
    for state in ("idle", "busy", "back_to_back"):
        part = record.get(f"info_{state}_s")
        if part is None:
            continue
        p50, p95 = (f"{1e3 * part[key]:.0f} ms" for key in ("p50", "p95"))
        print(f"GET /info/ {state.replace('_', ' ')}: p50 {p50}, p95 {p95} (n={part['count']})")
    for result in record["volumes"]:
        head, after = result["first_click_s"], result["next_click_s"]
        print(
            f"{result['volume']} {result['shape']}: first click p50 {head['p50']:.2f} s, p95 {head['p95']:.2f} s; next "
            f"click p50 {after['p50']:.2f} s, p95 {after['p95']:.2f} s (n={after['count']}), of which written and sent "
            f"p50 {result['next_write_and_transfer_s']['p50']:.3f} s, {result['next_bytes'] / 1e3:.1f} kB"
            + "".join(f"; {m} {result[f'{m}_s']:.1f} s" for m, _ in _TEXT_REQUESTS if f"{m}_s" in result)
        )
    print(said(record["computing"]))
    print(f"peak resident memory of the server {record['peak_memory_mib']:.0f} MiB")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 on success, 2 with a message otherwise."""
    options = parse(arguments)
    try:
        volumes = named_volumes(options)
        with tempfile.TemporaryDirectory(prefix="benchmark-server-") as name, own_server(Path(name)) as server:
            record = measure(server, Path(name), volumes, options)
    except (MedVLError, OSError) as error:
        print(f"benchmark_server: {error}", file=sys.stderr)
        return 2
    except MONAILabelClientException as error:
        print(f"benchmark_server: the server refused: {error.msg}", file=sys.stderr)
        return 2
    show(record)
    if options.json is not None:
        write_json_atomically(options.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
