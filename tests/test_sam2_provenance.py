"""The registry's sam2 is a third party's upload: the files we run must be those of the original authors.

``tests/data/sam2_hashes.json`` holds the SHA-256 of every file of ``sam2.modeling`` and of the two modules it pulls in,
as they stand in the commit of facebookresearch/sam2 that the table names. The table was made from the installed wheel
and every file was then compared, byte for byte, with that commit.
"""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from pathlib import Path

import pytest

from import_graph import imports_of, modules_under

TABLE = Path(__file__).parent / "data" / "sam2_hashes.json"


@pytest.fixture(scope="module")
def site_packages() -> Path:
    """Where sam2 is installed, found without importing it (the import touches Hydra's process-wide state)."""
    return Path(str(metadata.distribution("sam2").locate_file("")))


@pytest.fixture(scope="module")
def known() -> dict[str, str]:
    return json.loads(TABLE.read_text(encoding="utf-8"))["sha256"]


def test_installed_files_equal_the_original(site_packages: Path, known: dict[str, str]) -> None:
    changed = [name for name, digest in known.items() if _sha256(site_packages / name) != digest]
    assert changed == []


def test_table_names_the_installed_release(known: dict[str, str]) -> None:
    assert json.loads(TABLE.read_text(encoding="utf-8"))["package"] == f"sam2 {metadata.version('sam2')}"


def test_everything_the_package_runs_is_in_the_table(
    repository: Path, site_packages: Path, known: dict[str, str]
) -> None:
    ours = modules_under(repository / "model" / "medvl_sam2", "medvl_sam2")
    frontier = {file for name, path in ours.items() for file in _sam2_files(path, name, site_packages)}
    assert "sam2/modeling/sam2_base.py" in frontier
    reached: set[str] = set()
    while frontier:
        reached |= frontier
        following = (_sam2_files(site_packages / file, _module(file), site_packages) for file in frontier)
        frontier = set().union(*following) - reached
    assert reached - set(known) == set()


def test_a_changed_byte_is_noticed(site_packages: Path, known: dict[str, str], tmp_path: Path) -> None:
    name = "sam2/modeling/sam2_utils.py"
    tampered = tmp_path / "sam2_utils.py"
    tampered.write_bytes((site_packages / name).read_bytes() + b"\n")
    assert _sha256(tampered) != known[name]


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _module(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _sam2_files(path: Path, module: str, site_packages: Path) -> set[str]:
    """Files of sam2 that run when ``path`` is imported: the modules it names and the packages above them."""
    found: set[str] = set()
    for wanted in imports_of(path.read_text(encoding="utf-8"), module, path.name == "__init__.py"):
        parts = wanted.module.split(".")
        if parts[0] != "sam2":
            continue
        for length in range(1, len(parts) + 1):
            base = "/".join(parts[:length])
            found |= {file for file in (f"{base}.py", f"{base}/__init__.py") if (site_packages / file).is_file()}
    return found
