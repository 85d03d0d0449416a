"""Peers: clicks and masks across frames, equal data, what is learned, resumption, and the table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medvl_sam2.errors import Cancelled, ConfigError, DataError, PromptError
from medvl_sam2.evaluation.cases import FIRST_SEED, EvaluationCase
from medvl_sam2.evaluation.controls import GrowControl
from medvl_sam2.evaluation.metrics import dice
from medvl_sam2.evaluation.peers import slice_peers
from medvl_sam2.evaluation.peers.benchmark import Contender, Trained, figures, rows, score, text
from medvl_sam2.evaluation.peers.contenders import NEEDS_GPU, NEEDS_WEIGHTS, Conditions, contenders
from medvl_sam2.evaluation.peers.view import Opened, guidance
from medvl_sam2.evaluation.peers.view_peers import ViewConfig, ViewPeer, ViewStage, turned
from medvl_sam2.evaluation.runner import Plan
from medvl_sam2.modeling.slice_segmenter import SliceSegmenter
from medvl_sam2.predictor import placed_segmenter
from medvl_sam2.training.batch_stream import BatchShape
from medvl_sam2.training.samples import LabelledVolume, from_masks
from medvl_sam2.training.stage import Draw
from medvl_sam2.training.trainer import Trainer, TrainerConfig
from medvl_sam2.training.volume_sources import SourceConfig
from medvl_sam2.types import Modality, Prompt
from medvl_sam2.vocabulary import CLASSES
from small_model import SMALL_SLICES, oblique_volume

MICRO = ViewConfig(grid=(16, 24, 20), filters=(4, 8, 8), sigma=1, most_clicks=2)
PLAN = Plan(("interactive", "semantic"), clicks=2)


class Echo(nn.Module):
    """Says liver where the image is bright and the object where the clicks say so."""

    def forward(self, x: Tensor) -> Tensor:
        classes = x.new_full((1, len(CLASSES), *x.shape[2:]), -1.0)
        classes[:, CLASSES.index("liver")] = x[:, 0] - 0.5
        return torch.cat([classes, x[:, 1:2] - x[:, 2:3] - 0.5], dim=1)


class Blind(Echo):
    """Never finds an object."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(super().forward(x), -1.0)


def echo() -> ViewPeer:
    return ViewPeer("echo", Echo(), replace(MICRO, grid=(32, 36, 40)), clicks=True)


def labelled(known: tuple[str, ...] = ("liver", "spleen")) -> LabelledVolume:
    """A bright liver in an anisotropic volume; of the other classes only ``known`` ones are decided."""
    image = np.random.default_rng(0).normal(20, 8, (12, 30, 22)).astype(np.int16)
    liver = np.zeros(image.shape, dtype=bool)
    liver[3:9, 6:20, 4:15] = True
    image[liver] += 120
    return from_masks(image, (5.0, 2.0, 3.0), Modality.CT, {"liver": liver}, "patient", frozenset(known))


def case(name: str = "one") -> EvaluationCase:
    volume, mask = oblique_volume()
    return EvaluationCase(
        name, name, "drawn", volume, (("liver", mask),), {"liver": mask}, ("liver", "spleen", "lesion"), ()
    )


# --- frames -------------------------------------------------------------------------------------------------------


def test_guidance_follows_clicks_through_a_tilted_grid() -> None:
    volume, _ = oblique_volume()
    opened = Opened.of(volume, MICRO.grid)
    clicks = np.array([[15.0, 20.0, 9.0], [3.0, 5.0, 15.0]])
    cells = opened.cells(clicks)
    channels = guidance(cells, np.array([1, 0]), MICRO.grid, MICRO.sigma)
    assert channels.shape == (2, *MICRO.grid)
    for channel, cell in zip(channels.numpy(), cells, strict=True):
        peak = np.unravel_index(channel.argmax(), channel.shape)
        assert np.abs(np.array(peak) - cell).max() <= 0.5
    # z is Superior (stored j grows so), y Posterior (stored i grows so), x Left (stored k grows to the right).
    shape = np.asarray(volume.geometry.shape)[[1, 0, 2]]
    share = (np.array([20.0, 15.0, 17.0 - 9.0]) + 0.5) / shape
    np.testing.assert_allclose((cells[0] + 0.5) / MICRO.grid, share)
    assert guidance(cells[:0], np.array([], dtype=int), MICRO.grid, 1).abs().max() == 0


def test_masks_return_on_the_stored_grid() -> None:
    volume, truth = oblique_volume()
    peer = echo()
    opened = peer.open(volume)
    named = peer.segment_classes(opened, ["spleen", "liver"])
    assert named.mask.shape == volume.geometry.shape
    assert set(np.unique(named.mask)) == {0, 2}
    overlap = dice(truth, named.mask == 2)
    assert overlap is not None
    assert overlap > 0.85
    click = np.array([[6.0, 27.0, 4.0]])
    clicked = peer.segment_prompt(opened, Prompt(click, np.array([1]))).mask
    assert clicked[6, 27, 4]
    centre = np.argwhere(clicked).mean(axis=0)
    assert np.abs((centre - click[0]) * volume.geometry.spacing).max() < 3.0
    box = np.array([[2.0, 24.0, 2.0], [10.0, 30.0, 6.0]])
    np.testing.assert_array_equal(peer.segment_prompt(opened, Prompt(box=box)).mask, clicked)
    erased = peer.segment_prompt(opened, Prompt(np.vstack([click, click]), np.array([1, 0]))).mask
    assert not erased.any()


def test_what_a_peer_cannot_do_is_refused() -> None:
    volume, _ = oblique_volume()
    peer = ViewPeer("DynUNet", Echo(), MICRO, clicks=False)
    opened = peer.open(volume)
    with pytest.raises(PromptError, match="takes no clicks"):
        peer.segment_prompt(opened, Prompt(np.zeros((1, 3)), np.array([1])))
    for asked in (partial(peer.segment_text, text="liver"), partial(peer.answer, question="?"), peer.report):
        with pytest.raises(PromptError, match="no language"):
            asked(opened)
    with pytest.raises(ConfigError, match="multiples of 4"):
        ViewConfig(grid=(16, 18, 20), filters=(4, 8, 8))


# --- training -----------------------------------------------------------------------------------------------------


def test_classes_a_volume_does_not_decide_are_not_trained() -> None:
    stage = ViewStage(MICRO, [labelled()], [1.0], clicks=False)
    loss, named = stage.loss(Draw(0, 0))
    loss.backward()
    bias = stage.module.get_parameter("output_block.conv.conv.bias")
    assert bias.grad is not None
    assert {CLASSES[int(n)] for n in bias.grad.nonzero()} == {"liver", "spleen"}
    assert set(named) == {"named"}
    with pytest.raises(ConfigError, match="no training volume decides"):
        ViewStage(MICRO, [replace(labelled(), known=frozenset({"femur"}))], [1.0], clicks=False)


def test_turns_are_the_eight_of_a_square_and_the_four_of_an_oblong() -> None:
    square, oblong = torch.arange(18.0).reshape(2, 3, 3), torch.arange(24.0).reshape(2, 3, 4)
    assert len({tuple(turned(square, turn).flatten().tolist()) for turn in range(8)}) == 8
    assert len({tuple(turned(oblong, turn).flatten().tolist()) for turn in range(8)}) == 4
    assert torch.equal(turned(square, 5), torch.rot90(square, 1, dims=(-2, -1)))
    assert all(turned(oblong, turn).shape == oblong.shape for turn in range(8))


def test_clicked_volumes_turn_and_named_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A volume of which only the left half is bright: what the network sees of it, over many draws."""
    volume = labelled()
    image = np.full_like(volume.image, -1000)
    image[:, :, : image.shape[2] // 2] = 1000
    stage = ViewStage(MICRO, [replace(volume, image=image)], [1.0], clicks=True)
    seen: dict[str, set[bool]] = {"clicked": set(), "named": set()}
    monkeypatch.setattr(
        stage, "_forward", lambda image, channels: sides.append(image) or torch.zeros(len(CLASSES) + 1, *MICRO.grid)
    )
    monkeypatch.setattr(stage, "_loss", lambda logits, truth: torch.zeros(()))
    for step in range(40):
        sides: list[Tensor] = []
        kind = next(iter(stage.loss(Draw(3, step))[1]))
        seen[kind].add(bool(sides[0][..., 0].mean() > sides[0][..., -1].mean()))
    assert seen == {"clicked": {True, False}, "named": {True}}


@pytest.mark.slow
def test_deepedit_learns_from_clicks_every_second_time() -> None:
    stage = ViewStage(replace(MICRO, learning_rate=5e-3), [labelled()], [1.0], clicks=True)

    def measured() -> dict[str, list[float]]:
        found: dict[str, list[float]] = {"clicked": [], "named": []}
        for step in range(12):
            for kind, value in stage.loss(Draw(9, step))[1].items():
                found[kind].append(value)
        return found

    before = measured()
    assert 3 <= len(before["clicked"]) <= 9
    Trainer(stage, TrainerConfig(steps=30, warmup=5, log_steps=30, precision="float32")).run()
    after = measured()
    for kind in ("clicked", "named"):
        assert np.mean(after[kind]) < 0.96 * np.mean(before[kind]), kind


@pytest.mark.parametrize("clicks", [False, True])
def test_training_resumes_bit_for_bit(tmp_path: Path, clicks: bool) -> None:
    def stop(share: float, message: str) -> None:
        raise Cancelled("stopped")

    def stage() -> ViewStage:
        return ViewStage(MICRO, [labelled(), labelled(("liver",))], [0.5, 0.5], clicks)

    config = TrainerConfig(steps=6, log_steps=3, precision="float32")
    whole, broken = stage(), stage()
    Trainer(whole, config, tmp_path / "whole").run()
    with pytest.raises(Cancelled):
        Trainer(broken, config, tmp_path / "broken", stop).run()
    again = stage()
    assert Trainer(again, config, tmp_path / "broken").run().step == 6
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(tensor, again.module.state_dict()[name]), name


def test_training_seeds_never_meet_evaluation_seeds() -> None:
    conditions = Conditions(SourceConfig(generated=2), 1.0)
    assert [v.patient for v in conditions.volumes[0]] == ["generated-0", "generated-1"]
    Conditions(SourceConfig(seed=FIRST_SEED - 2, generated=2), 1.0)
    for source in (
        SourceConfig(seed=FIRST_SEED - 1, generated=2),
        SourceConfig(seed=FIRST_SEED),
        SourceConfig(seed=-1),
        SourceConfig(lesion_rich=1),
    ):
        with pytest.raises(DataError, match="evaluated on"):
            Conditions(source, 1.0)


def test_sam2_alone_learns_from_prompts_and_never_from_names() -> None:
    torch.manual_seed(0)
    stage = slice_peers.PromptStage(SliceSegmenter(SMALL_SLICES), [labelled()], [1.0], shape=BatchShape(0, 0, 3, 1, 2))
    for step in range(3):
        loss, shown = stage.loss(Draw(0, step))
        loss.backward()
        assert set(shown) == {"window", "clicked", "tracked"}
    learner = stage.module
    assert learner.segmenter.sam2.sam_mask_decoder.mask_tokens.weight.grad.abs().sum() > 0
    grad = learner.concept_tokens.weight.grad
    assert grad is None or not grad.any()
    volume, _ = oblique_volume()
    predictor = slice_peers.prompted(learner.segmenter, slice_peers.without_scene(SMALL_SLICES), "sam2", assist=False)
    mask = predictor.segment_prompt(predictor.open(volume), Prompt(np.array([[15.0, 20.0, 9.0]]), np.array([1]))).mask
    assert mask.shape == volume.geometry.shape
    assert mask[15, 20, 9]


def test_prompted_peers_compute_as_the_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placed_segmenter, "has_bfloat16_units", lambda _: True)
    monkeypatch.setattr(placed_segmenter, "CPU_BFLOAT16_PIXELS", 1)
    model = slice_peers.without_scene(SMALL_SLICES)
    assert slice_peers.prompted(SliceSegmenter(SMALL_SLICES), model, "own", assist=True).precision == "float32"


# --- scores and table ---------------------------------------------------------------------------------------------


def contender(trained: Trained, skipped: str = "") -> Contender:
    return Contender("echo", "Echo", "repeats", ("interactive", "semantic"), lambda out: trained, skipped)


def grown(out: Path) -> Trained:
    return Trained(None, engines=(GrowControl(),))


def one_case() -> Iterator[EvaluationCase]:
    yield case()


def test_scores_are_kept_and_belong_to_their_weights(tmp_path: Path) -> None:
    trained = Trained(echo(), 90.0, 12, 1_400_000)
    first = score(contender(trained), tmp_path, PLAN, one_case)
    assert {curve.curve.engine for curve in first.curves} == {"Echo"}
    assert {item.structure for item in first.semantic} == {"liver"}

    class Broken(Echo):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("scored again")

    broken: Any = ViewPeer("echo", Broken(), MICRO, clicks=True)
    again = score(contender(replace(trained, predictor=broken)), tmp_path, PLAN, one_case)
    assert again == first
    with pytest.raises(AssertionError, match="scored again"):
        score(contender(replace(trained, predictor=broken, weights="others")), tmp_path, PLAN, one_case)


def test_table_states_minutes_scores_and_reasons(tmp_path: Path) -> None:
    entries = [
        score(contender(Trained(echo(), 90.0, 12, 1_400_000)), tmp_path, PLAN, one_case),
        score(Contender("sam2", "SAM2", "", (), lambda out: Trained(None), NEEDS_GPU), tmp_path, PLAN, one_case),
        score(Contender("controls", "controls", "none", ("interactive",), grown), tmp_path, PLAN, one_case),
    ]
    numbers = figures(entries, "Echo", "none")
    assert {r["setting"]: r["best_control"] for r in numbers["interactive"]} == dict.fromkeys(
        ("box", "clicks"), "grow control"
    )
    assert numbers["semantic"][0]["contender"] == "Echo"
    table = {row[0]: row[1:] for row in rows(numbers, "real")}
    clicks = next(c for c in entries[0].curves if c.curve.setting.value == "clicks")
    assert table["Echo"][:5] == ["1.5", "12", "1.4", *(f"{clicks.curve.after(n):.3f}" for n in (1, 2))]
    assert table["Echo"][-1] == f"{entries[0].semantic[0].dice:.3f}"
    assert set(table["SAM2 (skipped)"]) == {"-"}
    assert table["grow control"][:3] == ["-", "-", "-"]
    assert f"SAM2: skipped, {NEEDS_GPU}" in text(numbers)


def test_the_margin_is_of_the_one_trained_for_equal_time(tmp_path: Path) -> None:
    """The reference scores best and is in no margin, neither as ours nor as a rival."""
    cells = replace(MICRO, grid=(32, 36, 40))
    seeing, blind = Trained(echo()), Trained(ViewPeer("blind", Blind(), cells, clicks=True))
    everyone = [("reference", seeing), ("ours", blind), ("peer", blind)]
    entries = [
        score(Contender(name, name, "", ("interactive",), lambda out, t=trained: t), tmp_path, PLAN, one_case)  # type: ignore[misc]
        for name, trained in everyone
    ]
    numbers = figures(entries, "ours", "reference")
    for record in numbers["interactive"]:
        last = {name: list(engine["steps"].values())[-1]["dice"]["mean"] for name, engine in record["engines"].items()}
        assert last["reference"] > last["ours"] == last["peer"]
        assert (record["margin_of"], record["best_control"]) == ("ours", "peer")
        assert record["margin"]["mean"] == 0
    assert "ours minus the best other one of equal training (peer) +0.000" in text(numbers)
    assert "margin" not in figures(entries[:1], "ours", "reference")["interactive"][0]


def test_contenders_without_their_means_say_so() -> None:
    def reason(**changed: Any) -> str:
        everyone = contenders(replace(Conditions(SourceConfig(), 1.0), **changed))
        assert [c.key for c in everyone if c.skipped] in ([], ["sam2"])
        return next(c.skipped for c in everyone if c.key == "sam2")

    assert reason() == NEEDS_GPU
    assert reason(device="cuda") == NEEDS_WEIGHTS
    assert reason(device="cuda", sam2=Path("slices")) == ""
