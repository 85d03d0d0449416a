"""How well volumes and reports find one another on held-out records."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from medvl_sam2.errors import DataError
from medvl_sam2.modeling.siglip import ImageTextModel
from medvl_sam2.training.alignment_records import AlignmentRecord
from medvl_sam2.training.language_batches import stack_views
from medvl_sam2.training.recall import chance, equal_texts, hits


@torch.no_grad()
def retrieval_scores(model: ImageTextModel, records: Sequence[AlignmentRecord]) -> dict[str, float]:
    """Recall at 1, 5 and 10 over the ``records`` that have a report (its first wording).

    ``image_to_text_r<k>``: share of volumes whose own report is among the k most similar; ``text_to_image_r<k>`` the
    other way round. Reports can be word for word equal; then each of them is right, as there is no telling them apart.
    ``chance_r1`` is what an encoder that sees nothing reaches by the same rule. Raises :class:`DataError` when no
    record has a report.
    """
    told = [record for record in records if record.reports]
    if not told:
        raise DataError("no held-out record has a report; hold out some that do")
    model.eval()
    device = model.alignment.t_prime.device
    images = torch.cat([model.embed_views(stack_views([record], None)[0].to(device)) for record in told])
    reports = [record.reports[0] for record in told]
    right = equal_texts(reports)
    scores = {"chance_r1": chance(right, 1)}
    cosines = (images @ model.embed_texts(reports).T).cpu().numpy()
    for name, matrix in (("image_to_text", cosines), ("text_to_image", cosines.T)):
        scores |= {f"{name}_r{k}": float(hits(matrix, right, k).mean()) for k in (1, 5, 10)}
    return scores
