"""Scores of models in a store, kept by what is known to change them.

::

    <store>/scores/<key>.json

The same weights on the same cases are measured once, whichever run asks. Other weights, labels, settings, devices,
number formats, code of this package or versions of :data:`LIBRARIES` are measured anew; with another number of threads
they are not: all 28 scores of the shipped weights on a generated case were the same with one thread and two, in float32
and in bfloat16. The :data:`MOST_KEPT` scores that were used last are kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medvl_sam2.checkpoint import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE
from medvl_sam2.files import file_sha256, package_sha256, write_json_atomically
from medvl_sam2.modeling.compute import processor_name
from medvl_sam2.training.measure import LabelledCase, Measurement, Naming, Score, ServedPredictor

logger = logging.getLogger(__name__)

LIBRARIES = (
    "connected-components-3d",
    "edt",
    "matplotlib",  # contours are filled by it
    "numpy",
    "safetensors",
    "sam2",
    "scipy",
    "tokenizers",
    "torchvision",  # comes with sam2
    "transformers",
)
"""Distributions, beside torch, whose code runs between a volume in memory or a checkpoint and the scores."""
MOST_KEPT = 200
"""Scores of one model on one set of cases each; a finetuning keeps four."""


class KeptScores:
    """Reads and writes the scores of one store."""

    def __init__(self, store: Path) -> None:
        self._folder = store / "scores"

    def known(self, key: str) -> Measurement | None:
        """The scores kept under ``key``; None where there are none, or none that can be read."""
        path = self._folder / f"{key}.json"
        if not path.exists():
            return None
        with suppress(OSError):  # used, so it is kept longer than others
            os.utime(path)
        try:
            return _measurement(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("The scores in %s cannot be read and are measured anew: %r", path, error)
            return None

    def keep(self, key: str, measurement: Measurement) -> None:
        """Keep scores under ``key``; those that were not used for longest go when there are too many."""
        write_json_atomically(self._folder / f"{key}.json", dataclasses.asdict(measurement))
        with suppress(OSError):  # another process does the same
            for old in sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime)[:-MOST_KEPT]:
                old.unlink()


def score_key(
    checkpoint: Path, predictor: ServedPredictor, cases: Sequence[LabelledCase], settings: Mapping[str, int]
) -> str:
    """SHA-256 over what is known to change a measurement of ``checkpoint``, loaded as ``predictor``.

    ``settings``: how it is measured. Cases count by every voxel of image and masks.
    """
    facts: list[Any] = [file_sha256(checkpoint / name) for name in (WEIGHTS_FILE, CONFIG_FILE, TOKENIZER_FILE)]
    # Torch itself says which build it is; its distribution need not.
    facts += [package_sha256(), torch.__version__, [library_version(name) for name in LIBRARIES], dict(settings)]
    facts += [predictor.device, predictor.precision, processor_name(predictor.device)]
    for case in cases:
        volume = case.volume
        content = [
            hashlib.sha256(np.ascontiguousarray(part).data).hexdigest() for part in (volume.array, *_ordered(case))
        ]
        kind = (str(volume.array.dtype), volume.modality.value, volume.geometry.affine.tolist())
        facts.append((case.name, volume.geometry.shape, *kind, sorted(case.masks), content))
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def library_version(name: str) -> str:
    """Version of an installed distribution; empty where it is not known, as of a copy on the module path."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _ordered(case: LabelledCase) -> list[np.ndarray]:
    return [case.masks[name] for name in sorted(case.masks)]


def _measurement(data: Mapping[str, Any]) -> Measurement:
    naming = Naming(int(data["naming"]["placed"]), tuple((w[0], w[1], w[2]) for w in data["naming"]["wrong"]))
    return Measurement(tuple(Score(**score) for score in data["scores"]), naming)
