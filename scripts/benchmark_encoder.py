#!/usr/bin/env python
"""The slice encoder in the forms a CPU could run it: time a slice, time to get ready, and what each changes.

Example: scripts/benchmark_encoder.py --threads 1 --json encoder.json
         scripts/benchmark_encoder.py --preset sam2.1_tiny --repeats 3

All forms encode the same generated CT slices in one process, taking turns, so that whatever else the machine does
meets all of them. Ratios are of processor seconds a slice, the plain form one by one over this one: above 1 is faster.
The difference is the largest one of all feature maps, relative to the map's largest feature in the plain encoder. Forms
that need a package which is not installed, or that this machine cannot run, are named with the reason.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from benchmark_latency import generated_volume
from computing import computing, said
from torch import Tensor, nn
from tqdm import tqdm

from medvl_sam2.errors import ConfigError, MedVLError
from medvl_sam2.files import write_json_atomically
from medvl_sam2.modeling.slice_segmenter import SliceSegmenter
from medvl_sam2.predictor import Predictor
from medvl_sam2.presets import SLICE_PRESETS

Maps = tuple[Tensor, Tensor, Tensor]
Form = Callable[[Tensor], Maps]
SHIPPED = "demo"


class Encoder(nn.Module):
    """Images (N, 3, S, S) to the three feature maps, as :meth:`SliceSegmenter.encode` gives them."""

    def __init__(self, segmenter: SliceSegmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, images: Tensor) -> Maps:
        """Features at strides 4, 8 and 16."""
        found = self.segmenter.encode(images)
        return found.fine, found.middle, found.coarse


@dataclass(frozen=True)
class Row:
    """One form at one batch size; seconds are medians, a slice."""

    form: str
    batch: int
    ready_s: float
    cpu_s: float
    wall_s: float
    difference: float
    ratio: float = 1.0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = (SHIPPED, *SLICE_PRESETS)
    parser.add_argument("--preset", choices=presets, default=SHIPPED, help="shipped weights, or random ones of a size")
    parser.add_argument("--image-size", type=int, help="model pixels (default: the preset's)")
    parser.add_argument("--forms", nargs="+", choices=tuple(FORMS), default=tuple(FORMS), help="(default: all)")
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 4), help="slices encoded at once")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each form (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and of the generated CT")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    options = parser.parse_args(arguments)
    if options.repeats < 1 or min(options.batches) < 1:
        parser.error("--repeats and --batches must be at least 1")
    return options


def built_encoder(options: argparse.Namespace) -> Encoder:
    """A new encoder of the preset; every form gets its own, as some change it in place."""
    if options.preset == SHIPPED:
        if options.image_size:
            raise ConfigError("--image-size goes with a preset of random weights; the shipped ones have theirs")
        return Encoder(Predictor.load(device="cpu").model.segmenter).eval()
    config = SLICE_PRESETS[options.preset]
    torch.manual_seed(options.seed)
    return Encoder(SliceSegmenter(replace(config, image_size=options.image_size or config.image_size))).eval()


def plain(encoder: Encoder, images: Tensor) -> Form:
    """As it is served."""
    return encoder


def channels_last(encoder: Encoder, images: Tensor) -> Form:
    """Convolutions with channels innermost in memory."""
    encoder.to(memory_format=torch.channels_last)
    return lambda batch: encoder(batch.contiguous(memory_format=torch.channels_last))


def bfloat16(encoder: Encoder, images: Tensor) -> Form:
    """Matrix products in bfloat16 by autocast."""

    def run(batch: Tensor) -> Maps:
        with torch.autocast("cpu", torch.bfloat16):
            return encoder(batch)

    return run


def int8(encoder: Encoder, images: Tensor) -> Form:
    """Linear layers with weights and, on the fly, activations in 8 bits."""
    return torch.ao.quantization.quantize_dynamic(encoder, {nn.Linear}, torch.qint8)


def compiled(encoder: Encoder, images: Tensor) -> Form:
    """``torch.compile`` with its default back end; getting ready holds the compiler's time."""
    return torch.compile(encoder)


def onnx(encoder: Encoder, images: Tensor) -> Form:
    """ONNX Runtime on one graph for this batch size."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"not installed: {', '.join(missing)}")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoder.onnx"
        torch.onnx.export(encoder, (images,), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(batch: Tensor) -> Maps:
        fine, middle, coarse = (torch.from_numpy(found) for found in session.run(None, {name: batch.numpy()}))
        return fine, middle, coarse

    return run


FORMS: Mapping[str, Callable[[Encoder, Tensor], Form]] = {
    form.__name__: form for form in (plain, channels_last, bfloat16, int8, compiled, onnx)
}


def difference(found: Maps, reference: Maps) -> float:
    """Largest difference of any map, relative to the largest feature of that map."""
    return max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(found, reference, strict=True))


def model_images(options: argparse.Namespace, side: int) -> Tensor:
    """Slices of a generated CT as the model takes them: (N, 3, side, side) in [-1, 1]."""
    volume = generated_volume((side, side, max(options.batches)), options.seed)
    planes = torch.from_numpy(np.ascontiguousarray(volume.array.transpose(2, 1, 0), dtype=np.float32))
    return ((planes + 160) / 200 - 1).clamp(-1, 1)[:, None].expand(-1, 3, -1, -1).contiguous()


def measured(options: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """A row for every form and batch size that runs here, and why the others do not."""
    encoder = built_encoder(options)
    images = model_images(options, encoder.segmenter.config.image_size)
    reference = encoder(images[:1])
    ready: dict[tuple[str, int], tuple[Form, float, float]] = {}
    refused: dict[str, str] = {}
    for name in tqdm(dict.fromkeys(("plain", *options.forms)), desc="getting ready", unit="form"):
        for batch in options.batches:
            part, started = images[:batch], time.perf_counter()
            try:
                form = FORMS[name](built_encoder(options), part)
                found = form(part)
            except Exception as error:  # noqa: BLE001 - a form may fail in any way; the reason is printed
                refused[name] = (str(error) or type(error).__name__).splitlines()[0]
                break
            apart = difference((found[0][:1], found[1][:1], found[2][:1]), reference)
            ready[name, batch] = form, time.perf_counter() - started, apart
    seconds: dict[tuple[str, int], list[tuple[float, float]]] = {key: [] for key in ready}
    for _ in tqdm(range(options.repeats), desc="timing", unit="turn"):
        for (name, batch), (form, _, _) in ready.items():
            cpu, wall = time.process_time(), time.perf_counter()
            form(images[:batch])
            seconds[name, batch].append((time.process_time() - cpu, time.perf_counter() - wall))
    rows = []
    for (name, batch), (_, got_ready, apart) in ready.items():
        cpu, wall = np.median(seconds[name, batch], axis=0) / batch
        rows.append(Row(name, batch, got_ready, float(cpu), float(wall), apart))
    base = next(row.cpu_s for row in rows if row.form == "plain")
    return [replace(row, ratio=base / row.cpu_s) for row in rows], refused


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 on success, 2 with a message on a bad input."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")  # quantisation and export warn of themselves
    try:
        with torch.inference_mode():
            rows, refused = measured(options)
    except MedVLError as error:
        print(f"benchmark_encoder: {error}", file=sys.stderr)
        return 2
    print(f"{'form':14} {'batch':>5} {'ready s':>8} {'cpu ms':>8} {'wall ms':>8} {'ratio':>6} {'difference':>10}")
    for row in rows:
        print(
            f"{row.form:14} {row.batch:5} {row.ready_s:8.1f} {1000 * row.cpu_s:8.1f} {1000 * row.wall_s:8.1f} "
            f"{row.ratio:6.2f} {row.difference:10.1e}"
        )
    for name, reason in refused.items():
        print(f"{name:14} not measured: {reason}")
    facts = computing(None)
    print(said(facts))
    if options.json is not None:
        settings = {name: getattr(options, name) for name in ("preset", "image_size", "repeats", "threads", "seed")}
        figures = {"settings": settings, "rows": [asdict(row) for row in rows], "not_measured": refused}
        figures["computing"] = facts
        write_json_atomically(options.json, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
