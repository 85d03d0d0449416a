"""Tensors that pretend to be on a GPU, to find what would fail on one where there is none.

Inside :func:`pretended_gpu` a tensor moved to ``cuda`` computes on the CPU, but behaves towards others as one on a GPU
does: to mix the two, or to take such a tensor as an array, is an error. What it cannot show is speed, memory, and the
last bits of a result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

GPU = torch.device("cuda", 0)
_MIXES = {"aten._to_copy", "aten.copy_", "aten.index", "aten.index_put_", "aten.index_put", "aten._local_scalar_dense"}
"""What may have one tensor here and one there: copies, and indices from the CPU into a tensor on the GPU."""


class OnGpu(Tensor):
    """Says it is on the first GPU; ``inner`` has the numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGpu:
        found = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device="meta",
        )  # fmt: skip  # torch itself would ask the driver for a tensor that is on a GPU
        found.inner = inner
        return found

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"OnGpu({self.inner})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with PretendedGpu():
            return operation(*args, **(kwargs or {}))


class PretendedGpu(TorchDispatchMode):
    """Runs every operation on what the tensors wrap, after a look at where they say they are."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves, tree = tree_flatten((args, dict(kwargs or {})))
        there = [leaf for leaf in leaves if isinstance(leaf, OnGpu)]
        here = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, OnGpu) and leaf.ndim]
        asked = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
        name = ".".join(str(operation).split(".")[:2])
        indexed = name.startswith("aten.index") and (there and not isinstance(args[0], OnGpu))
        if there and here and (name not in _MIXES or indexed):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu")
        plain = [
            leaf.inner if isinstance(leaf, OnGpu) else torch.device("cpu") if isinstance(leaf, torch.device) else leaf
            for leaf in leaves
        ]
        inner_args, inner_kwargs = tree_unflatten(plain, tree)
        found = operation(*inner_args, **inner_kwargs)
        if operation._schema.name.endswith("_") and isinstance(args[0], Tensor):
            return args[0]
        on_gpu = asked[0].type == "cuda" if asked else bool(there)
        return tree_map_only(Tensor, OnGpu, found) if on_gpu else found


@contextmanager
def pretended_gpu(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where ``tensor.to("cuda")`` and ``torch.zeros(..., device="cuda")`` work."""
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    make = torch.tensor
    patch.setattr(torch, "tensor", lambda data, *, device=None, **kind: make(data, **kind).to(device or "cpu"))
    patch.setattr(torch._C, "_InferenceMode", lambda mode: torch.no_grad())  # refuses views of wrapped parameters
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # or `module.to` only swaps the data of parameters
    try:
        with PretendedGpu():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
