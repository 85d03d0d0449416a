"""A server killed at any moment of a submit over a DICOMweb server: every version that is kept has its SEG, once.

As :mod:`app.test_label_crashes`: a forked child submits a label and is killed before a certain line of the code that
keeps and sends it. Then the store is opened anew, as after a restart, and looks back.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from tqdm import tqdm

from app.fake_dicomweb import FakeDicomWeb, Open, store_opener
from app.test_dicomweb_store import add, submit, wait_for
from app.test_label_crashes import Lines
from lib import version_files
from lib.dicomweb_store import GuardedDicomWebStore

_FILES = Lines.FILES | {"dicomweb_store.py", "dicom_outbox.py"}


class KeptDicomWeb(FakeDicomWeb):
    """What a child stores is on disk, where its parent sees it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        folder.mkdir()

    def store_instances(self, documents: Sequence[Dataset]) -> Dataset:
        for document in documents:
            document.save_as(self.folder / f"{document.SOPInstanceUID}.dcm", write_like_original=False)
        return super().store_instances(documents)

    def forget_segmentations(self) -> None:
        self.held = {uid: one for uid, one in self.held.items() if one.Modality != "SEG"}
        for file in self.folder.glob("*.dcm"):
            file.unlink()

    def look(self) -> None:
        """Hold what children stored."""
        for file in self.folder.glob("*.dcm"):
            self.put(pydicom.dcmread(file))


def submit_traced(store: GuardedDicomWebStore, image: str, folder: Path, lines: Lines) -> None:
    sys.settrace(lines)
    try:
        submit(store, image, folder)
    finally:
        sys.settrace(None)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_version_has_its_segmentation_once_whenever_the_server_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(version_files, "STALE_S", 0.0)  # nobody else writes here
    server = KeptDicomWeb(tmp_path / "server")
    open_store = store_opener(server, tmp_path)
    image = add(server, tmp_path / "s")
    store, lines = open_store(cache="count"), Lines(0, lambda: None, _FILES)
    store.get_image_uri(image)
    submit_traced(store, image, tmp_path, lines)
    kept = forgotten = sent = 0
    for line in tqdm(np.unique(np.linspace(1, lines.count, 30).astype(int)), unit="kill"):
        server.forget_segmentations()
        store = open_store(cache=str(line))
        store.get_image_uri(image)
        child = os.fork()
        if child == 0:
            try:
                store._process_lock = None  # filelock wants one made in this process
                kill = Lines(int(line), lambda: os.kill(os.getpid(), signal.SIGKILL), _FILES)
                submit_traced(store, image, tmp_path, kill)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        server.look()
        store = open_store(cache=str(line))
        versions = store.versions(image)
        unnoted = [record for record in versions if "dicom_seg" not in record.info]
        kept, forgotten = kept + len(versions), forgotten + len(unnoted)
        sent += len(unnoted) if server.series("SEG") else 0
        store.publish_forgotten()
        assert store._outbox.retry() == 0
        noted = [record.info["dicom_seg"]["SOPInstanceUID"] for record in store.versions(image)]
        assert noted == [str(seg.SOPInstanceUID) for seg in server.series("SEG")], f"line {line} of {lines.count}"
    print(f"{lines.count} lines a submit; {kept} versions kept, {forgotten} without a note, {sent} of them sent")
    assert kept > forgotten > sent > 0


def test_a_version_without_segmentation_gets_it_after_the_next_start(
    tmp_path: Path, server: FakeDicomWeb, open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the version and its SEG; a label that only lies in the cache is nobody's submit."""
    image, found = add(server, tmp_path / "s"), add(server, tmp_path / "t")
    store = open_store()
    submit(store, image, tmp_path, segmentationMeta={"status": "draft"})
    store.get_image_uri(found)
    (store.folder / "labels" / "final").mkdir(exist_ok=True)
    shutil.copy(tmp_path / "label.nii.gz", store.folder / "labels" / "final" / f"{found}.nii.gz")
    with monkeypatch.context() as patch:
        patch.setattr(store, "_publish", lambda *_: None)
        submit(store, image, tmp_path, note="kept")
    assert store.dicom_note(image) == {}
    again = open_store()
    wait_for(lambda: again.status()["completed"] == 2)
    (seg,) = server.series("SEG")
    assert (seg.ContentDescription, seg.SOPInstanceUID) == (
        "MedVL-SAM2 labels version 2 by unknown: kept",
        again.dicom_note(image)["SOPInstanceUID"],
    )
    made = datetime.fromisoformat(again.versions(image)[1].time).astimezone()
    assert seg.ContentDate + seg.ContentTime == made.strftime("%Y%m%d%H%M%S.%f")


def test_a_draft_is_made_when_it_is_submitted(tmp_path: Path, server: FakeDicomWeb, open_store: Open) -> None:
    """Else what others stored meanwhile would be newer than it."""
    image = add(server, tmp_path / "s")
    store = open_store()
    submit(store, image, tmp_path, segmentationMeta={"status": "draft"})
    between = datetime.now().strftime("%Y%m%d%H%M%S.%f")
    time.sleep(0.01)  # times of versions are whole milliseconds
    store.update_label_info(image, "version_1", {"segmentationMeta": {"status": "approved"}})
    assert store.dicom_note(image)["made"] > between
