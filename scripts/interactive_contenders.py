"""Three engines under one SAM 2.1 checkpoint, each answering "these clicks" with a mask file: ours and two peers.

A contender is built in a process of its own (:func:`measure`), so that peak memory is its own and MONAI Label's and
the sam2 package's process-wide settings reach nobody else. Peers run as they are installed: what MONAI Label's task is
given is its own settings (names of checkpoint and configuration, cache folder), on which it finds both files in place
and downloads nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import nibabel as nib
import numpy as np
import torch

from medvl_sam2.checkpoint import CheckpointMeta, shipped_checkpoint
from medvl_sam2.config import ModelConfig
from medvl_sam2.errors import ConfigError
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.unified import UnifiedModel
from medvl_sam2.predictor import Predictor
from medvl_sam2.presets import SLICE_PRESETS
from medvl_sam2.types import Prompt
from medvl_sam2.volume_io import read_volume, write_mask

PRESET = "sam2.1_tiny"
WEIGHTS, CONFIGURATION = "sam2.1_tiny_random.pt", "sam2.1_tiny.yaml"
CT_WINDOW = (-160.0, 240.0)


@dataclass(frozen=True)
class Clicks:
    """Stored voxels ``points`` (n, 3) with ``labels`` (n,): 1 object, 0 background; all that hold, oldest first."""

    points: np.ndarray
    labels: np.ndarray

    def first(self, count: int) -> Clicks:
        """The oldest ``count``."""
        return Clicks(self.points[:count], self.labels[:count])

    def on(self, label: int) -> list[list[int]]:
        """Points of one label as lists of voxel indices."""
        return [[int(v) for v in point] for point in self.points[self.labels == label]]


@dataclass(frozen=True)
class Cost:
    """Seconds by the clock and of processor time; the second is what a shared machine leaves comparable.

    ``decoded``: slices that passed the mask decoder, a slice as often as it did.
    """

    wall: float
    cpu: float
    decoded: int


@dataclass(frozen=True)
class Measured:
    """Costs of a contender on one volume and its peak resident memory."""

    first: Cost
    following: tuple[Cost, ...]
    undo: Cost
    peak_gib: float
    slices: int
    """Slices with any voxel in the last mask."""
    precision: str | None = None
    """Number format of slices; None of a contender that does not choose one."""


class Contender(Protocol):
    """Holds one volume; every answer is a mask written to ``out``."""

    def answer(self, clicks: Clicks, undo: bool, out: Path) -> None:
        """The mask of all ``clicks``; ``undo`` says that the last one was taken back."""
        ...


def fair_weights(folder: Path, image_size: int, seed: int) -> None:
    """Write the checkpoint and the configuration that every contender reads: random weights, SAM 2.1 tiny."""
    state = _our_model(image_size, seed).segmenter.sam2.state_dict()
    torch.save({"model": state}, folder / WEIGHTS)
    folders = getattr(find_spec("sam2"), "submodule_search_locations", None) or []
    source = Path(next(iter(folders), "")) / "configs" / "sam2.1" / "sam2.1_hiera_t.yaml"
    if not source.is_file():
        raise ConfigError(f"the installed sam2 package lacks {source.name}; install sam2==1.1.0")
    text = source.read_text(encoding="utf-8")
    if "image_size: 1024" not in text:
        raise ConfigError(f"{source} states no image_size of 1024; install sam2==1.1.0")
    (folder / CONFIGURATION).write_text(text.replace("image_size: 1024", f"image_size: {image_size}"), encoding="utf-8")


def _our_model(image_size: int, seed: int) -> UnifiedModel:
    """The whole shipped architecture with SAM 2.1 tiny as published for its slices."""
    torch.manual_seed(seed)
    slices = replace(SLICE_PRESETS[PRESET], image_size=image_size)
    config = replace(ModelConfig.tiny(), slices=slices)
    return UnifiedModel(config, Tokenizer.load(shipped_checkpoint() / "tokenizer.json"))


class Ours:
    """The package's :class:`Predictor` as the app drives it."""

    def __init__(self, folder: Path, image: Path, image_size: int, seed: int) -> None:
        model = _our_model(image_size, seed)
        state = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)["model"]
        model.segmenter.sam2.load_state_dict(state, strict=True)
        self.predictor = Predictor(model, CheckpointMeta("random", "0", "random weights, for timing only"))
        self.precision = self.predictor.precision
        self.image, self.session = image, None

    def answer(self, clicks: Clicks, undo: bool, out: Path) -> None:
        """The mask of all clicks so far, through a session that stays open."""
        if self.session is None:
            self.session = self.predictor.open(read_volume(self.image))
        found = self.predictor.segment_prompt(self.session, Prompt(clicks.points, clicks.labels))
        write_mask(out, found.mask, found.geometry)


class OursEverywhere(Ours):
    """The same, but the object is found on every slice, so that the first click is carried through the whole volume.

    How far a later click is carried depends on what it changes; :attr:`Cost.decoded` tells. Only the bias of the object
    score differs; no contender's time for a slice depends on it.
    """

    def __init__(self, folder: Path, image: Path, image_size: int, seed: int) -> None:
        super().__init__(folder, image, image_size, seed)
        score = self.predictor.model.segmenter.sam2.sam_mask_decoder.pred_obj_score_head.layers[-1]
        score.bias.data.fill_(30.0)


class MonaiLabelSam3d:
    """MONAI Label's ``sam_3d`` (``monailabel.sam2.infer.Sam2InferTask``), called as its server calls it."""

    def __init__(self, folder: Path, image: Path, image_size: int, seed: int) -> None:
        os.environ["MONAI_SAM_MODEL_PT"] = WEIGHTS
        os.environ["MONAI_SAM_MODEL_CFG"] = CONFIGURATION
        os.environ["MONAI_LABEL_DATASTORE_CACHE_PATH"] = str(folder / "cache")  # else it empties the user's at import
        from monailabel.interfaces.tasks.infer_v2 import InferType
        from monailabel.sam2.infer import Sam2InferTask

        self.task: Any = Sam2InferTask(model_dir=str(folder), type=InferType.DEEPGROW, dimension=3)
        self.image = image

    def answer(self, clicks: Clicks, undo: bool, out: Path) -> None:
        """The mask of all clicks so far, through one inference request."""
        request = {
            "device": "cpu",
            "image": str(self.image),
            "foreground": clicks.on(1),
            "background": clicks.on(0),
            "reset_state": undo,  # prompts taken off a slice stay in its state otherwise
        }
        written, _ = self.task(request)
        Path(written).replace(out)


class Sam2Video:
    """The sam2 package's video predictor over the slices as frames, from the clicked slices up and then down."""

    def __init__(self, folder: Path, image: Path, image_size: int, seed: int) -> None:
        from hydra import initialize_config_dir
        from hydra.core.global_hydra import GlobalHydra
        from sam2.build_sam import build_sam2_video_predictor

        GlobalHydra.instance().clear()
        initialize_config_dir(str(folder), version_base=None)
        self.predictor: Any = build_sam2_video_predictor(CONFIGURATION, str(folder / WEIGHTS), device="cpu")
        self.image, self.frames = image, folder / "frames"
        self.state: Any = None

    def answer(self, clicks: Clicks, undo: bool, out: Path) -> None:
        """The mask of all clicks so far, through a pass up and a pass down."""
        if self.state is None:
            self._open()
        if undo:
            self.predictor.reset_state(self.state)
        for z in sorted({int(point[2]) for point in clicks.points}):
            here = clicks.points[:, 2] == z
            points = np.ascontiguousarray(clicks.points[here][:, [1, 0]], dtype=np.float32)
            self.predictor.add_new_points_or_box(self.state, z, 1, points, clicks.labels[here].astype(np.int32))
        mask = np.zeros(self.volume.geometry.shape, dtype=np.uint8)
        for reverse in (False, True):
            for z, _, logits in self.predictor.propagate_in_video(self.state, reverse=reverse):
                mask[:, :, z] = (logits[0, 0] > 0).cpu().numpy()
        write_mask(out, mask, self.volume.geometry)

    def _open(self) -> None:
        from PIL import Image

        self.volume = read_volume(self.image)
        self.frames.mkdir()
        low, high = CT_WINDOW
        for z in range(self.volume.geometry.shape[2]):
            grey = np.clip((self.volume.array[:, :, z] - low) / (high - low), 0, 1)
            Image.fromarray((255 * grey).astype(np.uint8)).save(self.frames / f"{z:05}.jpg", quality=95)
        self.state = self.predictor.init_state(str(self.frames))


CONTENDERS: dict[str, type[Ours] | type[MonaiLabelSam3d] | type[Sam2Video]] = {
    "ours": Ours,
    "ours, long": OursEverywhere,
    "sam_3d": MonaiLabelSam3d,
    "sam2 video": Sam2Video,
}


def measure(name: str, folder: Path, image: Path, clicks: Clicks, image_size: int, seed: int, threads: int) -> Measured:
    """Build contender ``name`` and time one click after another, then the last one taken back.

    Meant for a process of its own. ``folder`` is the contender's, with what :func:`fair_weights` wrote.
    """
    torch.set_num_threads(threads)
    contender = CONTENDERS[name](folder, image, image_size, seed)
    out = folder / "mask.nii.gz"
    count = len(clicks.labels)
    costs = [_timed(contender, clicks.first(n), False, out) for n in range(1, count + 1)]
    slices = int(np.asarray(nib.load(out).dataobj).any(axis=(0, 1)).sum())  # random weights may find nothing
    undo = _timed(contender, clicks.first(count - 1), True, out)
    return Measured(costs[0], tuple(costs[1:]), undo, _peak_gib(), slices, getattr(contender, "precision", None))


def _timed(contender: Contender, clicks: Clicks, undo: bool, out: Path) -> Cost:
    with decoded_slices() as rows:
        wall, cpu = time.perf_counter(), time.process_time()
        contender.answer(clicks, undo, out)
        return Cost(time.perf_counter() - wall, time.process_time() - cpu, sum(rows))


@contextmanager
def decoded_slices() -> Iterator[list[int]]:
    """Notes how many slices each call of SAM 2's mask decoder decodes: all contenders' decoders are of that class."""
    from sam2.modeling.sam.mask_decoder import MaskDecoder

    rows: list[int] = []
    decode = MaskDecoder.predict_masks

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        found = decode(self, *args, **options)
        rows.append(len(found[0]))
        return found

    MaskDecoder.predict_masks = noted
    try:
        yield rows
    finally:
        MaskDecoder.predict_masks = decode


def _peak_gib() -> float:
    """Peak resident memory of this process (Linux: not its parent's, which ``getrusage`` may tell)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 2**20
