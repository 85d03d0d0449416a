"""The older phases under ``torchrun``: two processes share each of them and end with the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RESULTS = {
    "segmentation": "memory_resume.safetensors",
    "scene": "scene.safetensors",
    "language": "language_resume.safetensors",
    "joint": "joint_resume.safetensors",
}


@pytest.mark.slow
@pytest.mark.timeout(600)  # two processes, each of which loads torch
def test_every_phase_is_shared_by_two_processes(tmp_path: Path, repository: Path) -> None:
    path = os.pathsep.join([str(repository / "model"), str(repository / "tests")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(repository / "tests" / "phases_together.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, timeout=500)
    for name, result in RESULTS.items():
        first, second = (json.loads((tmp_path / f"{name}{rank}.json").read_text()) for rank in range(2))
        assert first == second, name
        assert first["finite"], name
        assert (tmp_path / name / result).exists()
