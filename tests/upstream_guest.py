"""A pytest plugin for the process that runs MONAI Label's own tests: it puts this project where they expect theirs.

Their tests return at once where PyTorch sees no GPU; they are told there is one, as the server they talk to needs none.
Their endpoint tests start the app in their own process: they get this project's front and ``upstream_aliases``.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

CONTEXT = "tests.unit.endpoints.context"


def pytest_configure(config: pytest.Config) -> None:
    if not os.environ.get("MEDVL_UPSTREAM_IN_PROCESS"):
        return
    import monailabel.app

    import lib.server

    monailabel.app.app = lib.server.app


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        module = item.getparent(pytest.Module)
        assert module is not None
        if hasattr(module.obj, "torch"):
            module.obj.torch = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True))
    if CONTEXT in sys.modules:
        context: Any = sys.modules[CONTEXT]
        create = context.create_client

        def create_client(app: str, studies: str, data: str, conf: dict[str, Any] | None = None) -> Any:
            return create(app, studies, data, {**(conf or {}), "upstream_aliases": "true"})

        context.create_client = create_client
