"""Our slice segmenter against one tracking step of the sam2 package's predictor, at the same weights.

Sizes are as published. What the predictors make of such steps is compared in ``test_sam2_predictors``.

Both sides run the same layers in fp32 on one thread, so they differ only where tensors lie differently in memory and
sums are taken in another order. Measured: encoder and prompted slices equal bit by bit, slices decoded from memory
within 7.5e-6 where numbers reach 2 to 4. ``TOLERANCE``, relative to the largest number, leaves tenfold room.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from medvl_sam2.modeling.slice_segmenter import SliceFeatures, SlicePrompt, SliceSegmenter
from medvl_sam2.presets import SLICE_PRESETS
from upstream_sam2 import upstream_sam2

pytestmark = pytest.mark.slow

SIZE = 256
"""Weights do not depend on the image size; this one has every kind of window and takes seconds."""
SLICES = 3
TOLERANCE = 3e-5
ONE_CLICK = (torch.tensor([[[90.0, 120.0]]]), torch.tensor([[1]], dtype=torch.int32))
BOX = (torch.tensor([[[40.0, 50.0], [170.0, 200.0]]]), torch.tensor([[2, 3]], dtype=torch.int32))
TWO_CLICKS = (torch.tensor([[[90.0, 120.0], [30.0, 40.0]]]), torch.tensor([[1, 0]], dtype=torch.int32))


@dataclass(frozen=True)
class Pair:
    """The same weights twice, and the same slices encoded by both."""

    ours: SliceSegmenter
    upstream: Any
    features: SliceFeatures
    backbone: tuple[list[Tensor], list[Tensor], list[tuple[int, int]]]

    def object_is(self, present: bool) -> None:
        """Decide the object score of both, which random weights leave to chance."""
        for sam2 in (self.ours.sam2, self.upstream):
            sam2.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.data.fill_(30.0 if present else -30.0)

    def track(
        self,
        index: int,
        bank: dict[str, dict[int, Any]],
        prompt: tuple[Tensor, Tensor] | None = None,
        reverse: bool = False,
        previous: Tensor | None = None,
    ) -> dict[str, Any]:
        vision, positions, sizes = self.backbone
        return self.upstream.track_step(
            frame_idx=index,
            is_init_cond_frame=prompt is not None,
            current_vision_feats=[v[:, index : index + 1] for v in vision],
            current_vision_pos_embeds=[p[:, index : index + 1] for p in positions],
            feat_sizes=sizes,
            point_inputs=None if prompt is None else {"point_coords": prompt[0], "point_labels": prompt[1]},
            mask_inputs=None,
            output_dict=bank,
            num_frames=SLICES,
            track_in_reverse=reverse,
            prev_sam_mask_logits=previous,
        )


@pytest.fixture(scope="module", params=["sam2.1_tiny", "sam2.1_base_plus"])
def pair(request: pytest.FixtureRequest) -> Pair:
    torch.manual_seed(0)
    upstream = upstream_sam2(request.param, SIZE)
    with torch.no_grad():
        for weight in upstream.parameters():  # some start at zero, which would hide what they do
            weight.add_(torch.randn_like(weight) * 0.02)
        ours = SliceSegmenter(replace(SLICE_PRESETS[request.param], image_size=SIZE)).eval()
        ours.sam2.load_state_dict(upstream.state_dict(), strict=True)
        images = torch.rand(SLICES, 3, SIZE, SIZE)
        mean, spread = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        standardised = (images - mean[:, None, None]) / spread[:, None, None]
        backbone = upstream._prepare_backbone_features(upstream.forward_image(standardised))[1:]
        return Pair(ours, upstream, ours.encode(2 * images - 1), backbone)


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    scale = max(1.0, float(theirs.abs().max()))
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= TOLERANCE * scale


@torch.no_grad()
def test_encoded_slices(pair: Pair) -> None:
    vision, positions, sizes = pair.backbone
    ours = (pair.features.fine, pair.features.middle, pair.features.coarse)
    for mine, theirs, size in zip(ours, vision, sizes, strict=True):
        assert theirs.std() > 0.01
        assert_equal(mine, theirs.permute(1, 2, 0).unflatten(2, size))
    assert_equal(pair.features.position, positions[-1][:, :1].permute(1, 2, 0).unflatten(2, sizes[-1]))


@torch.no_grad()
@pytest.mark.parametrize("prompt", [ONE_CLICK, BOX, TWO_CLICKS], ids=["click", "box", "two clicks"])
def test_a_prompted_slice(pair: Pair, prompt: tuple[Tensor, Tensor]) -> None:
    pair.object_is(present=True)
    empty: dict[str, dict[int, Any]] = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
    theirs = pair.track(1, empty, prompt)
    ours = pair.ours.decode(pair.features.rows([1]), SlicePrompt(*prompt))
    assert theirs["pred_masks"].std() > 0.01
    assert_equal(ours.logits, theirs["pred_masks"])
    assert_equal(ours.pointer, theirs["obj_ptr"])


@torch.no_grad()
def test_a_corrected_slice(pair: Pair) -> None:
    """Two clicks on top of the mask that one click gave."""
    pair.object_is(present=True)
    empty: dict[str, dict[int, Any]] = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
    previous = pair.track(0, empty, ONE_CLICK)["pred_masks"].clamp(-32, 32)
    theirs = pair.track(0, empty, TWO_CLICKS, previous=previous)
    ours = pair.ours.decode(pair.features.rows([0]), SlicePrompt(*TWO_CLICKS, mask_logits=previous))
    assert_equal(ours.logits, theirs["pred_masks"])


@torch.no_grad()
@pytest.mark.parametrize("present", [True, False], ids=["present", "absent"])
@pytest.mark.parametrize("reverse", [False, True], ids=["up", "down"])
def test_slices_decoded_from_memory(pair: Pair, reverse: bool, present: bool) -> None:
    """One click, then the next two slices from the memory of all before them."""
    pair.object_is(present)
    order = list(range(SLICES))[:: -1 if reverse else 1]
    bank: dict[str, dict[int, Any]] = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
    conditioning, tracked = {}, {}
    for step, index in enumerate(order):
        theirs = pair.track(index, bank, ONE_CLICK if step == 0 else None, reverse)
        bank["non_cond_frame_outputs" if step else "cond_frame_outputs"][index] = theirs
        here, prompt, fused = pair.features.rows([index]), SlicePrompt(*ONE_CLICK), None
        if step:
            prompt = SlicePrompt.empty(1)
            fused = pair.ours.attend(here, index, conditioning, tracked, SLICES, reverse)
        ours = pair.ours.decode(here, prompt, fused)
        assert bool((theirs["pred_masks"] == -1024).all()) is not present
        assert_equal(ours.logits, theirs["pred_masks"])
        assert_equal(ours.pointer, theirs["obj_ptr"])
        memory = pair.ours.remember(here, ours.logits, ours.presence, ours.pointer, prompted=step == 0)
        assert_equal(memory.features, theirs["maskmem_features"])
        (tracked if step else conditioning)[index] = memory


@torch.no_grad()
def test_every_departure_changes_the_result_and_can_be_switched(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    here, click, published = pair.features.rows([0]), SlicePrompt(*ONE_CLICK), pair.ours.config
    spoken = replace(SlicePrompt.empty(1), language=torch.randn(1, published.d_model))
    pair.object_is(present=True)
    best, stable = pair.ours.decode(here, click), pair.ours.decode(here, SlicePrompt(*TWO_CLICKS))
    memory = pair.ours.remember(here, best.logits, best.presence, best.pointer, prompted=True)
    bare = replace(published, apply_postprocessing=False)
    monkeypatch.setattr(pair.ours, "config", bare)
    assert torch.equal(pair.ours.decode(here, click).logits, best.logits)
    assert not torch.allclose(pair.ours.decode(here, SlicePrompt(*TWO_CLICKS)).logits, stable.logits, atol=1e-3)
    soft = pair.ours.remember(here, best.logits, best.presence, best.pointer, prompted=True)
    assert not torch.allclose(soft.features, memory.features, atol=1e-3)
    monkeypatch.setattr(pair.ours, "config", replace(bare, multimask=False))
    assert not torch.allclose(pair.ours.decode(here, click).logits, best.logits, atol=1e-3)
    pair.object_is(present=False)
    assert (pair.ours.decode(here, click).logits == -1024).all()
    assert (pair.ours.decode(here, spoken).logits > -1024).all()
    monkeypatch.setattr(pair.ours, "config", replace(published, presence_gate=False))
    assert (pair.ours.decode(here, click).logits > -1024).all()
