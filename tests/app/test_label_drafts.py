"""A label that was saved and not submitted is a version, and counts for nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.conftest import Running
from app.test_label_versions import LIVER, blocks, final, listed, post, settle, write
from lib import datastore, version_files, versioned_store


def test_a_draft_is_a_version_and_never_final(running: Running, tmp_path: Path) -> None:
    one, two = blocks(v1=(2, 9)), blocks(v1=(2, 10))
    draft = {"label_info": LIVER, "segmentationMeta": {"status": "draft"}}
    assert post(running, write(tmp_path / "two.nii.gz", two), **draft).status_code == 200
    assert (listed(running)["final"], running.app.schedule.state().labels) == (None, 0)
    assert running.app.datastore().get_labeled_images() == []
    assert post(running, write(tmp_path / "one.nii.gz", one), label_info=LIVER).json()["version"] == 2
    assert running.submit("case_a", write(tmp_path / "two.nii.gz", two), **draft).status_code == 200
    state = listed(running)
    assert (state["final"], [v["status"] for v in state["versions"]]) == (2, ["draft", "", "draft"])
    assert running.app.schedule.state().labels == 1
    assert (final(running) == one).all()
    running.app.datastore().refresh()
    assert listed(running)["final"] == 2
    running.app.datastore().update_label_info("case_a", "version_3", {"segmentationMeta": {"status": "approved"}})
    assert listed(running)["final"] == 3
    assert (final(running) == two).all()
    running.app.datastore().update_label_info("case_a", "version_3", {"segmentationMeta": {"status": "draft"}})
    assert listed(running)["final"] == 2
    assert (final(running) == one).all()


@pytest.mark.parametrize("first_is_draft", [True, False])
def test_a_label_counts_by_itself_whoever_saves_meanwhile(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_is_draft: bool
) -> None:
    """Somebody else's version comes between a label and the hook that counts it."""
    store, draft = running.app.datastore(), {"segmentationMeta": {"status": "draft"}}
    mine, theirs = (draft, {}) if first_is_draft else ({}, draft)
    save, others = store.save_label, []

    def overtaken(image: str, file: str, tag: str, info: dict[str, Any]) -> str:
        saved = save(image, file, tag, info)
        others.append(save(image, file, tag, {"label_info": LIVER, **theirs}))
        return saved

    monkeypatch.setattr(store, "save_label", overtaken)
    label = write(tmp_path / "one.nii.gz", blocks(v1=(2, 9)))
    reply = running.submit("case_a", label, label_info=LIVER, **mine).json()
    assert (reply["label"], reply["labels_since_training"]) == ("case_a", 0 if first_is_draft else 1)
    assert [v["status"] for v in listed(running)["versions"]] == [
        one.get("segmentationMeta", {"status": ""})["status"] for one in (mine, theirs)
    ]
    assert len(others) == 1


@pytest.mark.parametrize(("tag", "status", "copies"), [(None, "", 2), (None, "draft", 1), ("original", "", 1)])
def test_no_more_copies_are_flushed_than_are_kept(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tag: str | None, status: str, copies: int
) -> None:
    """Annotators wait for each; only what becomes final needs a second one."""
    label = write(tmp_path / "one.nii.gz", blocks(v1=(2, 9)))
    post(running, label, label_info=LIVER)
    made = []
    for module in (datastore, versioned_store):
        monkeypatch.setattr(module, "stage", lambda *args: made.append(args) or version_files.stage(*args))
    before = running.studies.joinpath("labels", "final", "case_a.nii.gz").stat().st_ino
    sent = running.submit("case_a", label, tag, label_info=LIVER, segmentationMeta={"status": status})
    assert (sent.status_code, len(made)) == (200, copies)
    same = before == running.studies.joinpath("labels", "final", "case_a.nii.gz").stat().st_ino
    assert same == (copies == 1)


@pytest.mark.parametrize("whole", [True, False])
def test_a_file_of_another_program_survives_a_draft(running: Running, tmp_path: Path, whole: bool) -> None:
    """Also one that may still be written: a draft has nothing to do with it."""
    placed = write(running.studies / "labels" / "final" / "case_a.nii.gz", blocks(v1=(2, 9)))
    if whole:
        settle(placed)
    file = placed.stat().st_ino
    running.app.datastore().refresh()
    draft = {"label_info": LIVER, "segmentationMeta": {"status": "draft"}}
    sent = post(running, write(tmp_path / "a.nii.gz", blocks(v1=(2, 4))), **draft)
    assert sent.json()["version"] == (2 if whole else 1)
    if not whole:
        assert placed.stat().st_ino == file
        settle(placed)
    assert listed(running)["final"] == (1 if whole else 2)
    assert (final(running) == blocks(v1=(2, 9))).all()


def test_a_tag_cannot_use_the_numbers_up(running: Running, tmp_path: Path) -> None:
    file = write(tmp_path / "one.nii.gz", blocks(v1=(2, 9)))
    for tag in ("version_999999", None, "version_7", None, "version_999999999"):
        assert running.submit("case_a", file, tag, label_info=LIVER).status_code == 200
    assert [v["version"] for v in listed(running)["versions"]] == [1, 2, 7, 8, 9]
