"""Masks that other programs put far up: only a label submitted here overtakes one, and none goes unnoticed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from app.conftest import Running
from app.test_label_versions import LIVER, blocks, final, index, listed, post, settle, write
from lib import version_files


def place(running: Running, folder: str, end: int) -> Path:
    """A mask that another program writes."""
    path = running.studies / "labels" / folder / "case_a.nii.gz"
    path.parent.mkdir(exist_ok=True)
    write(path, blocks(v1=(2, end)))
    time.sleep(0.05)  # the next one is put there later by any clock
    return path


def trash(running: Running) -> list[str]:
    return sorted(path.name.split("-")[0] for path in (running.studies / ".trash" / "case_a").iterdir())


def sizes(running: Running) -> list[int]:
    """Slices of the structure in every version."""
    return [version["structures"][0]["voxels"] // (6 * 4) for version in listed(running)["versions"]]


def test_masks_put_there_in_any_order_are_versions(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    place(running, "version_10002", 4)
    place(running, "version_10001", 6)
    monkeypatch.setattr(version_files, "STALE_S", 0.01)
    assert sizes(running) == [4, 2], "by their numbers"
    assert (final(running) == blocks(v1=(2, 4))).all()
    assert trash(running) == ["placed_10001", "placed_10002"]


def test_a_mask_of_another_program_overtakes_none(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    place(running, "version_10001", 4)
    place(running, "version_3", 8)
    monkeypatch.setattr(version_files, "STALE_S", 0.01)
    assert sizes(running) == [6, 2]
    assert trash(running) == ["placed_10001"]


def test_a_submitted_label_overtakes_one_whatever_is_placed_after_it(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest version is another program's then; the label submitted before it still counts."""
    place(running, "version_10001", 4)  # it waits when the label is submitted
    post(running, write(tmp_path / "one.nii.gz", blocks(v1=(2, 9))), label_info=LIVER)
    place(running, "version_3", 8)
    monkeypatch.setattr(version_files, "STALE_S", 0.01)
    assert sizes(running) == [7, 6]
    assert (final(running) == blocks(v1=(2, 8))).all()
    assert trash(running) == ["placed_10001"]


@pytest.mark.parametrize("tag", ["version_10001", "final"])
def test_a_deletion_that_finds_a_mask_become_a_version_says_so(running: Running, tmp_path: Path, tag: str) -> None:
    """Far up it is the final label by now, under another number; ``final`` goes, whichever version it holds."""
    post(running, write(tmp_path / "one.nii.gz", blocks(v1=(2, 9))), label_info=LIVER)
    path = place(running, "version_10001", 4)
    running.app.datastore().refresh()
    assert "version_10001" in index(running)["case_a"]["labels"]
    settle(path)
    asked: dict[str, Any] = {"id": "case_a", "tag": tag}
    reply = running.client.delete("/datastore/label", params=asked)
    assert reply.status_code == (200 if tag == "final" else 404), reply.text
    assert list(index(running)["case_a"]["labels"])[-2:] == ["version_1", "version_2"]
    state = listed(running)
    assert (state["final"], [v["source"] for v in state["versions"]]) == (
        None if tag == "final" else 2,
        ["api", "found"],
    )
