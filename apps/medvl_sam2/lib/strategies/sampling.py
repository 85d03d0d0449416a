"""Strategies ``uncertainty``, ``random`` and ``first``.

OHIF always asks for ``random``; so that one draws uncertain images more often, where scores exist. ``uncertainty`` and
``random`` hold back for a while what has just gone to somebody, as long as there is another image: two annotators
asking at the same time get two images, and asking again moves on.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.strategy import Strategy

from lib.configs.medvl_sam2 import HOLD_BACK_S
from lib.scoring.score_file import ScoreFile

_DAY_S = 86_400
_UNCERTAIN_WEIGHT = 4.0


class FirstStrategy(Strategy):
    """The first image by name that has no final label."""

    def __init__(self) -> None:
        super().__init__("First unlabeled image by name")

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        images = sorted(datastore.get_unlabeled_images())
        return {"id": images[0]} if images else None


class RandomStrategy(Strategy):
    """A random image without final label; long unseen and uncertain ones are drawn more often."""

    def __init__(self, scores: ScoreFile, generator: random.Random | None = None) -> None:
        super().__init__("Random unlabeled image; more often a long unseen or uncertain one")
        self._scores = scores
        self._random = generator or random.Random()

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        images = _candidates(datastore)
        if not images:
            return None
        scores = self._scores.read()
        weights = []
        for image in images:
            certain = 1.0 + _UNCERTAIN_WEIGHT * (scores[image].value if image in scores else 0.0)
            # At least one second, or two requests within a second leave nothing to draw from.
            weights.append(certain * min(max(_seconds_since_served(image, datastore), 1.0), _DAY_S))
        image = self._random.choices(images, weights=weights)[0]
        return {"id": image, "weight": weights[images.index(image)]}


class UncertaintyStrategy(Strategy):
    """The image without final label that the model is least sure about; random while nothing is scored.

    Scores of the served weights come before those of weights that have been replaced since, which still beat chance.
    """

    def __init__(self, scores: ScoreFile, served_version: Callable[[], str], fallback: Strategy) -> None:
        super().__init__("Most uncertain unlabeled image (run scoring method uncertainty); random without scores")
        self._scores = scores
        self._served_version = served_version
        self._fallback = fallback

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        images = _candidates(datastore)
        scores = self._scores.read()
        scored = [image for image in images if image in scores]
        if not scored:
            chosen: dict[str, Any] | None = self._fallback(request, datastore)
            return chosen
        served = self._served_version()
        current = [image for image in scored if scores[image].model_version == served]
        image = max(current or scored, key=lambda name: (scores[name].value, name))
        return {"id": image, "uncertainty": scores[image].value, "scored_by": scores[image].model_version}


def _candidates(datastore: Datastore) -> list[str]:
    """Unlabeled images by name, without those just served unless there are no others."""
    images = sorted(datastore.get_unlabeled_images())
    waiting = [image for image in images if _seconds_since_served(image, datastore) > HOLD_BACK_S]
    return waiting or images


def _seconds_since_served(image: str, datastore: Datastore) -> float:
    served = datastore.get_image_info(image).get("strategy", {})
    stamps = [entry.get("ts", 0) for entry in served.values() if isinstance(entry, Mapping)]
    return time.time() - max(stamps, default=0)
