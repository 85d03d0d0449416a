"""How well volumes and reports find one another on held-out records."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from medvl_sam2.errors import DataError
from medvl_sam2.modeling.dcformer import DCFormer
from medvl_sam2.modeling.siglip import SiglipHead
from medvl_sam2.modeling.text_tower import text_batch
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.training.alignment_losses import Pairs, siglip_loss, text_keys
from medvl_sam2.training.alignment_records import AlignmentRecord
from medvl_sam2.training.language_batches import stack_views
from medvl_sam2.training.recall import chance, equal_texts, hits


@torch.no_grad()
def alignment_scores(
    vision: DCFormer, head: SiglipHead, tokenizer: Tokenizer, records: Sequence[AlignmentRecord], batch: int
) -> dict[str, float]:
    """Loss and recall at 1, 5 and 10 over the ``records`` that have a report (its first wording).

    ``loss`` is the mean over consecutive batches of ``batch`` records, whole ones where there are any: it grows with
    the number of texts an image is compared with, so only batches as large as in training compare with training.
    ``image_to_text_r<k>``: share of volumes whose own report is among the k most similar; ``text_to_image_r<k>`` the
    other way round. Generated reports can be word for word equal; then each of them is right, as there is no telling
    them apart. ``chance_r1`` is what an encoder that sees nothing reaches by the same rule.
    """
    told = [record for record in records if record.reports]
    if not told:
        raise DataError("no held-out record has a report; hold out some that do")
    vision.eval()
    head.eval()
    images = torch.cat([head.embed_volumes(vision(stack_views([record], None)[0])) for record in told])
    ids = text_batch(tokenizer, [record.reports[0] for record in told], head.config.max_length)
    texts = head.embed_texts(ids)
    keys = text_keys([record.reports[0] for record in told])
    size = min(batch, len(told))
    losses = []
    for first in range(0, len(told) - size + 1, size):
        rows = slice(first, first + size)
        pairs = Pairs(texts[rows], keys[rows], torch.ones(size, dtype=torch.bool))
        losses.append(float(siglip_loss(images[rows], pairs, pairs, head.t_prime, head.bias)))
    right = equal_texts([record.reports[0] for record in told])
    scores = {"loss": sum(losses) / len(losses), "chance_r1": chance(right, 1)}
    cosines = (images @ texts.T).numpy()
    for name, matrix in (("image_to_text", cosines), ("text_to_image", cosines.T)):
        scores |= {f"{name}_r{k}": float(hits(matrix, right, k).mean()) for k in (1, 5, 10)}
    return scores
