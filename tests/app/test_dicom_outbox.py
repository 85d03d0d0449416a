"""Objects on their way to a DICOMweb server that is slow, away or busy."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pydicom
import pytest
import requests
from monailabel.datastore.dicom import DICOMwebClientX
from pydicom.dataset import Dataset
from requests.adapters import HTTPAdapter

from app.fake_dicomweb import FakeDicomWeb
from app.phantom import phantom
from lib import dicom_outbox
from lib.dicom_objects import is_uid
from lib.dicom_outbox import Outbox
from lib.dicomweb_session import TimedSession, briefly
from orthanc import write_series

_FAILED_JSON = '{"00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [REASON]}}]}}'
_FAILED_XML = (
    '<NativeDicomModel><DicomAttribute tag="00081198" vr="SQ" keyword="FailedSOPSequence"><Item number="1">'
    '<DicomAttribute tag="00081197" vr="US" keyword="FailureReason"><Value number="1">REASON</Value></DicomAttribute>'
    "</Item></DicomAttribute></NativeDicomModel>"
)


def test_outbox_asks_a_server_that_is_away_once(tmp_path: Path, server: FakeDicomWeb) -> None:
    asked = []

    def store(documents: list[Dataset]) -> Dataset:
        asked.append(documents)
        return server.store_instances(documents)

    box, (first, second) = Outbox(tmp_path / "box", store, server.holds), documents(tmp_path)
    server.down = True
    for document in (first, second):
        assert "nobody answers" in str(box.send(document))
    asked.clear()
    assert (box.retry(), len(asked)) == (2, 1)
    server.down = False
    assert (box.retry(), box.waiting()) == (0, {})
    assert box.read(str(first.SOPInstanceUID)) is None


def test_an_object_does_not_wait_long_for_another(
    tmp_path: Path, server: FakeDicomWeb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dicom_outbox, "_PATIENCE_S", 0.05)
    busy, go_on = threading.Event(), threading.Event()

    def slow(sent: list[Dataset]) -> Dataset:
        busy.set()
        assert go_on.wait(20)
        return server.store_instances(sent)

    box, (first, second) = Outbox(tmp_path / "box", slow, server.holds), documents(tmp_path)
    sender = threading.Thread(target=box.send, args=(first,))
    sender.start()
    assert busy.wait(20)
    assert box.send(second) == "another object is being sent; this one follows"
    go_on.set()
    sender.join()
    assert list(box.waiting()) == [str(second.SOPInstanceUID)]
    assert box.retry() == 0


def test_an_object_that_somebody_else_sent_is_no_failure(
    tmp_path: Path, server: FakeDicomWeb, monkeypatch: pytest.MonkeyPatch
) -> None:
    box, (first, _) = Outbox(tmp_path / "box", server.store_instances, server.holds), documents(tmp_path)
    server.down = True
    box.send(first)
    (file,) = box._files()
    monkeypatch.setattr(box, "_files", lambda: [file])
    file.unlink()
    assert (box.retry(), box.waiting()) == (0, {})


@pytest.mark.parametrize("answer", ["refused", "409"])
def test_what_the_server_has_already_has_arrived(tmp_path: Path, server: FakeDicomWeb, answer: Any) -> None:
    """Killed after it was sent and before that was noted, it is sent again; servers refuse that in two ways."""
    box, (first, _) = Outbox(tmp_path / "box", server.store_instances, server.holds), documents(tmp_path)
    server.duplicates = answer
    assert [box.send(first), box.send(first), box.waiting()] == [None, None, {}]
    assert (list(server.held), server.turned_away) == ([first.SOPInstanceUID], [first.SOPInstanceUID])


@pytest.mark.parametrize("known", [False, requests.HTTPError("404"), requests.ConnectionError("away")])
def test_a_conflict_over_what_the_server_has_not_got_is_a_refusal(
    tmp_path: Path, server: FakeDicomWeb, known: Any
) -> None:
    def has(document: Dataset) -> bool:
        if isinstance(known, Exception):
            raise known
        return bool(known)

    box, (first, _) = Outbox(tmp_path / "box", server.store_instances, has), documents(tmp_path)
    server.duplicates = "409"
    server.put(first)
    assert "refused it: 409" in str(box.send(first))
    assert list(box.waiting()) == [first.SOPInstanceUID]


def test_nobody_waits_for_a_server_that_hangs(
    tmp_path: Path, server: FakeDicomWeb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dicom_outbox, "_PATIENCE_S", 0.05)
    monkeypatch.setattr(dicom_outbox, "_ANSWER_S", 0.05)
    box, both = Outbox(tmp_path / "box", server.store_instances, server.holds), documents(tmp_path)
    server.stalled = threading.Event()
    reasons = [str(box.send(document)) for document in both]
    assert "has not answered yet" in reasons[0]
    assert "another object is being sent" in reasons[1]
    assert len(box.waiting()) == 2
    server.stalled.set()
    while box.retry():
        pass
    assert set(server.held) == {document.SOPInstanceUID for document in both}


def documents(folder: Path) -> list[Dataset]:
    """Two small DICOM objects."""
    one = phantom()
    return [pydicom.dcmread(file) for file in write_series(folder / "two", one.image, one.affine).files[:2]]


@pytest.mark.parametrize(("text", "uid"), [("1.2.840", True), ("..", False), ("1..2", False), ("1" * 65, False)])
def test_what_a_uid_is(text: str, uid: bool) -> None:
    assert is_uid(text) is uid


def test_the_client_gives_up_on_a_server_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def request(*_: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        raise requests.ConnectTimeout("too slow")

    monkeypatch.setattr(requests.Session, "request", request)
    with pytest.raises(requests.ConnectTimeout):
        TimedSession().get("http://127.0.0.1:9/")
    assert seen["timeout"] == (5.0, 120.0)
    with briefly(), pytest.raises(requests.ConnectTimeout):
        TimedSession().get("http://127.0.0.1:9/")
    assert sum(seen["timeout"]) == dicom_outbox._PATIENCE_S + dicom_outbox._ANSWER_S
    with pytest.raises(requests.ConnectTimeout):
        TimedSession().get("http://127.0.0.1:9/")
    assert seen["timeout"] == (5.0, 120.0)


@pytest.mark.filterwarnings("ignore:A value of type 'str'")  # the client's way with XML
@pytest.mark.parametrize(("reason", "waits"), [(0x0110, True), (0x0111, False)], ids=["refused", "duplicate"])
@pytest.mark.parametrize(
    "kind",
    [
        "application/dicom+json",
        "application/json",
        "application/dicom+json; charset=utf-8",
        "Application/DICOM+JSON;charset=UTF-8",
        "application/dicom+xml",
        "application/dicom+xml; charset=utf-8",
    ],
)
def test_a_reply_is_read_whatever_its_content_type_says_besides(
    tmp_path: Path, server: FakeDicomWeb, kind: str, reason: int, waits: bool
) -> None:
    """Else a refused object would be taken for one that the server has, and dropped."""
    first, _ = documents(tmp_path)

    class Refuses(HTTPAdapter):
        def send(self, request: Any, *_: Any, **__: Any) -> requests.Response:
            reply = requests.Response()
            reply.status_code, reply.headers["Content-Type"], reply.request = 200, kind, request
            reply._content = (_FAILED_XML if "xml" in kind else _FAILED_JSON).replace("REASON", str(reason)).encode()
            return reply

    session = TimedSession()
    session.mount("http://", Refuses())
    client = DICOMwebClientX("http://127.0.0.1:9/dicom-web", session)
    box = Outbox(tmp_path / "box", client.store_instances, server.holds)
    assert box.send(first) == (f"the DICOMweb server refused it with failure reason {reason}" if waits else None)
    assert list(box.waiting()) == ([first.SOPInstanceUID] if waits else [])
