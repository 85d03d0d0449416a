"""Batch inference that also runs without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.batch_infer import BatchInferTask


class BatchTask(BatchInferTask):
    """MONAI Label's own, which divides by the number of GPUs. Every image takes the runtime's lock anyway.

    Two workers, not one: only with several does MONAI Label go on when one image fails.
    """

    def __call__(self, request: dict[str, Any], datastore: Datastore, infer: Callable[..., Any]) -> dict[str, Any]:
        if not torch.cuda.is_available():
            request = {**request, "multi_gpu": False, "device": "cpu"}
        result: dict[str, Any] = super().__call__({**request, "max_workers": 2}, datastore, infer)
        return result
