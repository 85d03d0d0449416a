"""What an installed package holds: every module and every file that the code reads beside them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from setuptools import Distribution


def test_a_wheel_holds_every_file_of_the_package(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As setuptools lists them for a build; a kind of file that pyproject.toml does not name would be missing."""
    listed = subprocess.run(
        ["git", "ls-files", "model/medvl_sam2"], cwd=repository, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout, so nothing says which files belong to the package")
    monkeypatch.chdir(repository)
    distribution = Distribution({"script_name": "setup.py"})
    distribution.parse_config_files([str(repository / "pyproject.toml")])
    distribution.include_package_data = False  # there is no MANIFEST.in, and looking for one writes into the checkout
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    data = [Path(folder, name) for _, folder, _, names in build.data_files for name in names]
    packed = {Path(file).as_posix() for file in [*build.get_source_files(), *data]}
    assert "model/medvl_sam2/training/stages/joint.yaml" in packed
    assert sorted(set(listed.stdout.splitlines()) - packed) == []
