"""Programs below ``scripts/`` as modules, so that tests call their ``main``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def load_script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import ``scripts/<name>.py``; it leaves ``sys.modules`` with the test."""
    path = Path(__file__).resolve().parents[1] / "scripts" / f"{name}.py"
    monkeypatch.syspath_prepend(str(path.parent))  # where the program finds its modules when it is run
    spec = importlib.util.spec_from_file_location(f"{name}_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module
