"""Scoring method ``uncertainty``: how unsure the served weights are about each image."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.scoring import ScoringMethod

from lib.result_writing import http_errors
from lib.runtime import Runtime
from lib.scoring.score_file import ScoreFile
from medvl_sam2.errors import MedVLError

logger = logging.getLogger(__name__)
_CLIENT = "scoring"


class UncertaintyScoring(ScoringMethod):
    """Predictive entropy of the class segmentation, normalised by the predictor for organ size and field of view.

    Request: ``images`` ("unlabeled", the default, or "all"), ``max_images`` (0 for no limit). An image whose score is
    of the served weights and of the same file is not scored again.
    """

    def __init__(self, runtime: Runtime, scores: ScoreFile) -> None:
        super().__init__("Predictive uncertainty of the served weights, read by the strategy of that name")
        self._runtime = runtime
        self._scores = scores

    def info(self) -> dict[str, Any]:
        return {**super().info(), "config": {"images": ["unlabeled", "all"], "max_images": 0}}

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, float]:
        """Score the images; return and store score by image id."""
        with http_errors("Scoring uncertainty"):
            wanted = datastore.list_images() if request.get("images") == "all" else datastore.get_unlabeled_images()
            limit = int(request.get("max_images") or 0)
            images = sorted(wanted)[: limit or None]
            result: dict[str, float] = {}
            for number, image_id in enumerate(images, start=1):
                value = self._score(image_id, datastore)
                if value is not None:
                    result[image_id] = value
                logger.info("uncertainty %d/%d %s: %s", number, len(images), image_id, value)
            return result

    def _score(self, image_id: str, datastore: Datastore) -> float | None:
        """One image's score; None for an image that cannot be read, which must not stop the others."""
        try:
            path = Path(datastore.get_image_uri(image_id))
            stamp = path.stat().st_mtime_ns
            known = self._scores.read().get(image_id)
            if known and known.stamp == stamp and known.model_version == self._runtime.served_version():
                return known.value
            with self._runtime.use(path, _CLIENT, what="uncertainty") as held:
                value = float(held.predictor.uncertainty(held.session))
            self._runtime.forget(path, _CLIENT)
        except (MedVLError, OSError) as error:
            logger.warning("%s cannot be scored: %s", image_id, error)
            return None
        self._scores.add(image_id, value, self._runtime.served_version(), stamp)
        datastore.update_image_info(image_id, {"uncertainty": value})
        return value
