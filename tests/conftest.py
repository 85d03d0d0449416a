"""Fixtures every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """Sums in the same order on every machine, and no fight over the cores of a small one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of this checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real volumes beside the checkout (``MEDVL_SHARED_DATA`` names another place); skips where there are none."""
    override = os.environ.get("MEDVL_SHARED_DATA")
    folder = Path(override) if override else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        if override:
            pytest.fail(f"MEDVL_SHARED_DATA={override} is not a folder; point it at the real volumes or unset it")
        pytest.skip("no ../shared/data beside the repository; set MEDVL_SHARED_DATA to run tests on real volumes")
    return folder
