"""The record beside a version's mask, when something happened to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.conftest import Running
from app.test_label_versions import LIVER, blocks, listed, post, write
from lib import version_files


def test_a_damaged_record_is_made_anew(running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From MONAI Label's index; only the prompts are nowhere else."""
    monkeypatch.setattr(version_files, "STALE_S", 0.0)  # nobody else writes here
    for end in (5, 6):
        post(running, write(tmp_path / "label.nii.gz", blocks(v1=(0, end))), author="ann", label_info=LIVER)
    before = listed(running)
    for damage in (lambda path: path.write_text("{"), Path.unlink):
        damage(running.studies / "labels" / "version_1" / "case_a.json")
        after = listed(running)
        assert after["final"] == before["final"]
        for key in ("version", "author", "checksum", "structures", "model_version", "note"):
            assert [v[key] for v in after["versions"]] == [v[key] for v in before["versions"]], key
