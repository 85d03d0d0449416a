"""Questions and reports over HTTP, with the structures they rest on; corrected texts as versions."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from monailabel.config import settings
from monailabel.endpoints.user.auth import User

from app.conftest import SHAPE, Running
from app.test_infer import _nrrd
from lib import text_reports
from lib.api import texts
from lib.dicom_sr import Report, StoredReport
from lib.text_versions import TextVersion, TextVersions
from medvl_sam2.errors import DataError, PromptError


def store(running: Running, image: str = "case_a", **fields: Any) -> Any:
    body = {"kind": "report", "text": "The liver is normal.", "author": "ann", **fields}
    return running.client.post("/medvl/texts", params={"image": image}, json=body)


def test_an_answer_names_what_it_rests_on(running: Running) -> None:
    reply = running.client.post("/medvl/texts/ask", json={"image": "case_a", "question": "is the liver normal?"})
    assert reply.status_code == 200
    answer = reply.json()
    assert answer["answer"].startswith("No, to")
    assert answer["model_version"] == "shipped-1"
    assert [(item["name"], item["voxels"]) for item in answer["evidence"]] == [("liver", 2), ("spleen", 0)]
    assert answer["evidence"][0]["centroid_voxel"] == [1, 2, 3.5]
    assert answer["evidence"][1]["centroid_voxel"] is None
    assert "not found" in answer["evidence"][1]["why"]


def test_a_report_comes_in_sentences(running: Running) -> None:
    report = running.client.post("/medvl/texts/report", json={"image": "case_a", "client_id": "ann"}).json()
    assert report["text"] == "Liver: normal. Spleen: normal."
    assert [sentence["text"] for sentence in report["sentences"]] == ["Liver: normal.", "Spleen: normal."]
    assert [len(sentence["evidence"]) for sentence in report["sentences"]] == [2, 0]


@pytest.mark.parametrize("compress", [True, False])
def test_evidence_has_a_mask_on_the_images_grid(running: Running, compress: bool) -> None:
    query = {"image": "case_a", "name": "liver", "compress": compress}
    values, header = _nrrd(running.client.get("/medvl/texts/mask", params=query).content)
    assert values.shape == SHAPE
    assert np.argwhere(values).tolist() == [[1, 2, 3], [1, 2, 4]]
    assert header["encoding"] == ("gzip" if compress else "raw")


@pytest.mark.parametrize(
    ("method", "path", "sent", "status", "reason"),
    [
        ("get", "/medvl/texts/mask", {"params": {"image": "case_a", "name": "spleen"}}, 404, "not found in the image"),
        ("get", "/medvl/texts/mask", {"params": {"image": "nobody", "name": "liver"}}, 404, "not in the datastore"),
        ("post", "/medvl/texts/ask", {"json": {"image": "../../etc", "question": "?"}}, 404, "not in the datastore"),
        ("post", "/medvl/texts/report", {"json": {"image": ""}}, 404, "not in the datastore"),
        ("post", "/medvl/texts/ask", {"json": {"image": "case_a", "question": "x" * 20_000}}, 422, "at most 10000"),
        ("get", "/medvl/texts", {"params": {"image": "nobody"}}, 404, "not in the datastore"),
    ],
)
def test_refusals_state_a_reason(
    running: Running, method: str, path: str, sent: dict[str, Any], status: int, reason: str
) -> None:
    reply = running.client.request(method, path, **sent)
    assert reply.status_code == status
    assert reason in reply.text


def test_texts_are_kept_as_versions(running: Running) -> None:
    first = store(running, draft="The liver has a cyst.", note="no cyst").json()
    assert (first["version"], first["sr"], len(first["checksum"])) == (1, None, 64)
    assert store(running, text="Better.", author="bob", model_version="9").json()["version"] == 2
    assert store(running, kind="answer", text="no", question="Is there a lesion?").json()["version"] == 3
    listed = running.client.get("/medvl/texts", params={"image": "case_a"}).json()
    assert listed["image"] == "case_a"
    assert [(v["version"], v["kind"], v["author"]) for v in listed["versions"]] == [
        (1, "report", "ann"),
        (2, "report", "bob"),
        (3, "answer", "ann"),
    ]
    assert listed["versions"][0] | first == listed["versions"][0]  # what was acknowledged is what is kept
    assert listed["versions"][0]["draft"] == "The liver has a cyst."
    assert [v["model_version"] for v in listed["versions"]] == ["shipped", "9", "shipped"]
    assert running.client.get("/medvl/texts", params={"image": "case_b"}).json()["versions"] == []
    assert running.client.get("/datastore/").json()["total"] == 2  # no text is taken for an image


@pytest.mark.parametrize(
    ("fields", "status", "reason"),
    [
        ({"text": "  "}, 400, "text is empty"),
        ({"kind": "answer"}, 400, "without its question"),
        ({"kind": "poem"}, 422, "kind"),
        ({"author": ""}, 422, "author"),
        ({"text": "x" * 20_001}, 422, "20000"),
        ({"image": "nobody"}, 404, "not in the datastore"),
    ],
)
def test_texts_that_are_refused(running: Running, fields: dict[str, Any], status: int, reason: str) -> None:
    reply = store(running, **fields)
    assert (reply.status_code, reason in reply.text) == (status, True)
    assert running.client.get("/medvl/texts", params={"image": "case_a"}).json()["versions"] == []


def test_on_a_dicom_server_a_text_becomes_a_structured_report(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[Report] = []

    def made(datastore: Any, image: str, report: Report) -> StoredReport:
        reports.append(report)
        return StoredReport("1.1", "1.2", f"1.3.{len(reports)}", "the server is away" if len(reports) == 2 else None)

    monkeypatch.setattr(running.app.datastore(), "source_headers", None, raising=False)  # as such a server's has
    monkeypatch.setattr(text_reports, "store_report_sr", made)
    first = store(running, draft="A draft.", structures=["liver"]).json()
    assert first["sr"] == {"StudyInstanceUID": "1.1", "SeriesInstanceUID": "1.2", "SOPInstanceUID": "1.3.1"}
    assert (reports[0].structures, reports[0].model_version, reports[0].replaces) == (("liver",), "shipped", None)
    second = store(running).json()
    assert second["sr"]["waiting"] == "the server is away"
    assert reports[1].replaces == StoredReport("1.1", "1.2", "1.3.1")
    assert reports[1].model_version is None  # nothing was drafted
    store(running, kind="answer", text="no", question="Is there a lesion?")
    assert reports[2].replaces is None  # another text
    listed = running.client.get("/medvl/texts", params={"image": "case_a"}).json()["versions"]
    assert listed[0]["sr"] == first["sr"]

    def fails(*_: Any) -> StoredReport:
        raise DataError("the images have no StudyInstanceUID")

    monkeypatch.setattr(text_reports, "store_report_sr", fails)
    reply = store(running)
    assert (reply.status_code, reply.json()["version"]) == (200, 4)  # stored all the same
    assert "StudyInstanceUID" in reply.json()["sr_error"]


def test_with_a_login_the_author_is_who_is_logged_in(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "MONAI_LABEL_AUTH_ENABLE", True)
    sent = texts.TextUpload(kind="report", text="The liver is normal.", author="somebody else")
    texts.store_text("case_a", sent, User(username="ada"))
    assert [version.author for version in TextVersions(running.studies).of("case_a")] == ["ada"]


def test_many_writers_get_a_version_each(tmp_path: Path) -> None:
    def write(author: str) -> None:
        for number in range(5):
            TextVersions(tmp_path).save("case", TextVersion("report", f"{author} {number}", author, "1"))

    writers = [threading.Thread(target=write, args=(f"author {n}",)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    kept = TextVersions(tmp_path).of("case")
    assert [version.version for version in kept] == list(range(1, 21))
    assert len({version.text for version in kept}) == 20


@pytest.mark.parametrize("image", ["..", "../../x", "a/b", ".hidden", "Fall 7 (äöü)", "%2E"])
def test_no_image_id_leaves_the_folder(tmp_path: Path, image: str) -> None:
    versions = TextVersions(tmp_path / "store")
    versions.save(image, TextVersion("report", "Kept.", "ann", "1"))
    assert [version.text for version in versions.of(image)] == ["Kept."]
    assert versions.of("other") == []
    files = list(tmp_path.rglob("*.json"))
    assert [path.parent.parent for path in files] == [tmp_path / "store" / "texts"]


def test_a_changed_text_is_found_out(tmp_path: Path) -> None:
    versions = TextVersions(tmp_path)
    versions.save("case", TextVersion("report", "The liver is normal.", "ann", "1"))
    file = tmp_path / "texts" / "case" / "version_1.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "text": "The liver is gone."}))
    with pytest.raises(DataError, match="checksum"):
        versions.of("case")
    file.write_text("{")
    with pytest.raises(DataError, match="backup"):
        versions.of("case")
    with pytest.raises(PromptError, match="at most"):
        TextVersion("report", "x" * 20_001, "ann", "1")
