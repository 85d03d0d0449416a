"""The training loop on a module of a few numbers: resuming, accumulating, schedules, stops and broken losses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from medvl_sam2.errors import CheckpointError, ConfigError, TrainingError
from medvl_sam2.modeling.compute import autocast, has_bfloat16_units
from medvl_sam2.modeling.dcformer import DCFormer
from medvl_sam2.modeling.language import build_language_model
from medvl_sam2.training.schedule import rate_factor
from medvl_sam2.training.stage import Draw, ParameterGroup, Run
from medvl_sam2.training.trainer import Trainer, TrainerConfig
from small_model import SMALL
from trainer_toy import TOY, Toy

STATE = "toy_resume.safetensors"


def trained(config: TrainerConfig, out: Path | None = None, **options: Any) -> Toy:
    toy = Toy(**options)
    Trainer(toy, config, out).run()
    return toy


def same(one: Toy, other: Toy) -> bool:
    state = other.module.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in one.module.state_dict().items())


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, repository: Path) -> None:
    whole = trained(replace(TOY, steps=40), tmp_path / "whole", noise=0.1)
    script = repository / "tests" / "trainer_toy.py"
    path = os.pathsep.join([str(repository / "model"), str(repository / "tests")])
    command = [sys.executable, str(script), str(tmp_path / "killed"), "40", "0.05"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    state = tmp_path / "killed" / STATE
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.3 + 0.7 * (time.time() % 1))  # at whatever step this is
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was still at work
    toy = Toy(noise=0.1)
    again = Trainer(toy, replace(TOY, steps=40), tmp_path / "killed")
    assert 0 < again.progress.step < 40
    again.run()
    assert same(whole, toy)
    first, second = (load_file(tmp_path / name / STATE) for name in ("whole", "killed"))
    assert set(first) == set(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "killed")]
    assert logs[0] == logs[1]
    assert [json.loads(line)["step"] for line in logs[0].splitlines()] == [*range(3, 40, 3), 40]


def test_four_small_micro_batches_are_one_large_one() -> None:
    """In double precision: AdamW makes a step of the last bit of a gradient near zero."""
    large = trained(TOY, rows=8, dtype=torch.float64)
    small = trained(replace(TOY, accumulate=4), rows=2, dtype=torch.float64)
    for name, tensor in large.module.state_dict().items():
        assert torch.allclose(tensor, small.module.state_dict()[name], rtol=1e-9, atol=1e-12), name


def test_the_budget_may_be_minutes_and_grow(tmp_path: Path) -> None:
    config = replace(TOY, steps=0, minutes=0.002)
    first = Trainer(Toy(), config, tmp_path)
    first.run()
    assert first.share >= 1
    more = Trainer(Toy(), replace(config, minutes=0.004), tmp_path)
    assert more.progress.step == first.progress.step
    assert more.run().step > first.progress.step
    done = Trainer(Toy(), config, tmp_path)
    assert done.run().step == more.progress.step  # nothing left to do


@pytest.mark.parametrize(
    ("schedule", "step", "share", "warmup", "factor"),
    [
        ("constant", 0, 0.0, 4, 0.25),
        ("constant", 9, 0.9, 4, 1.0),
        ("cosine", 50, 0.5, 4, 0.51),
        ("cosine", 99, 1.0, 0, 0.02),
        ("cosine", 1, 0.0, 4, 0.5),
        ("held_then_cosine", 50, 0.6, 4, 1.0),
        ("held_then_cosine", 80, 0.8, 4, 0.51),
        ("held_then_cosine", 100, 1.0, 4, 0.02),
    ],
)
def test_schedule(schedule: str, step: int, share: float, warmup: int, factor: float) -> None:
    assert rate_factor(schedule, step, share, warmup) == pytest.approx(factor)  # type: ignore[arg-type]


class _StoppedError(Exception):
    pass


def test_a_listener_that_stops_the_run_finds_its_state_saved(tmp_path: Path) -> None:
    config = replace(TOY, save_steps=1000, save_seconds=1000.0)
    lines: list[tuple[float, str]] = []

    def stop_at_five(share: float, line: str) -> None:
        lines.append((share, line))
        if line.startswith("toy stage, step 5 "):
            raise _StoppedError

    with pytest.raises(_StoppedError):
        Trainer(Toy(), config, tmp_path, stop_at_five).run()
    assert lines == [(step / 20, f"toy stage, step {step} of 20") for step in range(1, 6)]
    toy = Toy()
    again = Trainer(toy, config, tmp_path)
    assert again.progress.step == 5
    again.run()
    assert same(trained(config), toy)


def test_validation_at_given_steps_and_at_the_end_changes_nothing(tmp_path: Path) -> None:
    class Validated(Toy):
        def validate(self, run: Run) -> dict[str, float]:
            return {"held_out": run.measure(Draw(1, 10_000))["loss"]}

    stage = Validated(noise=0.1)
    run = Trainer(stage, replace(TOY, steps=10, log_steps=4, validate_steps=4), tmp_path)
    run.run()
    assert [line["step"] for line in run.history if "held_out" in line] == [4, 8, 10]
    assert run.history[-1]["held_out"] == Trainer(stage, TOY).measure(Draw(1, 10_000))["loss"]
    assert run.history[-1]["held_out"] != run.history[0]["held_out"]
    assert same(stage, trained(replace(TOY, steps=10), noise=0.1))


def test_a_result_that_was_not_written_is_written_by_the_next_start(tmp_path: Path) -> None:
    Trainer(Toy(out=tmp_path), TOY, tmp_path).run()
    result = tmp_path / "toy.safetensors"
    wanted = load_file(result)
    result.unlink()  # as if killed between the state and the result
    Trainer(Toy(out=tmp_path), TOY, tmp_path).run()
    found = load_file(result)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_skipped_step_leaves_running_statistics_alone() -> None:
    class Normed(Toy):
        def __init__(self, broken: Collection[int]) -> None:
            super().__init__(broken=broken)
            self.layers.insert(3, nn.BatchNorm1d(6))

        def groups(self) -> list[ParameterGroup]:
            return [ParameterGroup(list(self.layers[1].parameters()), 3e-3)]

        def loss(self, draw: Draw) -> tuple[Tensor, dict[str, float]]:
            norm = self.layers[3]
            assert isinstance(norm, nn.BatchNorm1d)
            loss, figures = super().loss(draw)
            if draw.step in self.broken:
                norm(torch.full((4, 6), torch.nan))
            return loss, figures

    stage = Normed(broken=[2])
    assert Trainer(stage, replace(TOY, steps=4)).run().skipped == 1
    for name, buffer in stage.layers.named_buffers():
        assert torch.isfinite(buffer.float()).all(), name


def test_broken_losses_are_skipped_counted_and_end_the_run_when_they_do_not_end(tmp_path: Path) -> None:
    once = Trainer(Toy(broken=(4, 5)), TOY, tmp_path / "once")
    before = once.run()
    assert before.skipped == 2
    assert before.skipped_on_end == 0
    assert all(bool(torch.isfinite(p).all()) for p in once.stage.module.parameters())
    assert once.history[-1]["skipped"] == 2
    with pytest.raises(TrainingError, match=r"3 steps on end, up to step 10; lower the learning rate"):
        Trainer(Toy(broken=range(7, 20)), replace(TOY, most_skips=3), tmp_path / "for good").run()
    with pytest.raises(TrainingError, match=r"not finite in step 8; lower the learning rate"):
        Trainer(Toy(broken=[7]), replace(TOY, most_skips=1), tmp_path / "first").run()


def test_states_of_other_modules_and_releases_are_refused(tmp_path: Path) -> None:
    trained(TOY, tmp_path)
    with pytest.raises(CheckpointError, match=r"does not fit at .*remove it to begin anew"):
        Trainer(Toy(width=5), TOY, tmp_path)
    (tmp_path / STATE).write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="no training state"):
        Trainer(Toy(), TOY, tmp_path)
    (tmp_path / STATE).unlink()
    (tmp_path / "old.pt").write_bytes(b"pickled")
    with pytest.raises(CheckpointError, match="an earlier release"):
        Trainer(Toy(), TOY, tmp_path)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"steps": 0}, "no budget"), ({"accumulate": 0}, "accumulate 0"), ({"clip": 0.0}, "clip 0.0")],
)
def test_settings_that_cannot_be_meant_are_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        replace(TOY, **wrong)  # type: ignore[arg-type]


def test_every_draw_has_its_own_numbers() -> None:
    draws = [Draw(0, step, number) for step in range(3) for number in range(3)]
    values = {float(draw.rng(purpose).random()) for draw in draws for purpose in range(2)}
    assert len(values) == 18
    assert Draw(1, 2, 3).rng().random() == Draw(1, 2, 3, count=9, share=0.4).rng().random()


@pytest.mark.parametrize(
    ("device", "features", "able"),
    [
        ("cpu", {"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ("cpu", {"avx512_bf16": True}, True),
        ("cpu", {"amx_bf16": True}, True),
        ("cpu", {"architecture": "arm64", "neon": True, "bf16": True}, True),
        ("cpu", {"architecture": "arm64", "neon": True, "bf16": False}, False),
        ("meta", {"avx512_bf16": True}, False),
    ],
)
def test_bfloat16_only_where_it_is_fast(device: str, features: dict[str, object], able: bool) -> None:
    assert has_bfloat16_units(device, features) is able


def test_precision_is_what_was_asked_for() -> None:
    def kind(precision: str) -> torch.dtype:
        with autocast("cpu", precision):  # type: ignore[arg-type]
            return torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype

    assert kind("float32") is torch.float32
    assert kind("bfloat16") is torch.bfloat16
    assert kind("auto") is (torch.bfloat16 if has_bfloat16_units("cpu") else torch.float32)
    assert Trainer(Toy(), replace(TOY, precision="bfloat16")).run().step == TOY.steps


class Seeing(Toy):
    """A volume encoder and a language model, each a part that can be checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"see": DCFormer(SMALL.vision), "speak": build_language_model(SMALL.language)})

    @property
    def module(self) -> nn.Module:
        return self.parts

    def groups(self) -> list[ParameterGroup]:
        return [ParameterGroup(list(self.parts.parameters()), 1e-3)]

    def loss(self, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        views = torch.rand(2, 1, 16, 16, 16)
        ids = torch.arange(12).reshape(2, 6)
        return self.parts["see"](views)[-1].square().mean() + self.parts["speak"](input_ids=ids, labels=ids).loss, {}


def test_checkpointing_changes_memory_but_no_weight_and_no_statistic() -> None:
    states = []
    for switch in (False, True):
        stage = Seeing()
        stage.parts.train()
        Trainer(stage, replace(TOY, steps=2, checkpointing=switch)).run()
        assert stage.parts["speak"].is_activation_checkpointing is switch
        states.append(stage.parts.state_dict())
    assert any("running_mean" in name for name in states[0])
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    with pytest.raises(ConfigError, match="no part of"):
        Trainer(Toy(), replace(TOY, checkpointing=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # mlflow's use of sqlalchemy
def test_figures_reach_tensorboard_and_mlflow(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = replace(TOY, tensorboard=True, mlflow=uri)
    Trainer(Toy(), replace(config, steps=10), tmp_path).run()
    state = (tmp_path / "toy_resume.safetensors").read_bytes()
    Trainer(Toy(), replace(config, steps=15), tmp_path).run()
    (tmp_path / "toy_resume.safetensors").write_bytes(state)  # as if that had been killed before its state was written
    Trainer(Toy(), config, tmp_path).run()  # goes on in the same run
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [point.step for point in board.Scalars("toy stage/loss")] == [3, 6, 9, 10, 12, 15, 18, 20]
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("medvl_sam2")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1
    points = client.get_metric_history(runs[0].info.run_id, "toy_stage.loss")
    assert [point.step for point in points] == [3, 6, 9, 10, 12, 15, 18, 20]
    assert runs[0].data.params["accumulate"] == "1"
    assert runs[0].info.status == "FINISHED"


@pytest.mark.slow
def test_two_processes_train_like_one_by_either_way_of_sharing(tmp_path: Path, repository: Path) -> None:
    """Ten steps of DDP, then ten of FSDP from the state DDP left.

    Gradients of two halves are summed in another order and AdamW divides small numbers, hence the tolerance.
    """
    script = repository / "tests" / "trainer_toy.py"
    path = os.pathsep.join([str(repository / "model"), str(repository / "tests")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(script), str(tmp_path), "20", "0", "ddp", "fsdp"]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True, timeout=240)
    alone = trained(replace(TOY, accumulate=2))
    together = load_file(tmp_path / "toy.safetensors")
    for name, tensor in alone.module.state_dict().items():
        assert torch.allclose(tensor, together[name], rtol=1e-5, atol=1e-5), name
    steps_logged = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps_logged == [3, 6, 9, 10, 12, 15, 18, 20]
