"""A stage of a few numbers, for tests of the loop. As a program it trains in a folder, at a pace.

::

    trainer_toy.py OUT STEPS SECONDS_PER_STEP [ddp|fsdp ...]

Several ways of sharing take an equal part of the steps each, going on from one another's state.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from medvl_sam2.training.stage import Draw, ParameterGroup, Run, Stage
from medvl_sam2.training.trainer import Trainer, TrainerConfig
from medvl_sam2.training.trainer_state import write_tensors

TOY = TrainerConfig(steps=20, schedule="constant", warmup=2, log_steps=3, save_steps=1, seed=5)


class Toy(Stage):
    """Fits a fixed map of random rows through a frozen and two trained layers; ``noise`` is drawn from torch."""

    name, key, outdated = "toy stage", "toy", ("old.pt",)

    def __init__(
        self,
        rows: int = 4,
        width: int = 6,
        broken: Collection[int] = (),
        noise: float = 0.0,
        pace: float = 0.0,
        out: Path | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(0)
        self.rows, self.broken, self.noise, self.pace, self.out = rows, broken, noise, pace, out
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 1))
        self.layers.to(dtype)
        self.layers[0].requires_grad_(False)

    @property
    def module(self) -> nn.Module:
        return self.layers

    def groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup(list(self.layers[1].parameters()), 3e-3, 0.01),
            ParameterGroup(list(self.layers[3].parameters()), 1e-2),
        ]

    def shards(self) -> list[nn.Module]:
        return [self.layers[1]]

    def loss(self, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        time.sleep(self.pace)
        # Row n of a step is the same one, however rows are split into micro-batches.
        first = draw.number * self.rows
        rows = [torch.from_numpy(Draw(draw.seed, draw.step, first + n).rng().normal(size=3)) for n in range(self.rows)]
        inputs = torch.stack(rows).to(self.layers[0].weight.dtype)
        wanted = inputs.prod(dim=1, keepdim=True) + self.noise * torch.rand(1)
        loss = (self.layers(inputs) - wanted).square().mean()
        if draw.step in self.broken:
            loss = loss * float("nan")
        return loss, {"error": loss.item() ** 0.5}

    def saved(self, run: Run) -> None:
        if self.out is not None:
            weights = run.weights()
            if run.ranks.first:
                write_tensors(self.out / "toy.safetensors", weights)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, steps, pace = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    parallels = sys.argv[4:] or ["ddp"]
    for number, parallel in enumerate(parallels, start=1):
        config = TrainerConfig(**{**vars(TOY), "steps": steps * number // len(parallels), "parallel": parallel})
        Trainer(Toy(noise=0.1 if pace else 0.0, pace=pace, out=folder), config, folder).run()
