"""Fixtures every test may use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

os.environ["OMP_NUM_THREADS"] = "1"  # also of the programs that tests start: no fight over the cores of a small machine


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole files to each process, whatever ``--dist`` says."""
    from processes import WholeFiles

    return WholeFiles(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """One of several processes takes the long files first; a single one keeps the order."""
    if hasattr(config, "workerinput"):
        from processes import longest_first

        longest_first(items)


@pytest.fixture(scope="module", autouse=True)
def _one_torch_thread() -> None:
    """Sums in the same order on every machine, also in a file after one whose program asked for more threads."""
    import torch  # here: the process that only hands out the tests does without

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
