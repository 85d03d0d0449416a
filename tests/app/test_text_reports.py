"""Texts on their way to a DICOMweb server: kept at once whatever it does, and shown as they are there."""

from __future__ import annotations

import errno
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from app.conftest import Running
from app.fake_dicomweb import FakeDicomWeb, Open
from app.test_dicomweb_store import add, submit
from app.test_texts import store as store_text
from lib import text_reports
from lib.dicom_sr import report_text
from lib.dicomweb_session import BRIEF_S, LIMITS_S, TimedSession
from lib.dicomweb_store import GuardedDicomWebStore
from lib.text_versions import TextVersions
from medvl_sam2 import dicom_io


@pytest.fixture
def over_dicom(running: Running, open_store: Open, monkeypatch: pytest.MonkeyPatch) -> GuardedDicomWebStore:
    """The store of ``running``, over ``server``."""
    store = open_store()
    monkeypatch.setattr(running.app, "_datastore", store)
    return store


def listed(running: Running, image: str) -> list[dict[str, Any]]:
    return list(running.client.get("/medvl/texts", params={"image": image}).json()["versions"])


def damage(store_folder: Path, image: str) -> None:
    """Of version 1."""
    (store_folder / "texts" / image / "version_1.json").write_text("{")


def test_a_text_does_not_wait_for_the_header_of_the_segmentation(
    running: Running,
    tmp_path: Path,
    server: FakeDicomWeb,
    over_dicom: GuardedDicomWebStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its SR is made later, with the time that a slow server may need."""
    image = add(server, tmp_path / "s")
    submit(over_dicom, image, tmp_path)
    header, limits, silent = server.retrieve_instance_metadata, [], True

    def request(*_: Any, timeout: Any, **__: Any) -> requests.Response:
        limits.append(timeout)
        if silent:
            raise requests.ReadTimeout("it hangs")
        return requests.Response()

    def asked(*uids: str) -> Any:
        TimedSession().get("http://127.0.0.1:9/")
        return header(*uids)

    monkeypatch.setattr(requests.Session, "request", request)
    monkeypatch.setattr(server, "retrieve_instance_metadata", asked)
    stored = store_text(running, image, structures=["liver"]).json()
    assert "made later" in stored["sr_error"]
    assert "it hangs" in stored["sr_error"]
    assert (listed(running, image)[0]["text"], listed(running, image)[0]["sr"]) == ("The liver is normal.", None)
    assert listed(running, image)[0]["sr_error"] == stored["sr_error"]
    silent = False
    over_dicom._look_back()
    assert limits == [BRIEF_S, LIMITS_S]
    (document,) = server.series("SR")
    assert listed(running, image)[0]["sr"]["SOPInstanceUID"] == document.SOPInstanceUID
    assert listed(running, image)[0]["sr_error"] is None
    (evidence,) = document.CurrentRequestedProcedureEvidenceSequence
    assert server.series("SEG")[0].SeriesInstanceUID in [
        one.SeriesInstanceUID for one in evidence.ReferencedSeriesSequence
    ]


def test_a_text_is_kept_while_the_server_hangs_that_should_send_its_series(
    running: Running, tmp_path: Path, server: FakeDicomWeb, over_dicom: GuardedDicomWebStore
) -> None:
    """Also while another request waits for that series."""
    image = add(server, tmp_path / "s")
    assert over_dicom.list_images() == [image]
    server.stalled = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        try:
            opening = pool.submit(over_dicom.get_image_uri, image)
            stored = pool.submit(store_text, running, image).result(20)
            assert pool.submit(listed, running, image).result(20)[0]["sr_error"] == stored.json()["sr_error"]
            assert not opening.done()
        finally:
            server.stalled.set()
    assert (stored.status_code, stored.json()["sr"]) == (200, None)
    assert "not fetched yet" in stored.json()["sr_error"]
    over_dicom._look_back()
    (document,) = server.series("SR")
    assert listed(running, image)[0]["sr"]["SOPInstanceUID"] == document.SOPInstanceUID


def test_a_text_does_not_wait_for_who_lists_all_series(
    running: Running, tmp_path: Path, server: FakeDicomWeb, over_dicom: GuardedDicomWebStore
) -> None:
    image = add(server, tmp_path / "s")
    with ThreadPoolExecutor(1) as pool, over_dicom._catalog._lock:
        stored = pool.submit(store_text, running, image).result(20)
    assert stored.status_code == 200


def test_a_text_about_a_series_that_nobody_can_be_asked_about_is_kept(
    running: Running, tmp_path: Path, server: FakeDicomWeb, over_dicom: GuardedDicomWebStore
) -> None:
    assert store_text(running, "1.2.3").status_code == 404
    assert store_text(running, "nobody").status_code == 404
    server.down = True
    assert store_text(running, "1.2.3").json()["version"] == 1
    assert store_text(running, "nobody").status_code == 404


@pytest.mark.parametrize(("status", "stands"), [(404, True), (503, False)])
def test_the_report_of_a_text_whose_segmentation_was_deleted_refers_to_none(
    running: Running,
    tmp_path: Path,
    server: FakeDicomWeb,
    over_dicom: GuardedDicomWebStore,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    stands: bool,
) -> None:
    """A server that fails for now may have it."""
    image = add(server, tmp_path / "s")
    submit(over_dicom, image, tmp_path)

    def asked(*_: str) -> Any:
        answer = requests.Response()
        answer.status_code = status
        raise requests.HTTPError(f"{status} Error", response=answer)

    monkeypatch.setattr(server, "retrieve_instance_metadata", asked)
    stored = store_text(running, image, structures=["liver"]).json()
    assert bool(stored["sr"]) is stands
    assert bool(stored["sr_error"]) is not stands
    unnoted = [text.version for _, text in TextVersions(over_dicom.folder).without_sr()]
    assert unnoted == ([] if stands else [1])
    reports = server.series("SR")
    assert len(reports) == int(stands)
    segmentation = str(server.series("SEG")[0].SOPInstanceUID)
    assert all(segmentation not in report.to_json() for report in reports)


@pytest.mark.parametrize(
    ("error", "passes"),
    [(OSError(errno.EIO, "Input/output error"), True), (OSError("unexpected end"), False), (EOFError(), False)],
    ids=["disk", "content", "end"],
)
def test_slices_that_cannot_be_read_for_now_do_not_refuse_a_report_for_good(
    running: Running,
    tmp_path: Path,
    server: FakeDicomWeb,
    over_dicom: GuardedDicomWebStore,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    passes: bool,
) -> None:
    image = add(server, tmp_path / "s")
    over_dicom.get_image_uri(image)

    def fails(*_: Any, **__: Any) -> Any:
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(dicom_io.pydicom, "dcmread", fails)
        assert store_text(running, image).json()["sr"] is None
    over_dicom._look_back()
    assert len(server.series("SR")) == int(passes)


def test_the_outbox_is_listed_once_for_all_texts(
    running: Running,
    tmp_path: Path,
    server: FakeDicomWeb,
    over_dicom: GuardedDicomWebStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = add(server, tmp_path / "s")
    over_dicom.get_image_uri(image)
    server.refuses = True
    for _ in range(3):
        store_text(running, image)
    looks, waiting = [], over_dicom._outbox.waiting
    monkeypatch.setattr(over_dicom._outbox, "waiting", lambda: looks.append(1) or waiting())
    assert ["failure reason" in text["sr"]["waiting"] for text in listed(running, image)] == [True] * 3
    assert len(looks) == 1


def test_a_damaged_text_is_passed_over_by_the_next_one(
    running: Running,
    tmp_path: Path,
    server: FakeDicomWeb,
    over_dicom: GuardedDicomWebStore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    image = add(server, tmp_path / "s")
    over_dicom.get_image_uri(image)
    store_text(running, image, text="Damaged.")
    second = store_text(running, image, text="Whole.").json()["sr"]
    damage(over_dicom.folder, image)
    with caplog.at_level(logging.WARNING):
        third = store_text(running, image, text="New.").json()
    assert third["sr_error"] is None
    assert "version_1.json" in caplog.text
    document = server.held[third["sr"]["SOPInstanceUID"]]
    assert report_text(document) == "New."
    (before,) = document.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert before.ReferencedSOPInstanceUID == second["SOPInstanceUID"]


def test_a_text_that_was_sent_since_waits_no_more(
    running: Running, tmp_path: Path, server: FakeDicomWeb, over_dicom: GuardedDicomWebStore
) -> None:
    image = add(server, tmp_path / "s")
    over_dicom.get_image_uri(image)
    server.down = True
    reply = store_text(running, image).json()["sr"]
    assert "nobody answers" in reply["waiting"]
    assert listed(running, image)[0]["sr"] == reply
    server.down, server.refuses = False, True
    over_dicom._outbox.retry()
    assert "failure reason" in listed(running, image)[0]["sr"]["waiting"]
    server.refuses = False
    assert over_dicom._outbox.retry() == 0
    assert listed(running, image)[0]["sr"] == {key: value for key, value in reply.items() if key != "waiting"}


def test_a_folder_of_files_has_no_place_for_a_report(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is made, so nothing fails."""

    def fails(*_: Any) -> Any:
        raise OSError("no space left on device")

    store_text(running, text="Damaged.")
    damage(running.studies, "case_a")
    monkeypatch.setattr(text_reports, "store_report_sr", fails)
    reply = store_text(running)
    assert (reply.status_code, reply.json()["sr"], reply.json()["sr_error"]) == (200, None, None)
    assert TextVersions(running.studies).readable("case_a")[0].sr is None
