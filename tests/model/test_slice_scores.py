"""Slices scored by text: the loss against its formula, what it is trained on, and what the predictor makes of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from medvl_sam2.geometry import SliceCrop
from medvl_sam2.intensity import SliceIntensity
from medvl_sam2.modeling.slice_scorer import SliceScorer, slice_score_loss
from medvl_sam2.modeling.slice_segmenter import SliceSegmenter
from medvl_sam2.modeling.unified import Grounding
from medvl_sam2.predictor.named import Located, NamedEngine
from medvl_sam2.predictor.placed_segmenter import PlacedSegmenter
from medvl_sam2.predictor.stack import SliceStack
from medvl_sam2.training.samples import LabelledVolume, from_masks
from medvl_sam2.training.slice_batches import TRUTH_SIZE, SliceSampler
from medvl_sam2.types import Modality
from small_model import SMALL_SLICES

SHAPE, SPACING = (14, 40, 30), (5.0, 2.0, 3.0)


def volume() -> LabelledVolume:
    low, high = np.zeros(SHAPE, dtype=bool), np.zeros(SHAPE, dtype=bool)
    low[2:5, 8:20, 6:16] = True
    high[9, 20:30, 10:20] = True
    image = np.where(low | high, 120, 0).astype(np.int16)
    return from_masks(image, SPACING, Modality.CT, {"liver": low, "spleen": high}, "patient")


def test_a_score_is_the_chance_of_all_places_of_a_slice() -> None:
    torch.manual_seed(0)
    scorer = SliceScorer(6)
    tokens, coarse = torch.randn(2, 6), torch.randn(5, 6, 3, 4)
    scores = scorer(tokens, coarse)
    keys = scorer.key(coarse.permute(0, 2, 3, 1))
    alike = torch.einsum("kc,nhwc->knhw", scorer.query(tokens), keys) / 6**0.5
    chances = torch.softmax(alike.reshape(2, -1), dim=1).reshape(2, 5, 12).sum(dim=2)
    assert torch.allclose(torch.softmax(scores, dim=1), chances, atol=1e-6)


def test_the_loss_is_the_cross_entropy_with_the_spread_of_the_area() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0], [0.0, 5.0, 0.0]])
    areas = torch.tensor([[0.0, 1.0, 3.0], [0.0, 0.0, 0.0], [2.0, 0.0, 2.0]])  # the second is nowhere
    loss, right = slice_score_loss(scores, areas)
    logs = torch.log_softmax(scores, dim=1)
    wanted = (-(0.25 * logs[0, 1] + 0.75 * logs[0, 2]) - 0.5 * (logs[2, 0] + logs[2, 2])) / 2
    assert float(loss) == pytest.approx(float(wanted))
    assert right == 0.5
    nothing, unknown = slice_score_loss(scores, torch.zeros(3, 3))
    assert float(nothing) == 0
    assert np.isnan(unknown)


def test_a_sheet_shows_what_is_asked_for() -> None:
    labelled = volume()
    sampler = SliceSampler([labelled], [1.0], 3, 64)
    liver, spleen = labelled.find("liver"), labelled.find("spleen")
    shown = np.zeros(2, dtype=int)
    for _ in range(10):
        sheet = sampler.sheet(0, [liver, None, spleen], 6, 2)
        assert sheet.images.shape == (6, 3, 64, 64)
        assert sheet.truth.shape == (3, 2, TRUTH_SIZE, TRUTH_SIZE)
        z = (sheet.heights * (SHAPE[0] - 1)).round().int()
        assert z.tolist() == sorted(z.tolist())
        for k, target in ((0, liver), (2, spleen)):
            assert target is not None
            area = labelled.areas[target.name][z.numpy()]
            assert torch.allclose(sheet.areas[k], torch.from_numpy(area / (SHAPE[1] * SHAPE[2])).float())
            assert bool((sheet.areas[k] > 0).any())
            there = sheet.truth[k].amax(dim=(1, 2)) > 0.5
            assert torch.equal(there, sheet.areas[k][sheet.shown[k]] > 0)
            shown[k // 2] += int(there.sum())
        assert not sheet.areas[1].any()
        assert not sheet.truth[1].any()
    assert shown.min() >= 8  # of 20


def test_slices_are_scored_on_their_coarse_features_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    segmenter = SliceSegmenter(replace(SMALL_SLICES, slice_scores=True)).eval()
    assert segmenter.scorer is not None
    image = np.random.default_rng(0).normal(0, 99, (7, 40, 30)).astype(np.int16)
    crop = SliceCrop.whole((40, 30), (2.0, 3.0), SMALL_SLICES.image_size, 3.0)
    placed = PlacedSegmenter(segmenter)
    stack = SliceStack(placed, image, SliceIntensity.of(image, Modality.CT), crop)
    tokens, searched = torch.randn(3, SMALL_SLICES.d_model), [0, 2, 4, 6]
    with torch.inference_mode():
        whole = torch.softmax(segmenter.scorer(tokens, stack.features(searched).coarse), dim=1)

        def refuse(self: SliceStack, slices: list[int]) -> None:
            raise AssertionError("fine and middle features of every slice at once")

        monkeypatch.setattr(SliceStack, "features", refuse)
        found = NamedEngine(placed)._chances(stack, searched, tokens)
    assert found is not None
    assert torch.equal(found, whole)


class Chosen(SliceScorer):
    """Sure of one slice."""

    def __init__(self, best: int) -> None:
        super().__init__(SMALL_SLICES.d_model)
        self.best = best

    def forward(self, tokens: Tensor, coarse: Tensor) -> Tensor:
        scores = torch.zeros(len(tokens), len(coarse))
        scores[:, self.best] = 12.0
        return scores


@pytest.mark.parametrize(("best", "start"), [(None, 6), (2, 2), (8, 8), (7, 7)])
def test_the_score_chooses_where_the_predictor_begins(
    best: int | None, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two candidates, the larger one on slices 6 to 8: without scores it is taken, with them what they are sure of."""
    torch.manual_seed(0)
    segmenter = SliceSegmenter(replace(SMALL_SLICES, slice_scores=best is not None)).eval()
    if best is not None:
        segmenter.scorer = Chosen(best)
    placed = PlacedSegmenter(segmenter)
    engine = NamedEngine(placed)
    decoded = torch.full((1, 10, 16, 16), -4.0)
    decoded[0, 2, 2:6, 2:6] = 4.0
    decoded[0, 6:9, 8:13, 8:13] = 4.0
    decoded[0, 6, 8:14, 8:14] = 4.0
    monkeypatch.setattr(engine, "_decode_all", lambda *_: decoded)
    engine.config = replace(engine.config, smooth_slices=0.0)
    begun: list[int] = []
    image = np.zeros((10, 48, 48), dtype=np.int16)
    crop = SliceCrop.whole((48, 48), (2.0, 2.0), SMALL_SLICES.image_size, 3.0)
    stack = SliceStack(placed, image, SliceIntensity.of(image, Modality.CT), crop)
    with torch.inference_mode():
        located = engine.locate(stack, (3.0, 2.0, 2.0), Grounding(torch.zeros(1, SMALL_SLICES.d_model), None))
        assert located.searched == list(range(10))

        def part(located: Located, _: object, request: int, __: Tensor, part: np.ndarray, ___: object) -> object:
            begun.append(engine.start_slice(located, request, part))
            return 1.0, 0.0

        monkeypatch.setattr(engine, "_delineate_part", part)
        engine.delineate(located, (3.0, 2.0, 2.0), 0, least_share=1.0)
    assert begun == [start]
    assert (located.chances is None) == (best is None)
