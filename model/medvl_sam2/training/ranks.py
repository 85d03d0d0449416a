"""The processes of one training, as ``torchrun`` starts them; a plain start is one process.

Nothing here starts processes: ``torchrun --nproc-per-node N -m medvl_sam2.training.<stage> ...`` does.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

Parallel = Literal["ddp", "fsdp"]

_PATIENCE = timedelta(hours=12)
"""How long processes wait for the first one, which measures alone; ``torchrun`` ends them when one has died."""


@dataclass(frozen=True)
class Ranks:
    """This process's number and how many there are."""

    rank: int = 0
    world: int = 1

    @classmethod
    def join(cls, device: torch.device | str = "cpu") -> Ranks:
        """Meet the other processes that ``torchrun`` started, if it did; a second call returns the same.

        On GPUs every process takes the one of its local number: ``cuda`` means that one from then on.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        if not dist.is_initialized():
            cuda = torch.device(device).type == "cuda"
            if cuda:
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
            atexit.register(_leave)
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """True in the process that writes files and talks."""
        return self.rank == 0

    def mean(self, values: Sequence[float]) -> list[float]:
        """Every value averaged over the processes."""
        return [value / self.world for value in self._summed(values)]

    def from_first(self, value: float) -> float:
        """What the first process has, so that all decide alike."""
        return self._summed([value if self.first else 0.0])[0]

    def _summed(self, values: Sequence[float]) -> list[float]:
        if self.world == 1:
            return list(values)
        sums = torch.tensor(list(values), dtype=torch.float64)  # on the CPU: gloo serves it beside NCCL
        dist.all_reduce(sums)
        return cast(list[float], sums.tolist())

    def wait(self) -> None:
        """Go on when every process is here."""
        if self.world > 1:
            dist.barrier()

    def wrap(self, module: nn.Module, parallel: Parallel, shards: Sequence[nn.Module]) -> nn.Module:
        """The module whose forward pass the processes share. ``shards``: parts that FSDP gathers one at a time."""
        if self.world == 1:
            return module
        if parallel == "ddp":
            return DistributedDataParallel(module, find_unused_parameters=True)
        # FSDP cannot cut a single number; one that is trained it refuses, as processes would part company.
        numbers = {p for p in module.parameters() if p.dim() == 0 and not p.requires_grad}
        for part in shards:
            fully_shard(part, ignored_params=numbers)
        fully_shard(module, ignored_params=numbers)
        return module


def whole(tensor: Tensor) -> Tensor:
    """A tensor as a single process would have it, on the CPU; every process must ask for it."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu().contiguous()


def as_like(full: Tensor, like: Tensor) -> Tensor:
    """``full`` placed and sharded as ``like`` is."""
    if isinstance(like, DTensor):
        return distribute_tensor(full.to(like.device), like.device_mesh, like.placements)
    return full.to(like.device)


class _Gather(torch.autograd.Function):
    """Rows of all processes, with gradients: each process gets the sum of what all make of its rows."""

    @staticmethod
    def forward(ctx: object, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def gathered(rows: Tensor) -> Tensor:
    """Rows (n, ...) of every process as (world * n, ...), in rank order; n must be the same everywhere."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    return cast(Tensor, _Gather.apply(rows))


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
