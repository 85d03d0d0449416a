"""Scene phase: what the drawn cells say, what is left out, and that the phase learns, stops and resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from medvl_sam2.checkpoint import CheckpointMeta, save_checkpoint
from medvl_sam2.config import SceneConfig
from medvl_sam2.errors import CheckpointError
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.unified import UnifiedModel
from medvl_sam2.modeling.vision_language import VisionLanguage
from medvl_sam2.synthesis import generate_case
from medvl_sam2.training.language_heads import cell_loss
from medvl_sam2.training.language_weights import load_language, load_scene
from medvl_sam2.training.samples import LabelledVolume, Target
from medvl_sam2.training.scene_phase import ScenePhase, ScenePhaseConfig, scene_scores
from medvl_sam2.training.scene_samples import SceneSampler, ViewConfig
from medvl_sam2.training.volume_sources import from_case, is_unenhanced
from medvl_sam2.types import Modality
from small_model import SMALL

TINY = replace(SMALL, scene=SceneConfig(lesions=2, width=8, detail=8))
ORGANS = TINY.scene_organs


def two_organs(known: frozenset[str] = frozenset({"liver", "spleen", "lesion"})) -> LabelledVolume:
    """A (32, 32, 32) CT: liver in the lower half with one cyst, spleen in a corner."""
    organs, lesions = np.zeros((32, 32, 32), np.uint8), np.zeros((32, 32, 32), np.uint8)
    organs[:16] = 5
    organs[24:, :8, :8] = 1
    lesions[4:12, 4:12, 4:12] = 1
    image = np.where(organs == 5, 100, -100).astype(np.int16)
    targets = (Target("liver", 0, (5,)), Target("spleen", 0, (1,)), Target("lesion", 1, (1,)))
    return LabelledVolume(image, (3.0, 2.0, 2.0), Modality.CT, (organs, lesions), targets, known, "p", {1: "cyst"})


def channel(cells: Tensor, name: str) -> Tensor:
    return cells[0, ORGANS.index(name)]


def test_cells_tell_organs_lesions_and_kinds_apart() -> None:
    batch = SceneSampler([two_organs()], [1.0], TINY, 0).plain(0)
    cells = batch.cells()
    assert batch.views.shape == (1, 1, 32, 32, 32)
    assert cells.shape == (1, len(ORGANS) + 5, *TINY.scene_grid)
    assert channel(cells, "liver")[:16].min() == 1
    assert channel(cells, "liver")[16:].max() == 0
    assert channel(cells, "spleen").sum() == 8 * 4 * 4
    lesion, cyst, other = cells[0, len(ORGANS)], cells[0, len(ORGANS) + 1], cells[0, len(ORGANS) + 2]
    assert lesion.sum() == 8 * 4 * 4
    assert torch.equal(lesion, cyst)
    assert other.sum() == 0
    stem = batch.stem_cells((8, 8, 8))
    assert float(channel(stem, "liver").sum()) == 4 * 8 * 8
    assert torch.equal(cells[:, :, 4:8], batch.cells(slice(4, 8)))


def test_unlabelled_channels_do_not_train() -> None:
    batch = SceneSampler([two_organs(frozenset({"liver"}))], [1.0], TINY, 0).plain(0)
    assert batch.valid[0].nonzero()[:, 0].tolist() == [ORGANS.index("liver")]
    logits = torch.zeros(1, 2, 4, requires_grad=True)
    valid = torch.tensor([[True, False]])
    cell_loss(logits, torch.ones(1, 2, 4), valid, 4.0).backward()
    assert logits.grad is not None
    assert (logits.grad[0, 0] < 0).all()
    assert (logits.grad[0, 1] == 0).all()


def test_a_lesion_without_a_known_kind_trains_no_kind() -> None:
    volume = replace(two_organs(), lesion_kinds={})
    valid = SceneSampler([volume], [1.0], TINY, 0).plain(0).valid[0]
    assert bool(valid[len(ORGANS)])
    assert not valid[len(ORGANS) + 1 :].any()


def test_drawn_views_and_cells_stay_together() -> None:
    config = ViewConfig(crop_chance=1.0, narrow_chance=0.0, slab_chance=0.0, gain=0.0, bias=0.0, noise=0.0)
    sampler = SceneSampler([two_organs()], [1.0], TINY, 3, config)
    for _ in range(6):
        batch = sampler.batch(1)
        bright = torch.nn.functional.avg_pool3d(batch.views, (1, 2, 2))[0, 0] > 0.3
        liver = channel(batch.cells(), "liver") > 0.5
        assert float((bright != liver).float().mean()) < 0.06  # trilinear against nearest at the border


def test_narrow_views_lie_round_labels_and_keep_their_cells() -> None:
    config = ViewConfig(narrow_chance=1.0, narrow_share=(0.3, 0.5), thick_chance=0.0, gain=0.0, bias=0.0, noise=0.0)
    volume = two_organs()
    sampler = SceneSampler([volume], [1.0], TINY, 5, config)
    whole = float(sampler.plain(0).cells()[0, : len(ORGANS)].sum()) / TINY.scene_grid[0]
    shares = []
    for _ in range(8):
        batch = sampler.batch(1)
        cells = batch.cells()
        shares.append(float(cells[0, : len(ORGANS)].sum()) / TINY.scene_grid[0])
        bright = torch.nn.functional.avg_pool3d(batch.views, (1, 2, 2))[0, 0] > 0.3
        liver = channel(cells, "liver") > 0.5
        assert float((bright != liver).float().mean()) < 0.12  # fewer voxels, so more of them are border
    assert min(shares) > 0, "a narrow view shows what it was drawn round"
    assert np.mean(shares) > 1.2 * whole


def test_contrast_agent_is_only_added_where_there_is_none() -> None:
    aorta = np.zeros((8, 8, 8), dtype=np.uint8)
    aorta[:, 2:5, 2:5] = 11
    targets = (Target("aorta", 0, (11,)),)
    for blood, wanted in ((45, True), (160, False)):
        image = np.where(aorta > 0, blood, -90).astype(np.int16)
        volume = LabelledVolume(image, (3.0, 2.0, 2.0), Modality.CT, (aorta,), targets, frozenset({"aorta"}), "p")
        assert is_unenhanced(volume) is wanted
        assert not is_unenhanced(replace(volume, modality=Modality.MR))
    assert not is_unenhanced(two_organs()), "without an aorta nothing is claimed"


def test_slabs_keep_the_plane_and_a_part_of_the_height() -> None:
    config = ViewConfig(
        narrow_chance=0.0, slab_chance=1.0, slab_share=(0.25, 0.25), thick_chance=0.0, gain=0.0, bias=0.0, noise=0.0
    )
    sampler = SceneSampler([two_organs()], [1.0], TINY, 7, config)
    heights = []
    for _ in range(12):
        cells = sampler.batch(1).cells()
        planes = (channel(cells, "liver") > 0.5).float().mean(dim=(1, 2))
        assert set(planes.tolist()) <= {0.0, 1.0}, "whole planes of a block are liver or none of it"
        assert not (planes[-1] == 1 and channel(cells, "spleen").any()), "a quarter cannot hold both"
        heights.append(float(planes.mean()))
    assert max(heights) == 1 > min(heights) > 0


def test_a_run_starts_from_a_checkpoint(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    Tokenizer.train(["a b c"], 300).save(tokenizer)
    model = UnifiedModel(TINY, Tokenizer.load(tokenizer))
    meta = CheckpointMeta("small", "1", "test weights")
    save_checkpoint(tmp_path / "start", model.state_dict(), TINY, tokenizer, meta)
    config = ScenePhaseConfig(bfloat16=False)
    phase = ScenePhase(config, [two_organs()], [1.0], TINY, tmp_path / "run")
    wanted = model.language.state_dict()
    assert not torch.equal(phase.learner.state_dict()["scene.bridge.weight"], wanted["scene.bridge.weight"])
    phase.start_from(tmp_path / "start")
    for name, tensor in phase.learner.state_dict().items():
        if name.startswith(("vision.", "scene.")):
            torch.testing.assert_close(tensor, wanted[name], atol=2e-3, rtol=1e-3)  # stored as fp16
    fresh = VisionLanguage(TINY, Tokenizer.load(tokenizer))
    load_language(fresh, tmp_path / "start")
    torch.testing.assert_close(
        fresh.state_dict()["lm.lm_head.weight"], wanted["lm.lm_head.weight"], atol=2e-3, rtol=1e-3
    )
    wider = replace(TINY, scene=SceneConfig(lesions=2, width=12, detail=8))
    with pytest.raises(CheckpointError, match="scene"):
        ScenePhase(config, [two_organs()], [1.0], wider, tmp_path / "other").start_from(tmp_path / "start")


def test_phase_learns_stops_and_resumes(tmp_path: Path) -> None:
    volumes = [from_case(generate_case(3)), two_organs()]
    config = ScenePhaseConfig(minutes=0.02, batch=2, rows=2, bfloat16=False, warmup_steps=1)
    first = ScenePhase(config, volumes, [0.5, 0.5], TINY, tmp_path)
    first.run()
    steps = first.progress["steps"]
    saved = load_file(tmp_path / "scene.safetensors")
    again = ScenePhase(replace(config, minutes=0.04), volumes, [0.5, 0.5], TINY, tmp_path)
    again.run()
    assert again.progress["steps"] > steps > 0
    after = load_file(tmp_path / "scene.safetensors")
    assert any(not torch.equal(saved[k], after[k]) for k in saved if k.startswith("scene.fine"))
    scores = scene_scores(again.learner, SceneSampler(volumes[1:], [1.0], TINY, 0))
    assert {"liver", "spleen", "mean", "lesions_found", "lesions_missed", "lesions_invented"} <= set(scores)
    assert scores["lesions_found"] + scores["lesions_missed"] == 1

    model = VisionLanguage(TINY, Tokenizer.train(["a b c"], 300))
    load_scene(model, tmp_path / "scene.safetensors")
    assert torch.equal(model.state_dict()["scene.bridge.weight"], after["scene.bridge.weight"])
    other = VisionLanguage(replace(TINY, scene=SceneConfig(lesions=2, width=12)), Tokenizer.train(["a b c"], 300))
    with pytest.raises(CheckpointError, match="scene"):
        load_scene(other, tmp_path / "scene.safetensors")
