"""The folder of one finetuning: its settings, figures and a state to resume from.

::

    <store>/runs/<time>-<fingerprint>/
        config.json      settings, inputs, versions
        metrics.jsonl    one line an epoch, one a measurement
        served.json      scores of the served model (not measured twice when resumed)
        state.json       finished epochs and the name of the state folder that belongs to them
        state-<epoch>/   whatever the learner needs to go on
        candidate/       the checkpoint that was trained
        result.json      how it ended; a run without it was interrupted

A run whose inputs have the same fingerprint and that has no ``result.json`` is resumed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from medvl_sam2.errors import DataError
from medvl_sam2.files import file_sha256, write_json_atomically
from medvl_sam2.training.finetune_records import FinetuneConfig, FinetuneResult
from medvl_sam2.training.finetune_samples import LoadedSample
from medvl_sam2.training.holdout import HoldoutSplit
from medvl_sam2.training.measure import Measurement, Naming, Score


@dataclass(frozen=True)
class RunState:
    """Finished epochs, the state folder written after the last of them, and training seconds so far."""

    epoch: int = 0
    folder: str | None = None
    seconds: float = 0.0
    losses: tuple[float, ...] = ()


class FinetuneRun:
    """Reads and writes one run folder. Everything is on disk before it is relied upon."""

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

    @property
    def resumed(self) -> bool:
        """True when an earlier, interrupted attempt left something to go on from."""
        return self.state().epoch > 0

    def state(self) -> RunState:
        """The last complete state; :class:`DataError` when its files are damaged."""
        path = self.path / "state.json"
        if not path.exists():
            return RunState()
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            state = RunState(int(data["epoch"]), data["folder"], float(data["seconds"]), tuple(data["losses"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is damaged ({error!r}); delete the run folder {self.path} to begin anew"
            ) from error
        return state

    def new_state_folder(self, epoch: int) -> Path:
        """An empty folder for the learner's state after ``epoch``; it counts only after :meth:`commit`."""
        folder = self.path / f"state-{epoch}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def commit(self, state: RunState) -> None:
        """Make ``state`` the one to resume from and drop older folders."""
        write_json_atomically(self.path / "state.json", dataclasses.asdict(state))
        for folder in self.path.glob("state-*"):
            if folder.name != state.folder:
                shutil.rmtree(folder, ignore_errors=True)

    def log(self, **figures: Any) -> None:
        """Append one line to ``metrics.jsonl``."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")

    def served(self) -> tuple[Measurement | None, Measurement] | None:
        """Scores of the served model on hold-out and generated cases, if measured before."""
        path = self.path / "served.json"
        if not path.exists():
            return None
        data = json.loads(path.read_text(encoding="utf-8"))
        holdout = None if data["holdout"] is None else _measurement(data["holdout"])
        return holdout, _measurement(data["generated"])

    def keep_served(self, holdout: Measurement | None, generated: Measurement) -> None:
        """Remember the served model's scores."""
        plain = None if holdout is None else dataclasses.asdict(holdout)
        write_json_atomically(self.path / "served.json", {"holdout": plain, "generated": dataclasses.asdict(generated)})

    def finish(self, result: FinetuneResult) -> None:
        """Write ``result.json`` and drop the state: this run is not resumed any more."""
        plain = dataclasses.asdict(result)
        plain["run"] = result.run.name
        plain["published"] = None if result.published is None else result.published.name
        write_json_atomically(self.path / "result.json", plain)
        for folder in self.path.glob("state-*"):
            shutil.rmtree(folder, ignore_errors=True)


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
    record = {"config": dataclasses.asdict(config), "inputs": inputs, "base_sha256": base_sha256}
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest(), record


def _content(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of a folder (a DICOM series)."""
    if path.is_file():
        return file_sha256(path)
    parts = [f"{member.name}:{file_sha256(member)}" for member in sorted(path.iterdir()) if member.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _measurement(data: Mapping[str, Any]) -> Measurement:
    naming = Naming(int(data["naming"]["placed"]), tuple((w[0], w[1], w[2]) for w in data["naming"]["wrong"]))
    return Measurement(tuple(Score(**score) for score in data["scores"]), naming)
