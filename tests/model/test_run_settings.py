"""A run goes on only with what it was begun with: settings of stage and loop, and the weights that are not trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medvl_sam2.errors import CheckpointError
from medvl_sam2.evaluation.peers.slice_peers import PromptStage
from medvl_sam2.evaluation.peers.view_peers import ViewConfig, ViewStage
from medvl_sam2.modeling.slice_segmenter import SliceSegmenter
from medvl_sam2.training.language_data import CaseStore, JoinedCases, seeds_of
from medvl_sam2.training.run_settings import frozen_digest, plain_settings, require_same, weights_digest
from medvl_sam2.training.samples import LabelledVolume, from_masks, volumes_digest
from medvl_sam2.training.scene_phase import ScenePhase, ScenePhaseConfig
from medvl_sam2.training.trainer import Trainer
from medvl_sam2.types import Modality
from small_model import SMALL, SMALL_SLICES
from trainer_toy import TOY, Toy


class ToyOn(Toy):
    """The toy stage, trained on named cases."""

    def __init__(self, cases: str) -> None:
        super().__init__()
        self._cases = cases

    def settings(self) -> Mapping[str, Any]:
        return {"data": {"cases": self._cases, "count": 3}}


def test_a_run_goes_on_with_more_steps_on_the_same_settings(tmp_path: Path) -> None:
    Trainer(ToyOn("first"), replace(TOY, steps=4), tmp_path).run()
    assert Trainer(ToyOn("first"), replace(TOY, steps=9), tmp_path).progress.step == 4


def test_other_data_is_refused_and_the_state_file_kept(tmp_path: Path) -> None:
    Trainer(ToyOn("first"), replace(TOY, steps=4), tmp_path).run()
    before = (tmp_path / "toy_resume.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"begun with data\.cases 'first', this run has 'second'; restore"):
        Trainer(ToyOn("second"), replace(TOY, steps=9), tmp_path)
    assert (tmp_path / "toy_resume.safetensors").read_bytes() == before


def test_another_seed_of_the_loop_is_refused(tmp_path: Path) -> None:
    Trainer(ToyOn("first"), replace(TOY, steps=4), tmp_path).run()
    with pytest.raises(CheckpointError, match=r"trainer\.seed"):
        Trainer(ToyOn("first"), replace(TOY, steps=9, seed=TOY.seed + 1), tmp_path)


def test_frozen_weights_are_told_apart_and_trained_ones_are_not_looked_at() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    assert frozen_digest(module) == ""
    module[0].requires_grad_(False)
    begun = frozen_digest(module)
    with torch.no_grad():
        module[1].weight.add_(1)
    assert frozen_digest(module) == begun != ""
    with torch.no_grad():
        module[0].weight[0, 0] += 1e-3
    assert frozen_digest(module) != begun


# --- what settings are made of ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    grid: tuple[int, int, int] = (8, 16, 12)


@dataclass(frozen=True)
class Numbers:
    inner: Inner = Inner()
    betas: tuple[float, float] = (0.9, 0.98)
    start: Path | None = None
    minutes: float = 1.0


class Numbered(Toy):
    """The toy stage with settings of every kind of value."""

    def __init__(self, numbers: Numbers) -> None:
        super().__init__()
        self._numbers = numbers

    def settings(self) -> Mapping[str, Any]:
        return plain_settings(self._numbers, ("minutes",))


def test_tuples_paths_and_none_go_on_and_are_told_apart(tmp_path: Path) -> None:
    begun = Numbers(start=Path("weights"))
    Trainer(Numbered(begun), replace(TOY, steps=2), tmp_path / "a").run()
    assert Trainer(Numbered(replace(begun, minutes=9.0)), replace(TOY, steps=3), tmp_path / "a").progress.step == 2
    Trainer(Numbered(Numbers()), replace(TOY, steps=2), tmp_path / "b").run()
    assert Trainer(Numbered(Numbers()), replace(TOY, steps=3), tmp_path / "b").progress.step == 2
    for other, named in (
        (replace(begun, inner=Inner((8, 16, 16))), r"inner\.grid \[8, 16, 12\], this run has \[8, 16, 16\]"),
        (replace(begun, betas=(0.9, 0.99)), "betas"),
        (replace(begun, start=Path("others")), "start 'weights', this run has 'others'"),
        (Numbers(), "start 'weights', this run has None"),
    ):
        with pytest.raises(CheckpointError, match=named):
            Trainer(Numbered(other), replace(TOY, steps=3), tmp_path / "a")


def test_a_field_only_one_release_knows_is_named_as_such() -> None:
    old, new = {"a": 1, "trainer": {"seed": 0}}, {"a": 1, "trainer": {"seed": 0, "clip": 1.0}}
    with pytest.raises(
        CheckpointError, match=r"says nothing of trainer\.clip.*\(1\.0\): it was begun with another rel"
    ):
        require_same(Path("state"), old, new)
    with pytest.raises(CheckpointError, match=r"has trainer\.clip, which this run lacks"):
        require_same(Path("state"), new, old)
    with pytest.raises(CheckpointError, match="begun with a 1, this run has 2"):
        require_same(Path("state"), old, {**new, "a": 2})
    require_same(Path("state"), new, dict(reversed(new.items())))


def test_accumulation_may_make_up_for_processes_only(tmp_path: Path) -> None:
    """On one process the product of both changes with accumulation."""
    Trainer(Toy(), replace(TOY, steps=2, accumulate=2), tmp_path).run()
    with pytest.raises(CheckpointError, match=r"trainer\.micro_batches 2, this run has 1"):
        Trainer(Toy(), replace(TOY, steps=3), tmp_path)


def test_digests_tell_weights_volumes_and_cases_apart(tmp_path: Path) -> None:
    one = {"a": torch.zeros(2, 3), "b": torch.tensor(True)}
    assert weights_digest(one) == weights_digest(dict(reversed(one.items())))
    others = [
        {**one, "a": torch.zeros(3, 2)},
        {**one, "a": torch.zeros(2, 3).half()},
        {**one, "b": torch.tensor(False)},
    ]
    assert len({weights_digest(weights) for weights in (one, *others)}) == 4
    first = labelled()
    changed = [replace(first, patient="other"), replace(first, spacing=(1.0, 1.0, 1.0)), labelled("spleen")]
    digests = {volumes_digest([volume], [1.0]) for volume in (first, *changed)}
    digests |= {volumes_digest([first, first], [0.5, 0.5]), volumes_digest([first, first], [0.4, 0.6])}
    assert len(digests) == 6
    assert volumes_digest([labelled()], [1.0]) in digests
    near, far = CaseStore(range(3), SMALL.vision, tmp_path), CaseStore([9, 7], SMALL.vision, tmp_path)
    assert seeds_of(JoinedCases(near, far)) == (0, 1, 2, 9, 7)
    assert not list(tmp_path.iterdir())  # no case was made for it


def labelled(name: str = "liver") -> LabelledVolume:
    """An anisotropic volume with one object."""
    image = np.random.default_rng(0).normal(20, 8, (12, 30, 22)).astype(np.int16)
    mask = np.zeros(image.shape, dtype=bool)
    mask[3:9, 6:20, 4:15] = True
    return from_masks(image, (5.0, 2.0, 3.0), Modality.CT, {name: mask}, "patient", frozenset({"liver", "spleen"}))


# --- real stages --------------------------------------------------------------------------------------------------


def test_a_phase_is_refused_on_other_volumes_and_rates(tmp_path: Path) -> None:
    config = ScenePhaseConfig(batch=2)

    def trainer(volume: LabelledVolume, config: ScenePhaseConfig) -> Trainer:
        return Trainer(ScenePhase(config, [volume], [1.0], SMALL, tmp_path), replace(TOY, steps=1), tmp_path)

    trainer(labelled(), config).run()
    assert trainer(labelled(), replace(config, minutes=1.0)).progress.step == 1
    with pytest.raises(CheckpointError, match="volumes"):
        trainer(labelled("spleen"), config)
    with pytest.raises(CheckpointError, match=r"learning_rate 0\.003, this run has 0\.1"):
        trainer(labelled(), replace(config, learning_rate=0.1))


def test_peers_know_their_volumes_sizes_and_start() -> None:
    def view(name: str = "liver", sigma: int = 1, seed: int = 0) -> Mapping[str, Any]:
        config = ViewConfig(grid=(16, 24, 20), filters=(4, 8, 8), sigma=sigma)
        return ViewStage(config, [labelled(name)], [1.0], clicks=True, seed=seed).settings()

    def prompted(name: str = "liver", start: int = 0) -> Mapping[str, Any]:
        torch.manual_seed(start)
        return PromptStage(SliceSegmenter(SMALL_SLICES), [labelled(name)], [1.0]).settings()

    assert view() == view()
    assert prompted() == prompted()
    for begun, other, field in (
        (view(), view("spleen"), "volumes"),
        (view(), view(sigma=2), "sigma"),
        (view(), view(seed=1), "start"),
        (prompted(), prompted("spleen"), "volumes"),
        (prompted(), prompted(start=1), "start"),
    ):
        with pytest.raises(CheckpointError, match=f"begun with {field} "):
            require_same(Path("state"), begun, other)
