"""SAM2 behind our three steps: sizes, prompts row by row, memory, and no traces left in the process."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from medvl_sam2.config import SliceConfig
from medvl_sam2.errors import ConfigError
from medvl_sam2.modeling.slice_segmenter import SlicePrompt, SliceSegmenter

SMALL = SliceConfig(
    image_size=64, embed_dim=16, stages=(1, 1, 2, 1), global_att_blocks=(3,), window_spec=(4, 4, 4, 2), d_model=32,
    memory_dim=16, memory_layers=1, memory_ffn=32, decoder_mlp=32, window_pos_embed_size=(4, 4),
)  # fmt: skip


@pytest.fixture(scope="module")
def segmenter() -> SliceSegmenter:
    torch.manual_seed(0)
    return SliceSegmenter(SMALL).eval()


@torch.no_grad()
def test_shapes_follow_the_config(segmenter: SliceSegmenter) -> None:
    features = segmenter.encode(torch.randn(3, 3, 64, 64))
    assert features.fine.shape == (3, 4, 16, 16)
    assert features.middle.shape == (3, 8, 8, 8)
    assert features.coarse.shape == (3, 32, 4, 4)
    output = segmenter.decode(features.rows([0, 0, 2]), SlicePrompt.empty(3))
    assert output.logits.shape == (3, 1, 16, 16)
    assert output.pointer.shape == (3, 32)
    assert ((output.iou >= 0) & (output.iou <= 1)).all()


@torch.no_grad()
def test_a_row_without_language_or_mask_ignores_what_other_rows_have(segmenter: SliceSegmenter) -> None:
    features = segmenter.encode(torch.randn(1, 3, 64, 64)).rows([0, 0])
    mixed = replace(
        SlicePrompt.empty(2),
        mask_logits=torch.randn(2, 1, 16, 16),
        mask_present=torch.tensor([False, True]),
        language=torch.randn(2, 32),
        language_present=torch.tensor([False, True]),
        height=torch.tensor([0.1, 0.9]),
    )
    first = segmenter.decode(features, mixed).logits
    other = replace(mixed, mask_logits=torch.randn(2, 1, 16, 16), language=torch.randn(2, 32))
    second = segmenter.decode(features, other).logits
    assert torch.allclose(first[0], second[0], atol=1e-6)
    assert not torch.allclose(first[1], second[1], atol=1e-3)


@torch.no_grad()
def test_height_matters_only_with_language(segmenter: SliceSegmenter) -> None:
    features = segmenter.encode(torch.randn(1, 3, 64, 64)).rows([0, 0])
    language = torch.randn(1, 32).expand(2, -1)
    spoken = replace(SlicePrompt.empty(2), language=language, height=torch.tensor([0.0, 1.0]))
    low, high = segmenter.decode(features, spoken).logits
    assert not torch.allclose(low, high, atol=1e-4)
    silent = replace(SlicePrompt.empty(2), height=torch.tensor([0.0, 1.0]))
    low, high = segmenter.decode(features, silent).logits
    assert torch.allclose(low, high, atol=1e-6)


@torch.no_grad()
def test_memory_equals_the_packages_own_tracking_step(segmenter: SliceSegmenter) -> None:
    """Our encode/decode/remember/attend against ``SAM2Base.track_step``, gate aside, at the same weights."""
    sam2 = segmenter.sam2
    images = torch.randn(3, 3, 64, 64)
    features = segmenter.encode(images)
    backbone = sam2.forward_image(images)
    _, vision, positions, sizes = sam2._prepare_backbone_features(backbone)
    points = torch.tensor([[[20.0, 30.0]]])
    labels = torch.tensor([[1]], dtype=torch.int32)

    def track(index: int, bank: dict, prompted: bool, reverse: bool) -> dict:
        return sam2.track_step(
            frame_idx=index,
            is_init_cond_frame=prompted,
            current_vision_feats=[v[:, index : index + 1] for v in vision],
            current_vision_pos_embeds=[p[:, index : index + 1] for p in positions],
            feat_sizes=sizes,
            point_inputs={"point_coords": points, "point_labels": labels} if prompted else None,
            mask_inputs=None,
            output_dict=bank,
            num_frames=3,
            track_in_reverse=reverse,
        )

    sam2.multimask_output_in_sam = False  # our tiny model asks for the single mask, as after several clicks
    try:
        for start, following, reverse in ((0, 1, False), (2, 1, True)):
            bank: dict = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
            first = track(start, bank, True, reverse)
            bank["cond_frame_outputs"][start] = first
            second = track(following, bank, False, reverse)

            here = features.rows([start])
            ours = segmenter.decode(here, SlicePrompt(points, labels))
            gate = torch.where(ours.presence[:, None, None, None] > 0, ours.logits, -1024.0)
            assert torch.allclose(gate, first["pred_masks"], atol=1e-5)
            memory = segmenter.remember(here, gate, ours.presence, ours.pointer)
            assert torch.allclose(memory.features, first["maskmem_features"], atol=1e-5)
            there = features.rows([following])
            fused = segmenter.attend(there, following, {start: memory}, {}, 3, reverse)
            output = segmenter.decode(there, SlicePrompt.empty(1), fused)
            gated = torch.where(output.presence[:, None, None, None] > 0, output.logits, -1024.0)
            assert torch.allclose(gated, second["pred_masks"], atol=1e-4)
    finally:
        sam2.multimask_output_in_sam = True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_size": 50}, "multiple of 32"),
        ({"window_spec": (7, 4, 4, 2)}, "must divide"),
        ({"global_att_blocks": (1,)}, "pooling blocks"),
        ({"memory_dim": 12}, "d_model"),
    ],
)
def test_impossible_sizes_say_why(change: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        SliceSegmenter(replace(SMALL, **change))


def test_building_leaves_hydra_as_it_was() -> None:
    code = (
        "from hydra.core.global_hydra import GlobalHydra\n"
        "from medvl_sam2.config import SliceConfig\n"
        "from medvl_sam2.modeling.slice_segmenter import SliceSegmenter\n"
        "assert not GlobalHydra.instance().is_initialized()\n"
        "SliceSegmenter(SliceConfig())\n"
        "assert not GlobalHydra.instance().is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
