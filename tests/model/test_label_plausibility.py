"""Labels that do not follow the image are noticed without a model; right ones pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from finetune_fakes import AFFINE, anatomy, image_of
from medvl_sam2.errors import DataError
from medvl_sam2.training.label_plausibility import edge_rank, judge_labels, suspicion
from medvl_sam2.types import Geometry, Modality, Volume


def study(seed: int, spoil: tuple[int, int, int] = (0, 0, 0)) -> tuple[Volume, dict[str, np.ndarray]]:
    labels = anatomy(seed)
    volume = Volume(image_of(labels, seed), Geometry(labels.shape, AFFINE), Modality.CT)
    moved = np.roll(labels, spoil, axis=(0, 1, 2))
    return volume, {str(value): moved == value for value in np.unique(labels) if value}


def test_true_labels_pass_and_displaced_ones_do_not() -> None:
    true = [judge_labels(*study(seed)) for seed in range(4)]
    wrong = [judge_labels(*study(seed, (5, -4, 4))) for seed in range(4)]
    assert suspicion(true) is None
    reason = suspicion(wrong)
    assert reason is not None
    assert "mean rank" in reason


def test_too_few_structures_give_no_verdict() -> None:
    volume, masks = study(0, (5, -4, 4))
    assert suspicion([judge_labels(volume, dict(list(masks.items())[:3]))]) is None
    assert suspicion([]) is None


def test_tiny_and_immovable_structures_are_not_judged() -> None:
    volume, masks = study(0)
    tiny = np.zeros(volume.geometry.shape, dtype=bool)
    tiny[10:12, 10:12, 10:12] = True
    assert edge_rank(volume.array, tiny, volume.geometry.spacing, Modality.CT) is None
    everything = np.ones(volume.geometry.shape, dtype=bool)
    assert edge_rank(volume.array, everything, volume.geometry.spacing, Modality.CT) is None
    assert judge_labels(volume, {"tiny": tiny, "liver": next(iter(masks.values()))}).ranks.keys() == {"liver"}


def test_a_label_of_another_shape_is_refused() -> None:
    volume, _ = study(0)
    with pytest.raises(DataError, match="does not fit"):
        judge_labels(volume, {"liver": np.ones((3, 3, 3), dtype=bool)})


@pytest.mark.shared_data
def test_labels_of_a_real_study_pass_and_their_mirror_image_does_not(shared_data: Path) -> None:
    from medvl_sam2.training.real_cases import TRAINABLE_REAL, load_case

    case = load_case(shared_data, TRAINABLE_REAL[0])
    assert suspicion([judge_labels(case.volume, case.masks)]) is None
    mirrored = {name: mask[:, :, ::-1] for name, mask in case.masks.items()}
    assert suspicion([judge_labels(case.volume, mirrored)]) is not None
