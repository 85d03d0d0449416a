"""The record beside a version's mask, when something happened to it."""

from __future__ import annotations

from pathlib import Path

from app.conftest import Running
from app.test_label_versions import LIVER, blocks, listed, post, write


def test_a_damaged_record_is_made_anew(running: Running, tmp_path: Path) -> None:
    """From MONAI Label's index; only the prompts are nowhere else."""
    for end in (5, 6):
        post(running, write(tmp_path / "label.nii.gz", blocks(v1=(0, end))), author="ann", label_info=LIVER)
    before = listed(running)
    for damage in (lambda path: path.write_text("{"), Path.unlink):
        damage(running.studies / "labels" / "version_1" / "case_a.json")
        after = listed(running)
        assert after["final"] == before["final"]
        for key in ("version", "author", "checksum", "structures", "model_version", "note"):
            assert [v[key] for v in after["versions"]] == [v[key] for v in before["versions"]], key
