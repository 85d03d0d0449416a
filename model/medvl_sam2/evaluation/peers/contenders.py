"""Who takes part: the shipped weights, our segmenter from a random start, the peers, and the controls."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from medvl_sam2.checkpoint import shipped_checkpoint
from medvl_sam2.converters.load import load_parts
from medvl_sam2.converters.parts import config_from_parts
from medvl_sam2.errors import DataError
from medvl_sam2.evaluation.cases import FIRST_SEED
from medvl_sam2.evaluation.controls import GrowControl, ShapeControl
from medvl_sam2.evaluation.peers import slice_peers
from medvl_sam2.evaluation.peers.benchmark import Contender, Trained
from medvl_sam2.evaluation.peers.view_peers import ViewConfig, ViewPeer, ViewStage
from medvl_sam2.predictor import Predictor
from medvl_sam2.presets import SLICE_PRESETS
from medvl_sam2.training.run_settings import plain_settings, weights_digest
from medvl_sam2.training.samples import LabelledVolume
from medvl_sam2.training.segmentation_phase import SegmentationPhase, SegmentationPhaseConfig
from medvl_sam2.training.stage import Stage
from medvl_sam2.training.trainer import Trainer, TrainerConfig
from medvl_sam2.training.volume_sources import SourceConfig, training_volumes

SHIPPED = "MedVL-SAM2, shipped (trained longer)"
"""A reference, not a rival: it had more minutes and more volumes than anyone trained here."""
OWN = "its segmenter, same minutes"
"""What of ours is compared under equal conditions. It knows no names, so by name nothing of ours is."""
NEEDS_GPU = "needs --gpu and a CUDA device"
NEEDS_WEIGHTS = "needs --sam2 DIR, made by scripts/convert_weights.py --kind sam2.1_tiny"
_MEMORY_SHARE = 0.25
"""Of our own minutes; the shipped segmenter had 23 % of its training in the memory phase."""


@dataclass(frozen=True)
class Conditions:
    """What is equal for everyone who is trained here.

    ``source`` makes the training volumes; its seeds must lie below those of the evaluation. ``sam2``: converted
    ``slices`` of SAM 2.1 tiny, or None. ``sam2_pixels``: side of the slices they see. ``threads`` of torch and the
    ``processor`` decide how far the minutes reach.
    """

    source: SourceConfig
    minutes: float
    device: str = "cpu"
    view: ViewConfig = field(default_factory=ViewConfig)
    sam2: Path | None = None
    sam2_pixels: int = 512
    threads: int = 1
    processor: str = ""

    def __post_init__(self) -> None:
        seeds = (self.source.seed, self.source.seed + self.source.generated)
        if seeds[0] < 0 or seeds[1] > FIRST_SEED or self.source.lesion_rich:
            raise DataError(
                f"training seeds {seeds[0]} to {seeds[1] - 1} must lie from 0 to {FIRST_SEED - 1}, without lesion-rich "
                "cases; the others are evaluated on"
            )

    def shared(self) -> dict[str, Any]:
        """What trainings in one folder must have in common, as JSON values.

        Where cases are cached changes nothing, and SAM2's weights concern that contender alone, whose own settings
        hold a digest of them.
        """
        plain = plain_settings(self, ("sam2", "sam2_pixels"))
        del plain["source"]["cache"]
        return plain

    @cached_property
    def volumes(self) -> tuple[list[LabelledVolume], list[float]]:
        """The training volumes with their weights, made once."""
        return training_volumes(self.source)


def contenders(conditions: Conditions) -> list[Contender]:
    """Everyone, in the order of the table."""
    device = conditions.device
    view = "whole volumes resized to {} x {} x {} cells".format(*conditions.view.grid)
    skipped = NEEDS_GPU if not device.startswith("cuda") else "" if conditions.sam2 else NEEDS_WEIGHTS
    return [
        Contender("shipped", SHIPPED, _shipped_note(), ("interactive", "semantic"), _shipped),
        Contender(
            "own",
            OWN,
            "random start, same cases and minutes; no scene, no language, so nothing by name; clicks and boxes start "
            "from an intensity-grown region as in the shipped predictor",
            ("interactive",),
            lambda out: _own(conditions, out),
        ),
        Contender(
            "deepedit",
            "MONAI DeepEdit",
            f"random start; {view}; it has no box, so a box is its centre as a foreground click",
            ("interactive", "semantic"),
            lambda out: _viewed(conditions, out, clicks=True),
        ),
        Contender(
            "dynunet",
            "MONAI DynUNet",
            f"random start; {view}; takes no clicks",
            ("semantic",),
            lambda out: _viewed(conditions, out, clicks=False),
        ),
        Contender(
            "sam2",
            "SAM2-tiny finetuned alone",
            "published weights; boxes, clicks and memory, without names, scene and intensity-grown regions",
            ("interactive",),
            lambda out: _sam2(conditions, out),
            skipped,
        ),
        Contender(
            "controls",
            "controls",
            "no network; see the model card",
            ("interactive",),
            lambda out: Trained(None, engines=(ShapeControl(), GrowControl())),
        ),
    ]


def size(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def _record() -> tuple[float, int]:
    """Seconds and steps of the shipped weights, all phases, from the record beside them."""
    record = json.loads((shipped_checkpoint() / "training.json").read_text(encoding="utf-8"))
    image = record["segmentation"]
    seconds = image["image_seconds"] + image["memory_seconds"] + record["scene"]["seconds"]
    seconds += record["language"]["seconds"]["training"] + record["joint"]["seconds"]
    return seconds, image["image_steps"] + image["memory_steps"] + record["scene"]["steps"] + record["joint"]["steps"]


def _shipped_note() -> str:
    minutes = _record()[0] / 60
    return (
        f"a reference in no margin: trained {minutes:.0f} minutes before, on more volumes; its steps leave out those "
        "of the language phase"
    )


def _shipped(out: Path) -> Trained:
    predictor = Predictor.load(device="cpu", precision="float32")  # as the others compute
    seconds, steps = _record()
    return Trained(predictor, seconds, steps, size(predictor.model), weights=predictor.meta.sha256)


def _own(conditions: Conditions, out: Path) -> Trained:
    model, minutes = slice_peers.without_scene(), conditions.minutes
    config = SegmentationPhaseConfig(
        image_minutes=minutes * (1 - _MEMORY_SHARE), memory_minutes=minutes * _MEMORY_SHARE, device=conditions.device
    )
    phase = SegmentationPhase(config, *conditions.volumes, model, out)
    phase.run()
    done = phase.progress
    segmenter = slice_peers.trained_segmenter(out, model.slices)
    return Trained(
        slice_peers.prompted(segmenter, model, "own", assist=True),
        done["image_seconds"] + done["memory_seconds"],
        int(done["image_steps"] + done["memory_steps"]),
        size(segmenter),
        weights=weights_digest(segmenter.state_dict()),
    )


def _trained(stage: Stage, conditions: Conditions, out: Path) -> tuple[float, int]:
    """Train to the end of the minutes; seconds and steps."""
    config = TrainerConfig(minutes=conditions.minutes, precision="auto", device=conditions.device)
    done = Trainer(stage, config, out).run()
    return done.seconds, done.step


def _viewed(conditions: Conditions, out: Path, clicks: bool) -> Trained:
    stage = ViewStage(conditions.view, *conditions.volumes, clicks, conditions.device)
    seconds, steps = _trained(stage, conditions, out)
    peer = ViewPeer(stage.name, stage.module, conditions.view, clicks)
    return Trained(peer, seconds, steps, size(stage.module), weights=weights_digest(stage.module.state_dict()))


def _sam2(conditions: Conditions, out: Path) -> Trained:
    assert conditions.sam2 is not None
    base = slice_peers.without_scene(replace(SLICE_PRESETS["sam2.1_tiny"], image_size=conditions.sam2_pixels))
    model = config_from_parts({"slices": conditions.sam2}, base)
    start = slice_peers.empty_model(model)
    load_parts(start, {"slices": conditions.sam2})
    stage = slice_peers.PromptStage(start.segmenter, *conditions.volumes, conditions.device)
    seconds, steps = _trained(stage, conditions, out)
    predictor = slice_peers.prompted(start.segmenter.cpu(), model, "sam2", assist=False)
    weights = weights_digest(start.segmenter.state_dict())
    return Trained(predictor, seconds, steps, size(start.segmenter), weights=weights)
