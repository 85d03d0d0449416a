"""The folder of one finetuning: its settings, figures and what an interrupted one goes on from.

::

    <store>/runs/<time>-<fingerprint>/
        config.json      settings, inputs, versions
        metrics.jsonl    the trainer's log, one line an epoch, and one line a measurement
        finetune_resume.safetensors    the trainer's state
        candidate/       the checkpoint that was trained
        result.json      how it ended; a run without it was interrupted

A run whose inputs have the same fingerprint and that has no ``result.json`` is resumed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from medvl_sam2.files import file_sha256, write_json_atomically
from medvl_sam2.training.finetune_records import FREE_SETTINGS, FinetuneConfig, FinetuneResult
from medvl_sam2.training.finetune_samples import LoadedSample
from medvl_sam2.training.holdout import HoldoutSplit
from medvl_sam2.training.run_settings import plain_settings


class FinetuneRun:
    """Reads and writes one run folder. Everything is on disk before it is relied upon."""

    METRICS = "metrics.jsonl"

    def __init__(self, path: Path) -> None:
        """Use :meth:`open`, which finds or makes the folder."""
        self.path = path

    @classmethod
    def open(cls, store: Path, fingerprint: str, record: Mapping[str, Any]) -> FinetuneRun:
        """The interrupted run of this fingerprint, or a new one with ``record`` as its ``config.json``."""
        runs = Path(store) / "runs"
        runs.mkdir(parents=True, exist_ok=True)
        for path in sorted(runs.glob(f"*-{fingerprint[:12]}"), reverse=True):
            if (path / "config.json").exists() and not (path / "result.json").exists():
                return cls(path)
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        path = next(
            p for n in range(1000) if not (p := runs / f"{stamp}{f'.{n}' if n else ''}-{fingerprint[:12]}").exists()
        )
        path.mkdir()
        versions = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
        write_json_atomically(path / "config.json", {**record, "fingerprint": fingerprint, "versions": versions})
        return cls(path)

    def log(self, **figures: Any) -> None:
        """Append one line to ``metrics.jsonl``."""
        with open(self.path / self.METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")

    def finish(self, result: FinetuneResult) -> None:
        """Write ``result.json`` and drop the state: this run is not resumed any more."""
        plain = dataclasses.asdict(result)
        plain["run"] = result.run.name
        plain["published"] = None if result.published is None else result.published.name
        write_json_atomically(self.path / "result.json", plain)
        for state in self.path.glob("*_resume.safetensors"):
            state.unlink()


def fingerprint(
    config: FinetuneConfig, loaded: Sequence[LoadedSample], split: HoldoutSplit, base_sha256: str
) -> tuple[str, dict[str, Any]]:
    """SHA-256 over everything that decides a run, and the same as a plain record."""
    inputs = [
        {
            "image": one.sample.id,
            "image_sha256": _content(one.sample.image),
            "label_sha256": file_sha256(one.sample.label),
            "names": {str(value): name for value, name in sorted(one.sample.names.items())},
            "side": "holdout" if one.sample.patient in split.holdout else "train",
        }
        for one in sorted(loaded, key=lambda one: one.sample.id)
    ]
    decided = {"config": plain_settings(config, FREE_SETTINGS), "inputs": inputs, "base_sha256": base_sha256}
    mark = hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()
    return mark, {**decided, "config": plain_settings(config)}


def _content(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of a folder (a DICOM series)."""
    if path.is_file():
        return file_sha256(path)
    parts = [f"{member.name}:{file_sha256(member)}" for member in sorted(path.iterdir()) if member.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
