"""Masks that other programs put into the store: each becomes a version once it is whole, and none is lost."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from app.conftest import Running
from app.test_dicomweb_store import wait_for
from app.test_label_versions import LIVER, blocks, final, index, listed, post, settle, write
from lib import version_files


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


@pytest.mark.parametrize("placed_end", [4, 9])
def test_a_placed_file_is_taken_over_once_and_kept(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placed_end: int
) -> None:
    """A server killed between taking it over and moving it away meets it again; nothing is ever deleted.

    So it is with the content of an older version, which somebody puts back.
    """
    for end in (9, 10):
        post(running, write(tmp_path / "one.nii.gz", blocks(v1=(2, end))), label_info=LIVER)
    placed = running.studies / "labels" / "version_10001" / "case_a.nii.gz"
    placed.parent.mkdir()
    settle(write(placed, blocks(v1=(2, placed_end))))
    content, store = placed.read_bytes(), running.app.datastore()

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(version_files.VersionFiles, "discard", killed)
        with pytest.raises(KeyboardInterrupt):
            store.versions("case_a")
    assert [v["version"] for v in listed(running)["versions"]] == [1, 2, 3]
    assert (final(running) == blocks(v1=(2, placed_end))).all()
    assert not placed.exists()
    (kept,) = (running.studies / ".trash" / "case_a").iterdir()
    assert kept.read_bytes() == content
    assert post(running, tmp_path / "one.nii.gz", label_info=LIVER).json()["version"] == 4


def test_only_the_label_as_it_is_becomes_no_version_again(running: Running, tmp_path: Path) -> None:
    """A copy of the newest version changes nothing, unless the image is unlabelled."""
    post(running, write(tmp_path / "one.nii.gz", blocks(v1=(2, 9))), label_info=LIVER)
    labels = running.studies / "labels"

    def place() -> None:
        (labels / "version_10001").mkdir(exist_ok=True)
        shutil.copy(labels / "version_1" / "case_a.nii.gz", labels / "version_10001")
        settle(labels / "version_10001" / "case_a.nii.gz")

    place()
    assert [v["version"] for v in listed(running)["versions"]] == [1]
    assert len(list((running.studies / ".trash" / "case_a").iterdir())) == 1
    running.client.delete("/datastore/label", params={"id": "case_a", "tag": "final"})
    place()
    state = listed(running)
    assert (state["final"], [v["source"] for v in state["versions"]]) == (2, ["api", "found"])


def foreign_writer(running: Running, name: str) -> BinaryIO:
    """Another program that opens a file for the label of ``case_a``."""
    path = running.studies / "labels" / name
    path.parent.mkdir(exist_ok=True)
    return open(path, "wb")


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd"])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_final_of_another_program_waits_until_it_is_whole(
    running: Running, tmp_path: Path, suffix: str, labelled: bool
) -> None:
    """It writes into the copy of a version, or beside it; nobody takes or replaces the half of it."""
    whole = write(tmp_path / f"two{suffix}", blocks(v1=(2, 4))).read_bytes()
    if labelled:
        post(running, write(tmp_path / "one.nii.gz", blocks(v1=(2, 9))), label_info=LIVER)
    with foreign_writer(running, f"final/case_a{suffix}") as file:
        file.write(whole[:50])
        file.flush()
        running.app.datastore().refresh()
        assert [v["source"] for v in listed(running)["versions"]] == ["api"] * labelled
        file.write(whole[50:])
    assert Path(file.name).read_bytes() == whole
    settle(Path(file.name))
    state = listed(running)
    assert [v["source"] for v in state["versions"]] == ["api"] * labelled + ["found"]
    assert (state["final"], state["versions"][-1]["checksum"]) == (1 + labelled, hashlib.sha256(whole).hexdigest())
    folder = running.studies / "labels" / "final"
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [(f"case_a{suffix}", whole)]


@pytest.mark.parametrize("change", ["save", "delete"])
def test_a_final_that_is_being_written_is_kept_when_another_takes_its_place(
    running: Running, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    """Half a mask is nobody's label: it becomes no version and lies in the trash, with what its writer adds."""
    whole = write(tmp_path / "two.nii.gz", blocks(v1=(2, 4))).read_bytes()
    post(running, write(tmp_path / "one.nii.gz", blocks(v1=(2, 9))), label_info=LIVER)
    with foreign_writer(running, "final/case_a.nii.gz") as file:
        file.write(whole[:50])
        file.flush()
        if change == "save":
            assert post(running, tmp_path / "one.nii.gz", label_info=LIVER).json()["version"] == 2
        else:
            asked = {"id": "case_a", "tag": "final"}
            assert running.client.delete("/datastore/label", params=asked).status_code == 200
        file.write(whole[50:])
    (kept,) = (running.studies / ".trash" / "case_a").iterdir()
    assert kept.read_bytes() == whole
    assert str(kept) in caplog.text
    state = listed(running)
    assert [v["source"] for v in state["versions"]] == ["api"] * (2 if change == "save" else 1)
    if change == "save":
        assert (final(running) == blocks(v1=(2, 9))).all()
    else:
        assert state["final"] is None


def test_what_cannot_be_read_becomes_no_version_when_a_save_displaces_it(running: Running, tmp_path: Path) -> None:
    """Its writer was killed long ago."""
    post(running, write(tmp_path / "one.nii.gz", blocks(v1=(2, 9))), label_info=LIVER)
    torn = running.studies / "labels" / "final" / "case_a.nii.gz"
    torn.write_bytes(b"half a mask")
    settle(torn)
    assert post(running, tmp_path / "one.nii.gz", label_info=LIVER).json()["version"] == 2
    assert [v["source"] for v in listed(running)["versions"]] == ["api", "api"]
    (kept,) = (running.studies / ".trash" / "case_a").iterdir()
    assert kept.read_bytes() == b"half a mask"


def test_half_a_mask_that_is_all_there_is_can_be_deleted(running: Running) -> None:
    with foreign_writer(running, "final/case_a.nii.gz") as file:
        file.write(b"half a mask")
    store = running.app.datastore()
    store.refresh()
    assert store.get_labeled_images() == ["case_a"]
    asked = {"id": "case_a", "tag": "final"}
    assert running.client.delete("/datastore/label", params=asked).status_code == 200
    assert store.get_labeled_images() == []
    (kept,) = (running.studies / ".trash" / "case_a").iterdir()
    assert kept.read_bytes() == b"half a mask"
    assert running.client.delete("/datastore/label", params=asked).status_code == 404


def test_a_kill_between_what_was_displaced_and_its_successor_unlabels_nothing(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start()
    post(running, write(tmp_path / "one.nii.gz", blocks(v1=(2, 9))), label_info=LIVER)
    (running.studies / "labels" / "final" / "case_a.nii.gz").write_bytes(b"half a mask")

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(running.app.datastore(), "_set_final", killed)
        with pytest.raises(KeyboardInterrupt):
            running.app.datastore().remove_label("case_a", "final")
    assert not (running.studies / "labels" / "final" / "case_a.nii.gz").exists()
    running = start()
    assert running.app.datastore().final_version("case_a") == 1
    assert (final(running) == blocks(v1=(2, 9))).all()


def test_a_final_of_another_program_is_nobodys(running: Running, tmp_path: Path) -> None:
    """The version whose place it takes was made, approved, published and voted for; it only names structures."""
    file = write(tmp_path / "one.nii.gz", blocks(v1=(2, 9)))
    post(running, file, author="bob", label_info=LIVER)
    approved = {"status": "approved", "level": "easy", "approvedBy": "chief", "comment": "good", "editTime": 1}
    sent = {"author": "ann", "client_id": "panel", "model_version": "7", "label_info": LIVER}
    post(running, file, **sent, segmentationMeta=approved)
    store = running.app.datastore()
    store.update_label_info("case_a", "version_2", {"dicom_seg": {"SOPInstanceUID": "1.2.3"}})
    placed = write(running.studies / "labels" / "final" / "case_a.nii.gz", blocks(v1=(2, 4)))
    settle(placed)
    state = listed(running)
    assert (state["final"], [v["source"] for v in state["versions"]]) == (3, ["api", "api", "found"])
    of_ann, found = state["versions"][1:]
    assert (of_ann["author"], of_ann["status"], of_ann["dicom_seg"]) == ("ann", "approved", None)
    assert [s["name"] for s in found["structures"]] == ["liver"]
    unknown = ("author", "client_id", "model_version", "status", "level", "approved_by", "note")
    assert [found[key] for key in unknown] == [""] * len(unknown)
    for tag in ("final", "version_3"):
        info = store.get_label_info("case_a", tag)
        assert (info["author"], info["label_info"]) == ("", store.get_label_info("case_a", "version_2")["label_info"])
        assert "dicom_seg" not in info
    agreement = running.client.get("/medvl/labels/agreement", params={"image": "case_a"}).json()
    assert agreement["latest"] == {"bob": 1, "ann": 2}
    reply = running.client.post("/medvl/labels/consensus", params={"image": "case_a"}, json={}).json()
    assert reply["made_from"] == [1, 2]
    assert (final(running) == blocks(v1=(2, 9))).all()


@pytest.mark.parametrize("copy", [shutil.copyfile, shutil.copy2])
def test_an_older_version_copied_over_final_is_the_label_again(running: Running, tmp_path: Path, copy: Any) -> None:
    """As if it had been restored; with the time of its mask it is the store's own copy, left by a save cut off."""
    post(running, write(tmp_path / "one.nii.gz", blocks(v1=(2, 9))), author="ann", label_info=LIVER)
    spleen = [{"name": "spleen", "idx": 1}]
    post(running, write(tmp_path / "two.nii.gz", blocks(v1=(2, 4))), author="ann", label_info=spleen)
    labels = running.studies / "labels"
    settle(labels / "version_1" / "case_a.nii.gz")
    copy(labels / "version_1" / "case_a.nii.gz", labels / "final" / "case_a.nii.gz")
    restored = copy is shutil.copyfile
    if restored:
        os.utime(labels / "final" / "case_a.nii.gz", (time.time() - 30,) * 2)
    versions = listed(running)["versions"][2:]
    assert [(v["source"], v["restored_from"], v["author"]) for v in versions] == [("found", 1, "")] * restored
    assert [v["structures"][0]["name"] for v in versions] == ["liver"] * restored
    assert (final(running) == blocks(v1=(2, 9 if restored else 4))).all()
    assert listed(running)["versions"][2:] == versions
    latest = running.client.get("/medvl/labels/agreement", params={"image": "case_a"}).json()["latest"]
    assert latest == {"ann": 2}


def test_a_deleted_label_copied_back_into_final_is_the_label_again(running: Running, tmp_path: Path) -> None:
    post(running, write(tmp_path / "one.nii.gz", blocks(v1=(2, 9))), label_info=LIVER)
    running.client.delete("/datastore/label", params={"id": "case_a", "tag": "final"})
    copied = running.studies / "labels" / "final" / "case_a.nii.gz"
    settle(Path(shutil.copyfile(running.studies / "labels" / "version_1" / "case_a.nii.gz", copied)))
    state = listed(running)
    assert (state["final"], [v["restored_from"] for v in state["versions"]]) == (2, [None, 1])
    assert (final(running) == blocks(v1=(2, 9))).all()


def test_what_is_known_of_a_version_stays_with_its_mask(running: Running, tmp_path: Path) -> None:
    """Its record is damaged; the index still tells whose it is."""
    post(running, write(tmp_path / "one.nii.gz", blocks(v1=(2, 9))), author="ann", label_info=LIVER)
    (running.studies / "labels" / "version_1" / "case_a.json").write_text("{")
    settle(running.studies / "labels" / "version_1" / "case_a.nii.gz")
    (version,) = listed(running)["versions"]
    assert (version["author"], version["source"]) == ("ann", "found")


def test_the_checksum_is_that_of_the_copy(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its program writes again while the mask is taken over."""
    from lib import versioned_store

    placed = running.studies / "labels" / "final" / "case_a.nii.gz"
    settle(write(placed, blocks(v1=(2, 4))))
    stage = version_files.stage

    def written_meanwhile(source: Path, folder: Path) -> Any:
        write(placed, blocks(v1=(2, 9)))
        return stage(source, folder)

    with monkeypatch.context() as patch:
        patch.setattr(versioned_store, "stage", written_meanwhile)
        listed(running)
    for version in listed(running)["versions"]:
        stored = running.studies / "labels" / version["tag"] / "case_a.nii.gz"
        assert version["checksum"] == hashlib.sha256(stored.read_bytes()).hexdigest()


@pytest.mark.parametrize("folder", ["version_3", "version_10001", "final"])
def test_a_placed_file_is_taken_over_without_a_request(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    """Looked at once, it is taken over when it settles; one timer at a time, whoever looks."""
    monkeypatch.setattr(version_files, "STALE_S", 1.0)
    content = write(tmp_path / "two.nii.gz", blocks(v1=(2, 4))).read_bytes()
    post(running, write(tmp_path / "one.nii.gz", blocks(v1=(2, 9))), label_info=LIVER)
    store = running.app.datastore()

    def timers() -> int:
        return sum(getattr(thread, "function", None) == store._adopt_settled for thread in threading.enumerate())

    with foreign_writer(running, f"{folder}/case_a.nii.gz") as file:
        file.write(content[:50])
        file.flush()
        for _ in range(3):
            assert [v["version"] for v in listed(running)["versions"]] == [1]
        assert timers() == 1
        end = time.monotonic() + 1.5
        while time.monotonic() < end:  # longer than the first timer waits
            os.utime(file.name)
            time.sleep(0.05)
        assert len(store._files.versions("case_a")) == 1
        file.write(content[50:])
    wait_for(lambda: store.final_version("case_a") not in (None, 1))
    assert (final(running) == blocks(v1=(2, 4))).all()
    wait_for(lambda: timers() == 0)
    assert [v["source"] for v in listed(running)["versions"]] == ["api", "found"]


def test_a_placed_file_that_cannot_be_taken_over_yet_is_at_the_next_look(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(version_files, "STALE_S", 0.1)
    store = running.app.datastore()
    (running.studies / "labels" / "version_3").mkdir()
    write(running.studies / "labels" / "version_3" / "case_a.nii.gz", blocks(v1=(2, 4)))
    with monkeypatch.context() as patch:
        patch.setattr(store, "_take_over", lambda *_: (_ for _ in ()).throw(OSError("disk gone")))
        store.refresh()
        wait_for(lambda: "disk gone" in caplog.text)
    assert [v["version"] for v in listed(running)["versions"]] == [3]


def test_a_label_submitted_meanwhile_is_newer_than_a_placed_file_that_waited(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Far up it would get the next number; an old file that is put there afterwards does."""
    monkeypatch.setattr(version_files, "STALE_S", 1.0)
    post(running, write(tmp_path / "one.nii.gz", blocks(v1=(2, 8))), label_info=LIVER)
    placed = running.studies / "labels" / "version_10001" / "case_a.nii.gz"
    placed.parent.mkdir()
    content = write(placed, blocks(v1=(2, 4))).read_bytes()
    assert [v["version"] for v in listed(running)["versions"]] == [1]
    assert post(running, write(tmp_path / "two.nii.gz", blocks(v1=(2, 9))), label_info=LIVER).json()["version"] == 2
    wait_for(lambda: not placed.exists())
    (kept,) = (running.studies / ".trash" / "case_a").iterdir()
    assert kept.read_bytes() == content
    wait_for(lambda: str(kept) in caplog.text)
    assert [v["source"] for v in listed(running)["versions"]] == ["api", "api"]
    assert (final(running) == blocks(v1=(2, 9))).all()
    shutil.copy(kept, placed)
    os.utime(placed, (1e9, 1e9))
    assert [v["source"] for v in listed(running)["versions"]] == ["api", "api", "found"]
    assert (final(running) == blocks(v1=(2, 4))).all()


def test_one_image_that_fails_keeps_no_other_waiting(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(version_files, "STALE_S", 0.1)
    store = running.app.datastore()
    (running.studies / "labels" / "version_3").mkdir()
    written = time.time()
    for image in ("case_a", "case_b"):
        placed = write(running.studies / "labels" / "version_3" / f"{image}.nii.gz", blocks(v1=(2, 4)))
        os.utime(placed, (written, written))  # both settle at once
    take_over, failed = store._take_over, set[str]()

    def failing(image: str, *more: Any) -> Any:
        if failed <= {image}:  # whichever comes first
            failed.add(image)
            raise OSError("disk gone")
        return take_over(image, *more)

    monkeypatch.setattr(store, "_take_over", failing)
    store.refresh()
    wait_for(lambda: "disk gone" in caplog.text)
    (other,) = {"case_a", "case_b"} - failed
    wait_for(lambda: bool(store.final_version(other) == 3))


def test_a_final_that_goes_while_it_is_looked_at_is_no_error(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from lib import versioned_store

    gone = running.studies / "labels" / "final" / "case_a.nii.gz"
    monkeypatch.setattr(versioned_store, "masks_of", lambda *_: [gone])
    assert listed(running)["versions"] == []


def test_a_placed_file_is_seen_at_the_start(start: Any, tmp_path: Path) -> None:
    """Without anybody listing the versions of its image."""
    placed = start().studies / "labels" / "version_3" / "case_a.nii.gz"
    placed.parent.mkdir()
    settle(write(placed, blocks(v1=(2, 4))))
    running = start()
    assert running.app.datastore().final_version("case_a") == 3
    assert (final(running) == blocks(v1=(2, 4))).all()


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
