"""Scores of images in a file of their own, beside the published weights.

A scoring run is another process than the server; the datastore's index is the server's. What a run finds goes into
one JSON file per method and study folder, replaced whole, and the strategies read it from there.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from medvl_sam2.files import write_json_atomically


@dataclass(frozen=True)
class Score:
    """One image's score: ``value`` in [0, 1], by which weights, for which file time (ns), and when (s)."""

    value: float
    model_version: str
    stamp: int
    at: int


class ScoreFile:
    """Scores of one method over one study folder or DICOMweb address."""

    def __init__(self, store: Path, studies: str, method: str) -> None:
        place = hashlib.sha256(studies.encode()).hexdigest()[:12]
        self.path = store / "scores" / place / f"{method}.json"

    def read(self) -> dict[str, Score]:
        """Score by image id; empty when none was written yet or the file is damaged."""
        try:
            return {key: Score(**value) for key, value in json.loads(self.path.read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def add(self, image_id: str, value: float, model_version: str, stamp: int) -> None:
        """Add or replace one image's score, so that a stopped run keeps what it did."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock", timeout=60):
            scores = self.read()
            scores[image_id] = Score(value, model_version, stamp, int(time.time()))
            write_json_atomically(self.path, {key: asdict(score) for key, score in scores.items()})
