"""Which structure a mask value means in a label of the datastore."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lib.configs.medvl_sam2 import LABELS
from medvl_sam2.training.finetune_samples import label_names


def stored_names(info: Mapping[str, Any], values: Sequence[int]) -> dict[int, str]:
    """Name of each mask value in use, from the info kept with a label.

    A prediction states ``params.label_names``, a submitted label ``label_info``; without either, the values of
    ``/info/`` hold.

    Raises:
        DataError: ``label_info`` leaves a value without a name.
    """
    used = [int(value) for value in values if value]
    params = info.get("params")
    names = params.get("label_names") if isinstance(params, Mapping) else None
    if isinstance(names, Mapping) and names:
        stated = {int(value): str(name) for name, value in names.items()}
        return {value: stated.get(value, f"label {value}") for value in used}
    listed = info.get("label_info")
    if isinstance(listed, list) and listed:
        return label_names([item for item in listed if isinstance(item, Mapping)], used)
    return {value: LABELS[value - 1] if value <= len(LABELS) else f"label {value}" for value in used}
