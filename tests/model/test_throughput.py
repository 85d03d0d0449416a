"""Throughput: rates are what was counted over the time it took, and nothing is told that was not measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from medvl_sam2.training.stage import Draw
from medvl_sam2.training.throughput import Meter, Work, known_peak, peak_of
from medvl_sam2.training.trainer import Trainer
from trainer_toy import TOY, Toy


def same(values: Sequence[float]) -> list[float]:
    return list(values)


def test_rates_are_work_over_time_of_all_processes() -> None:
    meter = Meter("cpu")
    for tokens in (30, 50):
        with meter.micro_batch():
            meter.add(Work(samples=2, tokens=tokens))
        meter.step(0.5)
    found = meter.figures(same, world=3)
    assert found.pop("peak_memory_mib") > 10
    assert found == {"samples_per_s": 12.0, "tokens_per_s": 240.0}
    assert meter.figures(same, world=3) == {}
    meter.step(1.0)
    assert meter.figures(same, world=1) == {}  # a stage that tells no work


@pytest.mark.parametrize(("recomputes", "name"), [(False, "mfu"), (True, "hfu")])
def test_utilisation_is_counted_once_and_only_where_the_peak_is_known(recomputes: bool, name: str) -> None:
    layer, rows = nn.Linear(8, 4, bias=False), torch.ones(16, 8)
    meter = Meter("cpu", peak_tflops=1e-9, recomputes=recomputes)  # 1000 operations a second
    for step in range(4):
        with meter.micro_batch():
            layer(rows).sum().backward()
        meter.add(Work(samples=16))
        meter.step(100.0 if step < 2 else 8.0)
    found = meter.figures(same, world=1)
    assert found["samples_per_s"] == 2.0  # the steps that were counted in are not timed
    assert found[name] == pytest.approx(2 * (2 * 16 * 8 * 4) / (8.0 * 1000))  # forward, and back to the weights
    assert known_peak(torch.device("cpu")) == 0.0


class Told(Toy):
    """The toy stage, telling its work."""

    def loss(self, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        self.work = Work(samples=self.rows)
        return super().loss(draw)


def test_the_log_has_the_rates_of_stages_that_tell_their_work() -> None:
    told, silent = (Trainer(stage, TOY) for stage in (Told(), Toy()))
    told.run()
    silent.run()
    assert all({"samples_per_s", "peak_memory_mib"} <= set(line) for line in told.history)
    assert not any("mfu" in line or "tokens_per_s" in line for line in told.history)
    assert not any("samples_per_s" in line or "peak_memory_mib" in line for line in silent.history)
    known = Trainer(Told(), replace(TOY, peak_tflops=1.0))
    known.run()
    assert all(0 < line["mfu"] < 1 for line in known.history)


def test_a_run_that_goes_on_counts_no_step_again(tmp_path: Path) -> None:
    config = replace(TOY, steps=3, peak_tflops=1.0, log_steps=1)
    first = Trainer(Told(), replace(config, steps=1), tmp_path)
    first.run()
    assert first.progress.flops[1] == TOY.accumulate
    second = Trainer(Told(), config, tmp_path)
    second.run()
    assert second.progress.flops[1] == 2 * TOY.accumulate
    straight = Trainer(Told(), config)
    straight.run()
    assert second.progress.flops == straight.progress.flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", 0.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA A10G", 0.0),
        ("H100 80GB", 989.0),
    ],
)
def test_a_peak_is_that_of_the_very_device(name: str, peak: float) -> None:
    assert peak_of(name) == peak
