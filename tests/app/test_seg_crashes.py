"""A server killed at any moment of a submit over a DICOMweb server: every version that is kept has its SEG, once.

And every text its SR. As :mod:`app.test_label_crashes`: a forked child submits a label or a text and is killed before a
certain line of the code that keeps and sends it. Then the store is opened anew, as after a restart, and looks back. The
DICOM server takes no object twice.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pydicom
import pytest
import requests
from pydicom.dataset import Dataset
from tqdm import tqdm

from app.fake_dicomweb import FakeDicomWeb, Open, store_opener
from app.test_dicomweb_store import add, submit, wait_for
from app.test_label_crashes import Lines
from lib import dicomweb_images, dicomweb_store, version_files
from lib.dicom_attempt import Attempt
from lib.dicom_sr import report_text
from lib.dicomweb_store import GuardedDicomWebStore
from lib.text_reports import publish_text
from lib.text_versions import TextVersion, TextVersions

_SENDING = {"dicomweb_store.py", "dicom_outbox.py", "dicom_attempt.py"}
_LABELS = frozenset(Lines.FILES | _SENDING)
_TEXTS = frozenset({"files.py", "text_versions.py", "text_reports.py"} | _SENDING)


class KeptDicomWeb(FakeDicomWeb):
    """What a child stores is on disk, where its parent sees it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        folder.mkdir()

    def store_instances(self, documents: Sequence[Dataset]) -> Dataset:
        for document in documents:
            if str(document.SOPInstanceUID) not in self.held:
                document.save_as(self.folder / f"{document.SOPInstanceUID}.dcm", write_like_original=False)
        return super().store_instances(documents)

    def forget_objects(self) -> None:
        self.held = {uid: one for uid, one in self.held.items() if one.Modality not in ("SEG", "SR")}
        for file in self.folder.glob("*.dcm"):
            file.unlink()

    def look(self) -> None:
        """Hold what children stored."""
        for file in self.folder.glob("*.dcm"):
            self.put(pydicom.dcmread(file))


def traced(submit_one: Callable[[GuardedDicomWebStore], object], store: GuardedDicomWebStore, lines: Lines) -> None:
    """Submit with every thread traced that begins meanwhile: objects are sent in one of their own."""
    threading.settrace(lines)
    sys.settrace(lines)
    try:
        submit_one(store)
    finally:
        sys.settrace(None)
        threading.settrace(None)


def submit_text(store: GuardedDicomWebStore, image: str) -> Attempt:
    """As ``POST /medvl/texts``."""
    versions = TextVersions(store.folder)
    return publish_text(store, versions, image, versions.save(image, TextVersion("report", "Normal.", "ann", "1")))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kind", "duplicates"), [("SEG", "refused"), ("SEG", "409"), ("SR", "409")])
def test_every_version_has_its_object_once_whenever_the_server_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, duplicates: Any
) -> None:
    monkeypatch.setattr(version_files, "STALE_S", 0.0)  # nobody else writes here
    server = KeptDicomWeb(tmp_path / "server")
    server.duplicates = duplicates
    open_store = store_opener(server, tmp_path)
    image, files = add(server, tmp_path / "s"), _LABELS if kind == "SEG" else _TEXTS

    def submit_one(store: GuardedDicomWebStore) -> object:
        return submit(store, image, tmp_path) if kind == "SEG" else submit_text(store, image)

    def notes(store: GuardedDicomWebStore) -> list[Mapping[str, str] | None]:
        if kind == "SEG":
            return [record.info.get("dicom_seg") for record in store.versions(image)]
        return [text.sr for text in TextVersions(store.folder).of(image)]

    store, lines = open_store(cache="count"), Lines(0, lambda: None, files)
    store.get_image_uri(image)
    traced(submit_one, store, lines)
    kept = forgotten = sent = 0
    for line in tqdm(np.unique(np.linspace(1, lines.count, 30).astype(int)), unit="kill"):
        server.forget_objects()
        store = open_store(cache=str(line))
        store.get_image_uri(image)
        child = os.fork()
        if child == 0:
            try:
                store._process_lock = None  # filelock wants one made in this process
                traced(submit_one, store, Lines(int(line), lambda: os.kill(os.getpid(), signal.SIGKILL), files))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        server.look()
        store = open_store(cache=str(line))
        before = notes(store)
        kept, forgotten = kept + len(before), forgotten + before.count(None)
        sent += before.count(None) if server.series(kind) else 0
        store.publish_forgotten()
        assert store._outbox.retry() == 0
        noted = [note and note["SOPInstanceUID"] for note in notes(store)]
        assert noted == [str(one.SOPInstanceUID) for one in server.series(kind)], f"line {line} of {lines.count}"
    print(f"{lines.count} lines a submit; {kept} versions kept, {forgotten} without a note, {sent} of them sent")
    assert kept > forgotten > sent > 0
    assert len(server.turned_away) >= sent


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


def test_a_text_without_report_gets_it_after_the_next_start(
    tmp_path: Path, server: FakeDicomWeb, open_store: Open
) -> None:
    """Killed between the text and its SR, with its predecessor named; what cannot become one is not tried again."""
    image = add(server, tmp_path / "s")
    store, texts = open_store(), TextVersions(open_store().folder)
    submit_text(store, image)
    texts.save(image, TextVersion("report", "Better.", "ann", "1"))
    texts.save("1.2.3", TextVersion("report", "Of a series that is gone.", "ann", "1"))
    again = open_store()
    wait_for(lambda: again.status()["total"] == 1)
    first, second = (text.sr for text in texts.of(image))
    document = server.held[second["SOPInstanceUID"]]
    assert report_text(document) == "Better."
    predecessor = document.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    assert predecessor.ReferencedSOPInstanceUID == first["SOPInstanceUID"]
    assert "is not on the DICOMweb server" in texts.of("1.2.3")[0].sr["refused"]
    assert list(texts.without_sr()) == []
    assert len(server.series("SR")) == 2


@pytest.mark.parametrize("broken", [requests.ConnectionError("not now"), OSError("no space left on device")])
def test_a_failure_that_passes_is_not_for_good(
    tmp_path: Path, server: FakeDicomWeb, open_store: Open, monkeypatch: pytest.MonkeyPatch, broken: Exception
) -> None:
    """Nothing is noted, it is tried again, and what waits in the outbox does not wait for it."""
    image, other = add(server, tmp_path / "s"), add(server, tmp_path / "t")
    store = open_store()
    server.refuses = True
    submit(store, other, tmp_path)
    submit(store, image, tmp_path)
    server.refuses = False
    forget(store, image)
    fetch = server.iter_series

    def fails(*_: Any, **__: Any) -> Any:
        raise broken

    monkeypatch.setattr(server, "iter_series", fails)
    again = open_store()
    wait_for(lambda: again.status()["completed"] == 2 and again._outbox.waiting() == {})
    assert str(broken) in again.dicom_note(image)["waiting"]
    assert "dicom_seg" not in again.versions(image)[0].info
    assert submit_text(again, image).failed
    assert len(server.series("SR")) == 0
    assert again._look_back_at < math.inf
    monkeypatch.setattr(server, "iter_series", fetch)
    wait_for(lambda: again.status()["completed"] == 2 and len(server.series("SR")) == 1)
    assert again.dicom_note(image)["SOPInstanceUID"] in server.held
    wait_for(again._status_running.acquire)  # the look back is over
    assert again._look_back_at == math.inf
    assert len(server.series("SEG")) == 2


def forget(store: GuardedDicomWebStore, image: str) -> None:
    """As if the process had been killed before it sent the SEG of version 1, and the slices were gone since."""
    record = store._files.read(image, 1)
    store._outbox._file(record.info["dicom_seg"]["SOPInstanceUID"]).unlink()
    store._files.write_record(replace(record, info={k: v for k, v in record.info.items() if k != "dicom_seg"}))
    shutil.rmtree(store.folder / image)


def test_a_look_back_that_fails_keeps_nothing_from_being_sent(
    tmp_path: Path, server: FakeDicomWeb, open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, store = add(server, tmp_path / "s"), open_store()
    server.refuses = True
    submit(store, image, tmp_path)
    server.refuses = False

    def fails(*_: Any) -> Any:
        raise TimeoutError("the lock is held")

    with monkeypatch.context() as patch:
        patch.setattr(store, "publish_forgotten", fails)
        wait_for(lambda: store.status()["completed"] == 1 and store._outbox.waiting() == {})
        assert store._look_back_at < math.inf
    wait_for(lambda: store.status()["completed"] == 1 and store._look_back_at == math.inf)


def test_what_is_made_and_cannot_be_noted_is_tried_ever_more_rarely_and_told_once(
    tmp_path: Path,
    server: FakeDicomWeb,
    open_store: Open,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    image = add(server, tmp_path / "s")
    store, clock, tries = open_store(fresh_s=5.0), [1000.0], []
    with monkeypatch.context() as patch:
        patch.setattr(store, "_publish", lambda *_: None)
        submit(store, image, tmp_path)

    def full(*_: Any) -> Any:
        tries.append(clock[0])
        raise OSError("no space left on device")

    monkeypatch.setattr(dicomweb_store, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(store, "update_label_info", full)
    for _ in range(20):
        store._look_back()
        clock[0] += 5.0
    assert tries == [1000, 1005, 1015, 1035, 1075]
    # Of this project: the watcher of folders is another library, which says of its own end when it likes.
    told = [line for line in caplog.records if line.levelno >= logging.WARNING and line.name.startswith("lib.")]
    assert [(line.getMessage().startswith("version_1 of"), bool(line.exc_info)) for line in told] == [(True, True)]


def test_what_fails_again_and_again_is_tried_ever_more_rarely_and_told_once(
    tmp_path: Path,
    server: FakeDicomWeb,
    open_store: Open,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A version and a text of a series whose cached slices cannot be read; another label is not kept waiting."""
    image, other = add(server, tmp_path / "s"), add(server, tmp_path / "t")
    store, clock, tries = open_store(fresh_s=5.0), [1000.0], []

    def unreadable(*_: Any) -> Any:
        tries.append(clock[0])
        raise PermissionError("not for this server")

    monkeypatch.setattr(dicomweb_store, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with monkeypatch.context() as patch:
        for module in (dicomweb_store, dicomweb_images):
            patch.setattr(module, "source_headers", unreadable)
        submit(store, image, tmp_path)
        assert submit_text(store, image).failed
        for _ in range(200):
            store._look_back()
            clock[0] += 5.0
        pauses = [after - before for before, after in pairwise(sorted(set(tries)))]
        assert pauses == [5, 10, 20, 40, 80, 160, 300, 300]
        told = [line.getMessage() for line in caplog.records if line.levelno >= logging.WARNING]
        assert [sum(message.startswith(what) for message in told) for what in ("version_1 of", "Text 1 of")] == [1, 1]
        assert "not for this server" in store.dicom_note(image)["waiting"]
        submit(store, other, tmp_path)  # the first time it fails
    clock[0] += 5.0
    store._look_back()
    assert len(server.series("SEG")) == 2
    assert store._look_back_at == math.inf
