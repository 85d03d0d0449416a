"""A label that was saved and not submitted is a version, and counts for nothing."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from app.conftest import Running
from app.test_label_versions import LIVER, blocks, final, index, listed, post, write
from lib import version_files


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


def test_a_file_of_another_program_survives_a_draft(running: Running, tmp_path: Path) -> None:
    (running.studies / "labels" / "final").mkdir(parents=True, exist_ok=True)
    write(running.studies / "labels" / "final" / "case_a.nii.gz", blocks(v1=(2, 9)))
    running.app.datastore().refresh()
    draft = {"label_info": LIVER, "segmentationMeta": {"status": "draft"}}
    assert post(running, write(tmp_path / "a.nii.gz", blocks(v1=(2, 4))), **draft).json()["version"] == 2
    assert listed(running)["final"] == 1
    assert (final(running) == blocks(v1=(2, 9))).all()


def test_a_tag_cannot_use_the_numbers_up(running: Running, tmp_path: Path) -> None:
    file = write(tmp_path / "one.nii.gz", blocks(v1=(2, 9)))
    for tag in ("version_999999", None, "version_7", None, "version_999999999"):
        assert running.submit("case_a", file, tag, label_info=LIVER).status_code == 200
    assert [v["version"] for v in listed(running)["versions"]] == [1, 2, 7, 8, 9]


@pytest.mark.parametrize("number", [10_001, 999_999, 999_999_999])
def test_a_placed_file_cannot_use_the_numbers_up(running: Running, tmp_path: Path, number: int) -> None:
    """It becomes the next version, and MONAI Label's Reviewer, which counts on from the last tag, does not see it."""
    post(running, write(tmp_path / "one.nii.gz", blocks(v1=(2, 9))), label_info=LIVER)
    folder = running.studies / "labels" / f"version_{number}"
    folder.mkdir()
    placed = write(folder / "case_a.nii.gz", blocks(v1=(2, 4)))
    settle(placed)
    running.app.datastore().refresh()
    assert [(v["version"], v["source"]) for v in listed(running)["versions"]] == [(1, "api"), (2, "found")]
    assert (final(running) == blocks(v1=(2, 4))).all()
    assert not placed.exists()
    assert post(running, tmp_path / "one.nii.gz", label_info=LIVER).json()["version"] == 3
    assert list(index(running)["case_a"]["labels"]) == ["final", "version_1", "version_2", "version_3"]


@pytest.mark.parametrize("number", [3, 10_001])
def test_a_placed_file_is_taken_over_once_it_is_whole(running: Running, tmp_path: Path, number: int) -> None:
    """Half of it lies there when the store looks for the first time; the rest must not go to a file that is gone."""
    whole = write(tmp_path / "two.nii.gz", blocks(v1=(2, 4))).read_bytes()
    post(running, write(tmp_path / "one.nii.gz", blocks(v1=(2, 9))), label_info=LIVER)
    placed = running.studies / "labels" / f"version_{number}" / "case_a.nii.gz"
    placed.parent.mkdir()
    with open(placed, "wb") as file:
        file.write(whole[:50])
        file.flush()
        running.app.datastore().refresh()
        assert [v["version"] for v in listed(running)["versions"]] == [1]
        file.write(whole[50:])
    settle(placed)
    assert [v["source"] for v in listed(running)["versions"]] == ["api", "found"]
    assert (final(running) == blocks(v1=(2, 4))).all()


def test_a_placed_file_is_taken_over_once_and_kept(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server killed between taking it over and moving it away meets it again; nothing is ever deleted."""
    post(running, write(tmp_path / "one.nii.gz", blocks(v1=(2, 9))), label_info=LIVER)
    placed = running.studies / "labels" / "version_10001" / "case_a.nii.gz"
    placed.parent.mkdir()
    settle(write(placed, blocks(v1=(2, 4))))
    content, store = placed.read_bytes(), running.app.datastore()

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(version_files.VersionFiles, "discard", killed)
        with pytest.raises(KeyboardInterrupt):
            store.versions("case_a")
    assert [v["version"] for v in listed(running)["versions"]] == [1, 2]
    assert not placed.exists()
    (kept,) = (running.studies / ".trash" / "case_a").iterdir()
    assert kept.read_bytes() == content
    assert post(running, tmp_path / "one.nii.gz", label_info=LIVER).json()["version"] == 3


def settle(placed: Path) -> None:
    """As if it had been written a minute ago."""
    os.utime(placed, (time.time() - 60,) * 2)


def test_a_version_with_its_record_keeps_any_number(running: Running, tmp_path: Path) -> None:
    """As when it is put back from the trash, or was adopted by an earlier release."""
    post(running, write(tmp_path / "one.nii.gz", blocks(v1=(2, 9))), label_info=LIVER)
    labels = running.studies / "labels"
    record = json.loads((labels / "version_1" / "case_a.json").read_text()) | {"version": 999_999}
    (labels / "version_1").rename(labels / "version_999999")
    (labels / "version_999999" / "case_a.json").write_text(json.dumps(record))
    running.app.datastore().refresh()
    assert [v["version"] for v in listed(running)["versions"]] == [999_999]
    assert post(running, tmp_path / "one.nii.gz", label_info=LIVER).json()["version"] == 1_000_000
    assert [v["version"] for v in listed(running)["versions"]] == [999_999, 1_000_000]
