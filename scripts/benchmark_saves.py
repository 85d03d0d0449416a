#!/usr/bin/env python
"""How long annotators wait for their label to be kept, while they prompt and a finetuning runs.

Example: scripts/benchmark_saves.py --json saves.json
Starts a server of this checkout for itself and stops it at the end. Every annotator works on an image of its own: a
click, then a label of the size of the image saved over HTTP, again and again; all of them at the same time, with a
finetuning begun before. Afterwards every version must be there with the voxels its annotator sent: exit code 1 if not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import requests
from benchmark_latency import generated_volume, summary
from local_server import computing_of, own_server, said
from monailabel.client.client import MONAILabelClient, MONAILabelClientException
from tqdm import tqdm

from medvl_sam2.errors import DataError, MedVLError
from medvl_sam2.files import write_json_atomically
from medvl_sam2.types import Volume

STRUCTURES = 8
TRAINED_ON = "trained0", "trained1", "trained2"
"""Small labelled images the finetuning has its samples from."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotators", type=int, default=8)
    parser.add_argument("--saves", type=int, default=10, help="labels each of them saves")
    parser.add_argument("--shape", default="512x512x100", help="voxels of images and labels")
    parser.add_argument("--no-prompts", action="store_true", help="annotators save and do not prompt")
    parser.add_argument("--no-training", action="store_true", help="no finetuning runs meanwhile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    options = parser.parse_args(arguments)
    sizes = options.shape.split("x")
    if len(sizes) != 3 or not all(size.isdigit() and int(size) > 7 for size in sizes):
        parser.error(f"shape {options.shape!r} must be like 512x512x100")
    options.shape = tuple(int(size) for size in sizes)
    if options.annotators < 1 or options.saves < 1:
        parser.error("give at least one annotator and one save")
    return options


def label_file(path: Path, volume: Volume, rng: np.random.Generator) -> Path:
    """Balls of eight structures as .nii.gz, as Slicer sends its label."""
    shape = np.array(volume.geometry.shape)
    mask = np.zeros(tuple(shape), np.uint8, order="F")
    for value in range(1, STRUCTURES + 1):
        radius = rng.uniform(0.04, 0.12) * shape
        center = rng.uniform(0.2, 0.8, 3) * shape
        low, high = np.maximum(center - radius, 0).astype(int), np.minimum(center + radius + 1, shape).astype(int)
        axes = np.ogrid[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        inside = sum(((axis - c) / r) ** 2 for axis, c, r in zip(axes, center, radius, strict=True)) <= 1
        mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))][inside] = value
    nib.save(nib.Nifti1Image(mask, volume.geometry.affine), path)
    return path


def upload(client: MONAILabelClient, folder: Path, image: str, volume: Volume) -> None:
    """Put an image into the store; each is a patient of its own."""
    path = folder / f"{image}.nii.gz"
    nib.save(nib.Nifti1Image(volume.array, volume.geometry.affine), path)
    client.upload_image(path, image, {"PatientID": image})


def save(address: str, image: str, author: str, file: Path) -> tuple[float, int]:
    """Save a label; the seconds until it was acknowledged, and its version."""
    names = [{"name": f"structure {value}", "idx": value} for value in range(1, STRUCTURES + 1)]
    params = {"author": author, "client_id": author, "label_info": names}
    with open(file, "rb") as content:
        began = time.perf_counter()
        reply = requests.post(
            f"{address}/medvl/labels",
            params={"image": image},
            data={"params": json.dumps(params)},
            files={"label": (file.name, content)},
            timeout=300,
        )
        seconds = time.perf_counter() - began
    if reply.status_code != 200:
        raise DataError(f"the label of {image} was refused ({reply.status_code}): {reply.text}")
    return seconds, int(reply.json()["version"])


class Annotator:
    """One annotator: prompts on an image and saves labels of it; ``sent`` is what each version must hold."""

    def __init__(self, address: str, image: str, volume: Volume, files: list[Path], seed: int) -> None:
        self.address, self.image, self.volume, self.files = address, image, volume, files
        self.client = MONAILabelClient(address, client_id=f"annotator of {image}")
        self.rng = np.random.default_rng(seed)
        self.sent: dict[int, str] = {}
        self.save_s: list[float] = []
        self.prompt_s: list[float] = []

    def work(self, saves: int, prompts: bool, start: threading.Barrier, bar: tqdm) -> None:
        """Begin with the others; prompt and save in turn."""
        start.wait()
        for turn in range(saves):
            if prompts:
                self.prompt(turn)
            file = self.files[turn % len(self.files)]
            seconds, version = save(self.address, self.image, f"annotator of {self.image}", file)
            self.save_s.append(seconds)
            self.sent[version] = hashlib.sha256(file.read_bytes()).hexdigest()
            bar.update()

    def prompt(self, turn: int) -> None:
        """A click near the middle of the image, on an object of its own."""
        shape = np.array(self.volume.geometry.shape)
        point = (shape * self.rng.uniform(0.4, 0.6, 3)).astype(int).tolist()
        request = {"label": f"object {turn}", "foreground": [point], "background": []}
        request |= {"result_extension": ".nrrd", "result_dtype": "uint8"}
        began = time.perf_counter()
        file, _ = self.client.infer("medvl_interactive", self.image, request)
        self.prompt_s.append(time.perf_counter() - began)
        Path(file).unlink()

    def crossed(self) -> int:
        """Versions that are missing or hold other voxels than this annotator sent."""
        reply = requests.get(f"{self.address}/medvl/labels", params={"image": self.image}, timeout=300)
        stored = {version["version"]: version["checksum"] for version in reply.json()["versions"]}
        return sum(stored.get(version) != checksum for version, checksum in self.sent.items())


def train(client: MONAILabelClient, address: str, folder: Path, rng: np.random.Generator) -> None:
    """Begin a finetuning that lasts longer than the benchmark, and wait until it works."""
    for number, image in enumerate(TRAINED_ON):
        volume = generated_volume((96, 96, 48), 100 + number)
        upload(client, folder, image, volume)
        save(address, image, "before", label_file(folder / "small.nii.gz", volume, rng))
    client.train_start("medvl_sam2", {"max_epochs": 1000, "minutes": 60})
    end = time.monotonic() + 300
    while time.monotonic() < end:
        stats = client.info()["train_stats"].get("medvl_sam2", {})
        if stats.get("stage") or stats.get("epoch"):
            return
        time.sleep(1.0)
    raise DataError("the finetuning did not begin within 300 s; see the server's log, or give --no-training")


def measure(address: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    client, rng = MONAILabelClient(address), np.random.default_rng(options.seed)
    volume = generated_volume(options.shape, options.seed)
    files = [label_file(folder / f"label{number}.nii.gz", volume, rng) for number in range(4)]
    people = []
    for number in range(options.annotators):
        upload(client, folder, f"study{number}", volume)
        mine = [label_file(folder / f"label{number}-{turn}.nii.gz", volume, rng) for turn in range(3)]
        people.append(Annotator(address, f"study{number}", volume, mine, options.seed + number))
    save(address, "study0", "first", files[0])
    if not options.no_training:
        train(client, address, folder, rng)
    start = threading.Barrier(len(people))
    prompts = not options.no_prompts
    with ThreadPoolExecutor(len(people)) as pool, tqdm(total=len(people) * options.saves, unit="save") as bar:
        for done in [pool.submit(one.work, options.saves, prompts, start, bar) for one in people]:
            done.result()
    training = client.info()["train_stats"].get("medvl_sam2", {})
    if not options.no_training and training.get("total_time"):
        raise DataError(f"the finetuning ended before the saves did: {training.get('message')}")
    record: dict[str, Any] = {
        "shape": list(options.shape),
        "annotators": len(people),
        "training": not options.no_training,
        "label_bytes": people[0].files[0].stat().st_size,
        "save_s": summary([value for one in people for value in one.save_s]),
        "computing": computing_of(address),
        "crossed": sum(one.crossed() for one in people),
    }
    if prompts:
        record["prompt_s"] = summary([value for one in people for value in one.prompt_s])
    if not options.no_training:
        client.train_stop()
    return record


def show(record: dict[str, Any]) -> None:
    """Print the figures."""
    saves = record["save_s"]
    meanwhile = "a finetuning ran" if record["training"] else "no training ran"
    print(
        f"{record['annotators']} annotators, labels of {'x'.join(map(str, record['shape']))}, {meanwhile}: save p50 "
        f"{saves['p50'] * 1000:.0f} ms, p95 {saves['p95'] * 1000:.0f} ms, longest {saves['max'] * 1000:.0f} ms of "
        f"{saves['count']}; {record['crossed']} versions missing or crossed"
    )
    print(said(record["computing"]))
    if "prompt_s" in record:
        print(f"prompts: p50 {record['prompt_s']['p50']:.2f} s, p95 {record['prompt_s']['p95']:.2f} s")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 on success, 1 when a label is missing or another's, 2 with a message otherwise."""
    options = parse(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="benchmark-saves-") as name, own_server(Path(name)) as server:
            record = measure(server.address, Path(name), options)
    except (MedVLError, OSError, requests.RequestException) as error:
        print(f"benchmark_saves: {error}", file=sys.stderr)
        return 2
    except MONAILabelClientException as error:
        print(f"benchmark_saves: the server refused: {error.msg}", file=sys.stderr)
        return 2
    show(record)
    if options.json is not None:
        write_json_atomically(options.json, record)
    return 1 if record["crossed"] else 0


if __name__ == "__main__":
    sys.exit(main())
