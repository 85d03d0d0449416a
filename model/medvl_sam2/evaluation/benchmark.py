"""M3D-Bench's eight tasks and what of them this package scores.

| task | scored by | a run of ours covers it with | with M3D's own figures needs |
|---|---|---|---|
| image-text retrieval | ``retrieval.recalls`` | generated studies, once the model has an image-text head | M3D-Cap |
| report generation | ``TextScorer``, finding F1 | generated reports | M3D-Cap |
| closed-ended VQA | ``same_answer``, ``letter_occurs`` | generated questions | M3D-VQA |
| open-ended VQA | ``TextScorer`` | generated questions | M3D-VQA |
| referring expression comprehension | ``boxes.score_box`` | boxes of the masks sentences give | M3D-Seg |
| referring expression generation | ``TextScorer`` | task ``region``, on request (untrained) | M3D-Seg |
| semantic segmentation | ``dice``, ``relatives.m3d_soft_dice`` | generated and real volumes | M3D-Seg |
| referring expression segmentation | ``dice``, ``relatives.m3d_soft_dice`` | generated and real volumes | M3D-Seg |

The scores are the same functions whatever the data: what cannot be run here is M3D's test split itself. M3D-Cap was
withdrawn from its hub and M3D-VQA asks about its images; M3D-Seg can be had. M3D's further score of reports by a
language model of 72 billion parameters is not covered. :data:`COVERAGE` holds this table for programs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from medvl_sam2.evaluation.boxes import score_box
from medvl_sam2.evaluation.metrics import dice, letter_occurs, match_counts, same_answer
from medvl_sam2.evaluation.relatives import m3d_soft_dice
from medvl_sam2.evaluation.retrieval import recalls
from medvl_sam2.evaluation.text_scores import TextScorer


class BenchTask(StrEnum):
    """The tasks of M3D-Bench (arXiv 2404.00578)."""

    RETRIEVAL = "image-text retrieval"
    REPORT = "report generation"
    CLOSED_VQA = "closed-ended VQA"
    OPEN_VQA = "open-ended VQA"
    COMPREHENSION = "referring expression comprehension"
    GENERATION = "referring expression generation"
    SEMANTIC = "semantic segmentation"
    REFERRING = "referring expression segmentation"


@dataclass(frozen=True)
class Coverage:
    """How a task is scored, the runner's task that runs it, on what, and the data M3D's own figures need."""

    scores: tuple[Callable[..., Any], ...]
    task: str
    here: str
    needs: str

    @property
    def score_names(self) -> str:
        """The functions by name."""
        return ", ".join(score.__name__ for score in self.scores)


COVERAGE: dict[BenchTask, Coverage] = {
    BenchTask.RETRIEVAL: Coverage(
        (recalls,), "retrieval", "generated studies, once the model has an image-text head", "M3D-Cap (withdrawn)"
    ),
    BenchTask.REPORT: Coverage((TextScorer, match_counts), "report", "generated reports", "M3D-Cap (withdrawn)"),
    BenchTask.CLOSED_VQA: Coverage(
        (same_answer, letter_occurs), "vqa", "generated questions", "M3D-VQA and the images of M3D-Cap"
    ),
    BenchTask.OPEN_VQA: Coverage((TextScorer,), "open_vqa", "generated questions", "M3D-VQA and the images of M3D-Cap"),
    BenchTask.COMPREHENSION: Coverage((score_box,), "referring", "boxes of the masks that sentences give", "M3D-Seg"),
    BenchTask.GENERATION: Coverage(
        (TextScorer,), "region", "generated volumes, on request: no weights are trained for it", "M3D-Seg"
    ),
    BenchTask.SEMANTIC: Coverage((dice, m3d_soft_dice), "semantic", "generated and real volumes", "M3D-Seg"),
    BenchTask.REFERRING: Coverage((dice, m3d_soft_dice), "referring", "generated and real volumes", "M3D-Seg"),
}
