"""Reads the imports of source files without running them, and judges them by the house's layers."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "medvl_sam2"

LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors"}),
    frozenset({"files", "strokes", "types", "vocabulary"}),
    frozenset({"config", "presets"}),
    frozenset({"dicom_io", "geometry", "intensity", "region_assist", "region_grow", "volume_io"}),
    frozenset({"datasets", "synthesis"}),
    frozenset({"modeling", "checkpoint", "publishing", "partial_weights"}),
    frozenset({"converters"}),
    frozenset({"predictor"}),
    frozenset({"training"}),
    frozenset({"evaluation"}),
)
"""Low to high: a module imports from its own layer or from lower ones."""

FORBIDDEN_IN_PACKAGE = frozenset({"monailabel", "fastapi", "starlette", "uvicorn", "lib", "apps", "main", "scripts"})
"""The package knows nothing of MONAI Label, HTTP, the app or the scripts."""


@dataclass(frozen=True)
class Import:
    """One imported module (dotted, absolute) and the line that asks for it."""

    module: str
    line: int


def imports_of(source: str, module: str, is_package: bool) -> Iterator[Import]:
    """Yield every import of ``source``, also those inside functions; relative ones are made absolute.

    ``from a import b`` yields ``a.b``: whether ``b`` is a module or a name, the layer of ``a.b`` is what counts.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                keep = len(parents) - node.level + (1 if is_package else 0)
                base = ".".join([*parents[:keep], *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in {"importlib.import_module", "import_module", "__import__"}
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield Import(str(node.args[0].value), node.lineno)


def is_python(path: Path) -> bool:
    """Tell whether a file is Python by its name or by its first line."""
    if path.suffix == ".py":
        return True
    if path.suffix or not path.is_file():
        return False
    with path.open("rb") as stream:
        first = stream.readline()
    return first.startswith(b"#!") and b"python" in first


def modules_under(folder: Path, prefix: str = "") -> dict[str, Path]:
    """Map dotted module names to the Python files under ``folder``; a package is named by its folder."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if is_python(path)):
        parts = [*([prefix] if prefix else []), *path.relative_to(folder).with_suffix("").parts]
        if parts[-1] == "__init__":
            parts = parts[:-1]
        found[".".join(parts) or "__init__"] = path
    return found


def edges(modules: Mapping[str, Path]) -> dict[str, list[Import]]:
    """Read the imports of every module."""
    return {
        name: list(imports_of(path.read_text(encoding="utf-8"), name, path.name == "__init__.py"))
        for name, path in modules.items()
    }


def layer_of(module: str) -> int | None:
    """Index into :data:`LAYERS` of a dotted module, None for the package itself and for strangers."""
    parts = module.split(".")
    if parts[0] != PACKAGE or len(parts) < 2:
        return None
    return next((index for index, names in enumerate(LAYERS) if parts[1] in names), None)


def package_violations(graph: Mapping[str, list[Import]]) -> list[str]:
    """Say which imports of the package point upwards, outwards, or into sam2 beyond its modules."""
    found = []
    for module, imports in graph.items():
        own = layer_of(module)
        if own is None and module != PACKAGE:
            found.append(f"{module} has no layer; add it to LAYERS in tests/import_graph.py")
        for wanted in imports:
            top = wanted.module.split(".")[0]
            place = f"{module}:{wanted.line} imports {wanted.module}"
            if top in FORBIDDEN_IN_PACKAGE:
                found.append(f"{place}: the package must not know {top}")
            if top == "sam2" and not wanted.module.startswith("sam2.modeling."):
                found.append(f"{place}: only sam2.modeling.* may be used")
            target = layer_of(wanted.module)
            if own is not None and target is not None and target > own:
                found.append(f"{place}: a higher layer")
    return found


def cycles(graph: Mapping[str, list[Import]]) -> list[str]:
    """Name every module that can reach itself through imports."""
    direct = {name: {owner for i in imports if (owner := _owner(i.module, graph))} for name, imports in graph.items()}
    found = []
    for start in graph:
        reached: set[str] = set()
        frontier = direct[start] - {start}
        while frontier:
            reached |= frontier
            frontier = set().union(*(direct[name] for name in frontier)) - reached
        if start in reached:
            found.append(f"{start} imports itself through {sorted(reached & _importers(start, direct))}")
    return found


def _importers(target: str, direct: Mapping[str, set[str]]) -> set[str]:
    return {name for name, wanted in direct.items() if target in wanted}


def _owner(module: str, graph: Mapping[str, list[Import]]) -> str | None:
    """The file a dotted import lands in: ``a.b.Name`` belongs to ``a.b`` (never to the package ``a`` above it)."""
    if module in graph:
        return module
    parent = module.rpartition(".")[0]
    return parent if parent in graph else None
