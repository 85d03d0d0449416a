"""Labels on their way to a DICOMweb server: what each annotator is told of the own one, and which series it is of."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import lib.server
from app.conftest import Running
from app.fake_dicomweb import FakeDicomWeb, Open
from app.phantom import phantom
from app.test_dicomweb_store import INFO, add, submit, wait_for
from lib import dicom_outbox
from lib.dicom_sr import report_text
from lib.text_reports import publish_text
from lib.text_versions import TextVersion, TextVersions
from medvl_sam2.volume_io import read_mask
from orthanc import write_series


def test_the_reply_tells_of_the_own_segmentation_whoever_saves_meanwhile(
    running: Running, tmp_path: Path, server: FakeDicomWeb, open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, store = add(server, tmp_path / "s"), open_store()
    monkeypatch.setattr(running.app, "_datastore", store)
    submit(store, image, tmp_path)
    save = store.save_label

    def overtaken(image: str, file: str, tag: str, info: dict[str, Any]) -> str:
        saved = save(image, file, tag, info)
        save(image, file, tag, {**INFO, "author": "somebody else"})
        return saved

    monkeypatch.setattr(store, "save_label", overtaken)
    note = running.submit(image, tmp_path / "label.nii.gz", **INFO).json()["dicom_seg"]
    assert note == store.dicom_note(image, "version_2")
    assert note["SOPInstanceUID"] != store.dicom_note(image)["SOPInstanceUID"]


def test_two_series_of_a_study_keep_their_labels_and_texts_apart(
    tmp_path: Path, server: FakeDicomWeb, open_store: Open
) -> None:
    """Each SEG and SR refers to its series alone, here and on another machine over the same server."""
    one, two = phantom(), phantom(oblique=False)
    first = write_series(tmp_path / "a", one.image, one.affine)
    second = write_series(tmp_path / "b", two.image[::-1], two.affine, study=first.study)
    masks = {first.series: np.where(one.labels == 5, 5, 0), second.series: np.where(two.labels == 2, 2, 0)}
    store, texts = open_store(), TextVersions(open_store().folder)
    named = {"label_info": [{**item, "value": item["idx"]} for item in INFO["label_info"]]}
    for series, whole in ((first, one), (second, two)):
        server.add(series)
        submit(store, series.series, tmp_path, replace(whole, labels=masks[series.series]), **named)
    for series in (first, second):
        text = texts.save(series.series, TextVersion("report", series.series, "ann", "1", structures=("liver",)))
        assert "SOPInstanceUID" in publish_text(store, texts, series.series, text).note
    for series in (first, second):
        slices = set(series.instances)
        (seg,) = (s for s in server.series("SEG") if s.ReferencedSeriesSequence[0].SeriesInstanceUID == series.series)
        assert seg.StudyInstanceUID == first.study
        assert {
            i.ReferencedSOPInstanceUID for i in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence
        } <= slices
        assert store.dicom_note(series.series)["SOPInstanceUID"] == seg.SOPInstanceUID
        (sr,) = (s for s in server.series("SR") if report_text(s) == series.series)
        assert texts.of(series.series)[0].sr["SOPInstanceUID"] == sr.SOPInstanceUID
        evidence = {
            one.SeriesInstanceUID
            for kind in ("CurrentRequestedProcedureEvidenceSequence", "PertinentOtherEvidenceSequence")
            for study in sr.get(kind, ())
            for one in study.ReferencedSeriesSequence
        }
        assert series.series in evidence
        assert evidence <= {series.series, seg.SeriesInstanceUID}
    for opened in (store, open_store(cache="b")):
        pairs = {Path(pair["image"]).name: pair["label"] for pair in opened.datalist()}
        for series, mask in masks.items():
            assert np.array_equal(read_mask(pairs[f"{series}.nii.gz"])[0], mask)


def test_a_server_that_hangs_keeps_no_label_from_being_saved(
    running: Running, tmp_path: Path, server: FakeDicomWeb, open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists, downloads and next samples wait for it, more than there are threads; a save waits a moment for its SEG."""
    image, other = add(server, tmp_path / "s"), add(server, tmp_path / "t")
    store = open_store()
    monkeypatch.setattr(running.app, "_datastore", store)
    submit(store, image, tmp_path)
    monkeypatch.setattr(dicom_outbox, "_ANSWER_S", 0.1)
    label = (tmp_path / "label.nii.gz").read_bytes()
    server.stalled = threading.Event()
    asked = [
        ("GET", "/medvl/cases", {}),
        ("GET", "/datastore/image", {"params": {"image": other}}),
        ("GET", "/datastore/label", {"params": {"label": other, "tag": "final"}}),
        ("GET", "/datastore/", {"params": {"output": "train"}}),
        ("POST", "/activelearning/first", {"json": {}}),
    ] * 20

    async def save() -> tuple[httpx.Response, int]:
        transport = httpx.ASGITransport(app=lib.server.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver", timeout=120) as client:
            hanging = [asyncio.create_task(client.request(method, url, **more)) for method, url, more in asked]
            await asyncio.sleep(0.5)
            sent = {"files": {"label": ("label.nii.gz", label)}, "data": {"params": json.dumps(INFO)}}
            saved = await asyncio.wait_for(client.put("/datastore/label", params={"image": image}, **sent), 30)
            listed = await asyncio.wait_for(client.get("/medvl/labels", params={"image": image}), 30)
            assert not any(one.done() for one in hanging)
            server.stalled.set()
            await asyncio.gather(*hanging)
            return saved, len(listed.json()["versions"])

    saved, versions = asyncio.run(save())
    assert (saved.status_code, versions) == (200, 2), saved.text
    assert "has not answered yet" in saved.json()["dicom_seg"]["waiting"]
    wait_for(lambda: store._outbox.retry() == 0)
    assert len(server.series("SEG")) == 2
