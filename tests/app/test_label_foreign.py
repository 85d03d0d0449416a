"""Masks of other programs that this process may not read, that go while it looks, or that look like its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from app.conftest import Running
from app.test_label_versions import LIVER, blocks, final, listed, post, settle, write
from lib import versioned_store


def unreadable(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """As to another user, with its program's umask of 077; the tests may run as root, who reads everything."""
    checksum, stage = versioned_store.file_sha256, versioned_store.stage

    def refused(call: Any) -> Any:
        def checked(file: Path, *more: Any) -> Any:
            if Path(file) == path:
                raise PermissionError(13, "Permission denied", str(path))
            return call(file, *more)

        return checked

    monkeypatch.setattr(versioned_store, "file_sha256", refused(checksum))
    monkeypatch.setattr(versioned_store, "stage", refused(stage))


def test_a_final_that_may_not_be_read_waits_and_stops_no_save(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    label = write(tmp_path / "one.nii.gz", blocks(v1=(2, 9)))
    post(running, label, label_info=LIVER)
    placed = write(running.studies / "labels" / "final" / "case_a.nii.gz", blocks(v1=(2, 4)))
    settle(placed)
    content = placed.read_bytes()
    unreadable(monkeypatch, placed)
    assert [v["source"] for v in listed(running)["versions"]] == ["api"]
    assert placed.read_bytes() == content
    assert f"{placed} cannot be read" in caplog.text
    reply = post(running, label, label_info=LIVER)
    assert (reply.status_code, reply.json()["version"]) == (200, 2)
    (kept,) = (running.studies / ".trash" / "case_a").iterdir()
    assert kept.read_bytes() == content
    assert (final(running) == blocks(v1=(2, 9))).all()


@pytest.mark.parametrize("number", [3, 10_001])
def test_a_placed_mask_that_may_not_be_read_stops_no_save(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    placed = running.studies / "labels" / f"version_{number}" / "case_a.nii.gz"
    placed.parent.mkdir()
    settle(write(placed, blocks(v1=(2, 4))))
    with monkeypatch.context() as patch:
        unreadable(patch, placed)
        assert listed(running)["versions"] == []
        reply = post(running, write(tmp_path / "one.nii.gz", blocks(v1=(2, 9))), label_info=LIVER)
        assert reply.status_code == 200, reply.text
    assert placed.exists()


def test_an_error_of_the_system_tells_no_path(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device", str(running.studies / "labels"))

    label = write(tmp_path / "one.nii.gz", blocks(v1=(2, 9)))
    store = running.app.datastore()
    for name in ("_index_version", "versions"):  # with http_errors, and where nobody catches it
        monkeypatch.setattr(store, name, full)
    for reply in (post(running, label), running.client.get("/medvl/labels", params={"image": "case_a"})):
        assert reply.status_code == 500
        assert "OSError: No space left on device" in reply.json()["detail"]
        assert str(running.studies) not in reply.text


@pytest.mark.parametrize("step", ["file_sha256", "stage"])
def test_a_final_that_goes_at_any_step_is_no_error(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    post(running, write(tmp_path / "one.nii.gz", blocks(v1=(2, 9))), label_info=LIVER)
    placed = write(running.studies / "labels" / "final" / "case_a.nii.gz", blocks(v1=(2, 4)))
    settle(placed)
    call = getattr(versioned_store, step)

    def gone(file: Path, *more: Any) -> Any:
        if Path(file) == placed:
            placed.unlink(missing_ok=True)
        return call(file, *more)

    with monkeypatch.context() as patch:
        patch.setattr(versioned_store, step, gone)
        assert [v["version"] for v in listed(running)["versions"]] == [1]
    assert (final(running) == blocks(v1=(2, 9))).all()


def test_an_older_version_with_the_time_of_its_mask_is_undone_with_a_warning(
    running: Running, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for end in (9, 4):
        post(running, write(tmp_path / "one.nii.gz", blocks(v1=(2, end))), label_info=LIVER)
    labels = running.studies / "labels"
    settle(labels / "version_1" / "case_a.nii.gz")
    shutil.copy2(labels / "version_1" / "case_a.nii.gz", labels / "final" / "case_a.nii.gz")
    assert listed(running)["final"] == 2
    assert (final(running) == blocks(v1=(2, 4))).all()
    assert "version_1 with the time of its mask" in caplog.text


@pytest.mark.parametrize("tag", ["final", "version_3"])
def test_a_mask_that_may_not_be_read_goes_with_its_image(
    running: Running, monkeypatch: pytest.MonkeyPatch, tag: str
) -> None:
    """Else it would be the label of another image that gets the id."""
    placed = running.studies / "labels" / tag / "case_a.nii.gz"
    placed.parent.mkdir(exist_ok=True)
    settle(write(placed, blocks(v1=(2, 4))))
    content = placed.read_bytes()
    with monkeypatch.context() as patch:
        unreadable(patch, placed)
        assert running.client.delete("/datastore", params={"id": "case_a"}).status_code == 200
    assert not placed.exists()
    assert content in [path.read_bytes() for path in (running.studies / ".trash" / "case_a").iterdir()]


def test_a_final_that_is_written_while_it_is_hashed_waits(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    placed = write(running.studies / "labels" / "final" / "case_a.nii.gz", blocks(v1=(2, 4)))
    settle(placed)
    whole, checksum = placed.read_bytes(), versioned_store.file_sha256

    def overtaken(path: Path) -> str:
        found = checksum(path)
        if Path(path) == placed:
            placed.write_bytes(whole[:20])
        return found

    with monkeypatch.context() as patch:
        patch.setattr(versioned_store, "file_sha256", overtaken)
        assert listed(running)["versions"] == []
    placed.write_bytes(whole)
    settle(placed)
    (version,) = listed(running)["versions"]
    assert version["structures"]
