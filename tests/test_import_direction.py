"""Imports point one way: package layers upwards never, package to app never, app and scripts to each other never."""

from __future__ import annotations

from pathlib import Path

import pytest

from import_graph import Import, cycles, edges, imports_of, modules_under, package_violations


def test_package_layers(repository: Path) -> None:
    modules = modules_under(repository / "model" / "medvl_sam2", "medvl_sam2")
    assert "medvl_sam2.types" in modules
    assert package_violations(edges(modules)) == []


def test_package_has_no_import_cycle(repository: Path) -> None:
    assert cycles(edges(modules_under(repository / "model" / "medvl_sam2", "medvl_sam2"))) == []


def test_app_has_no_import_cycle_and_knows_no_script(repository: Path) -> None:
    graph = edges(modules_under(repository / "apps" / "medvl_sam2"))
    scripts = {path.stem for path in (repository / "scripts").iterdir()} - {"lib"}
    assert cycles(graph) == []
    assert _importing(graph, {"scripts", "tests", *scripts}) == []
    below_main = {name: imports for name, imports in graph.items() if name != "main"}
    assert _importing(below_main, {"main"}) == []


def test_scripts_do_not_import_the_app(repository: Path) -> None:
    assert _importing(edges(modules_under(repository / "scripts")), {"apps", "lib", "main", "tests"}) == []


def _importing(graph: dict[str, list[Import]], tops: set[str]) -> list[str]:
    return [f"{name}:{i.line} imports {i.module}" for name, found in graph.items() for i in found if _top(i) in tops]


def _top(wanted: Import) -> str:
    return wanted.module.split(".")[0]


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("medvl_sam2.geometry", "from medvl_sam2.predictor import Predictor", "a higher layer"),
        ("medvl_sam2.modeling.language", "from ..training.clicks import next_click", "a higher layer"),
        ("medvl_sam2.predictor.session", "def f():\n    from medvl_sam2 import evaluation", "a higher layer"),
        ("medvl_sam2.errors", "import importlib\nimportlib.import_module('medvl_sam2.types')", "a higher layer"),
        ("medvl_sam2.training.loop", "import monailabel.interfaces.app", "must not know monailabel"),
        ("medvl_sam2.training.loop", "def f():\n    from fastapi import HTTPException", "must not know fastapi"),
        ("medvl_sam2.modeling.core", "from sam2.build_sam import build_sam2", "only sam2.modeling.*"),
        ("medvl_sam2.modeling.core", "import sam2", "only sam2.modeling.*"),
        ("medvl_sam2.newcomer", "", "has no layer"),
    ],
)
def test_checker_catches(module: str, source: str, complaint: str) -> None:
    violations = package_violations({module: list(imports_of(source, module, is_package=False))})
    assert len(violations) == 1
    assert complaint in violations[0]


def test_checker_accepts_what_is_allowed() -> None:
    source = (
        "import numpy\nfrom sam2.modeling.sam2_base import SAM2Base\nfrom ..types import Mask\nfrom . import losses"
    )
    module = "medvl_sam2.training.loop"
    assert package_violations({module: list(imports_of(source, module, is_package=False))}) == []


def test_checker_catches_a_cycle(tmp_path: Path) -> None:
    (tmp_path / "first.py").write_text("def f():\n    from pack.second import g\n")
    (tmp_path / "second.py").write_text("from pack import third\n")
    (tmp_path / "third.py").write_text("import pack.first\n")
    (tmp_path / "outside.py").write_text("import pack.first\n")
    found = cycles(edges(modules_under(tmp_path, "pack")))
    assert [line.split()[0] for line in found] == ["pack.first", "pack.second", "pack.third"]


def test_relative_imports_of_a_package_file() -> None:
    assert [i.module for i in imports_of("from .loop import run", "medvl_sam2.training", is_package=True)] == [
        "medvl_sam2.training.loop.run"
    ]
