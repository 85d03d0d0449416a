"""Low-rank adapters (LoRA, arXiv 2106.09685) around chosen linear layers, with a state dict of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from medvl_sam2.errors import CheckpointError, ConfigError

LANGUAGE_TARGETS: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of a Qwen2 block."""


class LoRALinear(nn.Module):
    """A frozen linear layer plus ``scale * B A``; ``B`` starts at zero, so wrapping changes nothing."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base = base
        self.base.requires_grad_(False)
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    @property
    def delta(self) -> Tensor:
        """The weight update (out, in) this adapter stands for."""
        return self.scale * (self.lora_b @ self.lora_a)

    def forward(self, values: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        update = functional.linear(functional.linear(values, self.lora_a), self.lora_b)
        return functional.linear(values, self.base.weight, self.base.bias) + self.scale * update


def add_lora(
    model: nn.Module, rank: int, alpha: float, targets: Sequence[str] = LANGUAGE_TARGETS
) -> list[nn.Parameter]:
    """Wrap, in place, every ``nn.Linear`` whose last name is in ``targets``; return the adapter parameters.

    Raises :class:`ConfigError` when the rank is not positive, nothing matches, or adapters are already there.
    """
    if rank < 1:
        raise ConfigError(f"LoRA rank {rank} must be at least 1")
    if any(True for _ in _adapters(model)):
        raise ConfigError("the model already has LoRA adapters; merge or remove them first")
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and name in targets
    ]
    if not found:
        raise ConfigError(f"no linear layer is named one of {sorted(targets)}; check the LoRA targets")
    parameters = []
    for parent, name, child in found:
        layer = LoRALinear(child, rank, alpha)
        setattr(parent, name, layer)
        parameters += [layer.lora_a, layer.lora_b]
    return parameters


def merge_lora(model: nn.Module) -> None:
    """Add every adapter to its layer and put the plain layer back; key names become the original ones."""
    _unwrap(model, merge=True)


def remove_lora(model: nn.Module) -> None:
    """Put the plain layers back and forget the adapters."""
    _unwrap(model, merge=False)


def merged_state(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A state dict of a wrapped model as :func:`merge_lora` would leave it; ``scale`` is alpha over rank."""
    merged = {}
    for name, tensor in state.items():
        layer, _, last = name.rpartition(".")
        if last in ("lora_a", "lora_b"):
            continue
        adapter, base, _ = layer.rpartition(".base")
        if base and last == "weight":
            tensor = tensor + scale * (state[f"{adapter}.lora_b"] @ state[f"{adapter}.lora_a"]).to(tensor.dtype)
        merged[f"{adapter}.{last}" if base else name] = tensor
    return merged


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """Adapter tensors only, keyed ``<layer>.lora_a`` / ``<layer>.lora_b``, detached and contiguous."""
    state = {}
    for name, layer in _adapters(model):
        state[f"{name}.lora_a"] = layer.lora_a.detach().clone()
        state[f"{name}.lora_b"] = layer.lora_b.detach().clone()
    return state


def load_lora_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill the adapters of a wrapped model; raises :class:`CheckpointError` when names or shapes differ."""
    own = {f"{name}.{part}": getattr(layer, part) for name, layer in _adapters(model) for part in ("lora_a", "lora_b")}
    if set(own) != set(state):
        odd = sorted(set(own) ^ set(state))[0]
        raise CheckpointError(f"adapter {odd!r} is in only one of model and file; use adapters made for this model")
    for name, parameter in own.items():
        if parameter.shape != state[name].shape:
            raise CheckpointError(
                f"adapter {name!r} has shape {tuple(state[name].shape)}, the model needs {tuple(parameter.shape)}; "
                "use the rank it was trained with"
            )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def _adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def _unwrap(model: nn.Module, merge: bool) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, LoRALinear):
                continue
            if merge:
                with torch.no_grad():
                    child.base.weight += child.delta
            child.base.requires_grad_(True)
            setattr(parent, name, child.base)
