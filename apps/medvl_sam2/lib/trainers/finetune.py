"""The train task ``medvl_sam2``: a request becomes a finetuning, its progress what both clients show.

Runs in a process of its own. MONAI Label stops it by killing it; the next training on the same labels goes on after
the last saved state.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.tasks.train import TrainTask

from lib.configs.medvl_sam2 import AppConfig
from lib.label_names import stored_names
from lib.label_versions import version_tag
from lib.result_writing import http_errors
from lib.retrain_schedule import RetrainSchedule
from medvl_sam2.errors import ConfigError, DataError, MedVLError
from medvl_sam2.files import write_json_atomically
from medvl_sam2.modeling.compute import Precision
from medvl_sam2.training.finetune import FinetuneBackend, run_finetune
from medvl_sam2.training.finetune_records import FinetuneConfig, FinetuneProgress, FinetuneResult, FinetuneSample
from medvl_sam2.training.holdout import patient_key
from medvl_sam2.volume_io import read_mask

logger = logging.getLogger(__name__)

OPTIONS: Mapping[str, str] = {
    "max_epochs": "epochs",
    "steps_per_epoch": "steps_per_epoch",
    "minutes": "minutes",
    "learning_rate": "learning_rate",
    "trust_labels": "trust_labels",
}
"""What annotators may set, by the name clients show, and the setting it is."""

_DEFAULTS = FinetuneConfig()


class FinetuneTask(TrainTask):
    """Finetunes the served weights on the submitted labels and publishes the outcome if it is better."""

    def __init__(self, config: AppConfig, schedule: RetrainSchedule, defaults: FinetuneConfig = _DEFAULTS) -> None:
        super().__init__(
            "Trains on submitted labels; the new weights are served only if they are better on held-out patients"
        )
        self._store = config.store
        self._schedule = schedule
        self._defaults = dataclasses.replace(defaults, device=config.device)
        self._precision = config.precision
        self._stats_path = config.store / "train_stats.json"

    def config(self) -> dict[str, Any]:
        return {shown: getattr(self._defaults, setting) for shown, setting in OPTIONS.items()}

    def stats(self) -> dict[str, Any]:
        """Progress in the keys clients read; empty before the first training."""
        try:
            stats = json.loads(self._stats_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return stats if isinstance(stats, dict) else {}

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Train; returns how it ended, in words and figures."""
        with http_errors("Training"):
            config = finetune_config(request, self._defaults)
            # From here on the labels count as used; those that come later are the next training's.
            self._schedule.training_started()
            samples = datastore_samples(datastore)
            result = run_finetune(
                config,
                samples,
                None,
                self._store,
                self._tell,
                lambda: False,
                load_backend(config.device, self._precision),
            )
        self._finish(result)
        logger.info("%s (%d epochs, %.0f s)", result.reason, result.epochs, result.seconds)
        return {
            "reason": result.reason,
            "published": result.published.name if result.published else None,
            "epochs": result.epochs,
            "gates": [dataclasses.asdict(gate) for gate in result.gates],
            "served": dict(result.served or {}),
            "candidate": dict(result.candidate or {}),
            "skipped": list(result.skipped),
            "seconds": round(result.seconds, 1),
        }

    def _tell(self, progress: FinetuneProgress) -> None:
        logger.info(
            "%s: epoch %d/%d, loss %s, best %s, %.0f s %s",
            progress.stage,
            progress.epoch,
            progress.total_epochs,
            "-" if progress.loss is None else f"{progress.loss:.4f}",
            "-" if progress.best_metric is None else f"{progress.best_metric:.4f}",
            progress.seconds,
            progress.message,
        )
        stats: dict[str, Any] = {
            "epoch": progress.epoch,
            "total_epochs": progress.total_epochs,
            "best_metric": round(progress.best_metric or 0.0, 4),
            "stage": progress.stage,
            "loss": None if progress.loss is None else round(progress.loss, 4),
            "seconds": round(progress.seconds, 1),
            "message": progress.message,
        }
        write_json_atomically(self._stats_path, stats)

    def _finish(self, result: FinetuneResult) -> None:
        """``total_time`` tells clients that a training is over."""
        total = str(timedelta(seconds=round(result.seconds)))
        write_json_atomically(self._stats_path, {**self.stats(), "total_time": total, "message": result.reason})


def load_backend(device: str, precision: Precision) -> FinetuneBackend:
    """The model code to train with."""
    from medvl_sam2.training.finetune_stage import default_backend  # loads the language model's library

    return default_backend(device, precision)


def finetune_config(request: Mapping[str, Any], defaults: FinetuneConfig = _DEFAULTS) -> FinetuneConfig:
    """Settings from a request; keys of other trainers are ignored, numbers may come as text.

    Raises:
        ConfigError: a value cannot be understood.
    """
    changes: dict[str, Any] = {}
    for shown, setting in OPTIONS.items():
        value, default = request.get(shown), getattr(defaults, setting)
        if value is None or value == "":
            continue
        try:
            if isinstance(default, bool):
                changes[setting] = value if isinstance(value, bool) else str(value).strip().lower() in ("true", "1")
            else:
                changes[setting] = type(default)(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{shown} {value!r} must be a number such as {default}") from error
    return dataclasses.replace(defaults, **changes)


def datastore_samples(datastore: Datastore) -> list[FinetuneSample]:
    """Submitted labels with the names of their values; one whose values have no name is left out.

    Raises:
        DataError: no label is left.
    """
    tag = DefaultLabelTag.FINAL.value
    samples: list[FinetuneSample] = []
    reasons: list[str] = []
    for pair in datastore.datalist():  # fetches what a DICOMweb server holds
        image, label = Path(pair["image"]), Path(pair["label"])
        image_id = next(image.name.removesuffix(s) for s in (".nii.gz", ".nii", ".nrrd", "") if image.name.endswith(s))
        info = datastore.get_label_info(image_id, tag)
        if info.get("version"):  # a version never changes; the copy in final does, while a training runs
            label = Path(datastore.get_label_uri(image_id, version_tag(int(info["version"]))))
        try:
            if info.get("Modality") == "SEG" and not info.get("label_info"):
                raise DataError("a DICOM SEG from elsewhere, whose numbers have no names here")
            names = stored_names(info, np.unique(read_mask(label)[0]).tolist())
        except MedVLError as error:
            reasons.append(f"{image_id}: {error}")
            logger.warning("The label of %s cannot be trained on: %s", image_id, error)
            continue
        patient = patient_key(image_id, datastore.get_image_info(image_id))
        samples.append(FinetuneSample(image, label, names, patient, image_id))
    if not samples:
        raise DataError(f"no label to train on ({'; '.join(reasons) or 'none was submitted'}); submit one first")
    return samples
