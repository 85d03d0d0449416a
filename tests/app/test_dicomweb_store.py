"""The store of a DICOMweb server: what it lists, how labels go there and come back, and what it says when it cannot."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from fastapi import HTTPException
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import RLELossless

from app.conftest import Running
from app.fake_dicomweb import FakeDicomWeb, Open, anew
from app.phantom import Phantom, phantom
from app.segs import renumbered
from lib import dicomweb_store
from lib.dicom_seg import LabelOrigin, build_segmentation
from lib.dicomweb_store import GuardedDicomWebStore
from lib.label_names import stored_names
from medvl_sam2.volume_io import read_mask, read_volume, write_mask
from orthanc import WrittenSeries, write_series

LATER = "29991231235959"
BEFORE = "19991231235959"
INFO = {"label_info": [{"name": "kidney_right", "idx": 2}, {"name": "liver", "idx": 5}, {"name": "lesion", "idx": 17}]}


def wait_for(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def add(server: FakeDicomWeb, folder: Path, modality: str = "CT", one: Phantom | None = None, **tags: Any) -> str:
    one = one or phantom()
    series = write_series(folder, one.image, one.affine, modality, **tags)
    server.add(series)
    return series.series


def submit(store: GuardedDicomWebStore, image: str, folder: Path, one: Phantom | None = None, **info: Any) -> None:
    """As a client does: a mask on the grid of the image it was sent."""
    geometry = read_volume(store.get_image_uri(image)).geometry
    write_mask(folder / "label.nii.gz", (one or phantom()).displayed().labels, geometry)
    store.save_label(image, str(folder / "label.nii.gz"), "final", {**INFO, **info})


def final_mask(store: GuardedDicomWebStore, image: str) -> np.ndarray:
    return read_mask(store.get_label_uri(image, "final"))[0]


def others(folder: Path, server: FakeDicomWeb, image: str, labels: np.ndarray, made: str) -> Dataset:
    """A segmentation of ``labels`` that another program stored for ``image``."""
    headers = sorted(
        (d for d in server.held.values() if d.SeriesInstanceUID == image),
        key=lambda d: float(
            np.cross(d.ImageOrientationPatient[:3], d.ImageOrientationPatient[3:]) @ d.ImagePositionPatient
        ),
    )
    names = {2: "right kidney", 5: "Liver", 17: "metastasis"}
    seg = build_segmentation(headers, labels, names, LabelOrigin("Elsewhere^Anna"))
    other = anew(renumbered(seg), made)
    server.put(other)
    return other


# --- listing ----------------------------------------------------------------------------------------------------------


def test_ct_and_mr_are_images_and_nothing_else(tmp_path: Path, server: FakeDicomWeb, open_store: Open) -> None:
    ct, mr = add(server, tmp_path / "ct"), add(server, tmp_path / "mr", "MR")
    store = open_store()
    submit(store, ct, tmp_path)
    assert sorted(store.list_images()) == sorted([ct, mr])
    assert sorted(open_store(search_filter={}).list_images()) == sorted([ct, mr])
    assert open_store(search_filter={"Modality": "MR"}).list_images() == [mr]
    assert open_store(search_filter={"Modality": "MR", "PatientID": "nobody"}).list_images() == []


def test_new_studies_are_seen_when_the_list_is_old(tmp_path: Path, server: FakeDicomWeb, open_store: Open) -> None:
    slow, quick = open_store(fresh_s=3600.0), open_store(cache="b", fresh_s=0.2)
    assert slow.list_images() == quick.list_images() == []
    image = add(server, tmp_path / "s")
    wait_for(lambda: quick.list_images() == [image])
    asked = len(server.asked)
    assert slow.list_images() == []
    assert len(server.asked) == asked
    slow.datalist()
    assert slow.list_images() == [image]
    assert len(server.asked) == asked + 3, "CT, MR and SEG once"


def test_status_follows_without_waiting_for_the_server(tmp_path: Path, server: FakeDicomWeb, open_store: Open) -> None:
    store = open_store()
    add(server, tmp_path / "s")
    wait_for(lambda: store.status()["total"] == 1)
    server.down = True
    assert store.status()["total"] == 1


def test_server_that_fails_is_explained(tmp_path: Path, server: FakeDicomWeb, open_store: Open) -> None:
    image = add(server, tmp_path / "s")
    store = open_store()
    server.down = True
    for ask in (store.list_images, lambda: store.get_image_uri(image)):
        with pytest.raises(HTTPException) as caught:
            ask()
        assert caught.value.status_code == 502
        assert "nobody answers" in caught.value.detail


# --- images -----------------------------------------------------------------------------------------------------------


def test_series_is_converted_with_its_grid(tmp_path: Path, server: FakeDicomWeb, open_store: Open) -> None:
    truth = phantom().stored((2, 0, 1), (1, -1, -1))
    image = add(server, tmp_path / "s", "MR", truth)
    volume = read_volume(open_store().get_image_uri(image))
    assert np.array_equal(truth.at(volume.geometry, volume.array), truth.image)


def test_study_with_several_series_works_by_series(tmp_path: Path, server: FakeDicomWeb, open_store: Open) -> None:
    first, second = phantom(), phantom(oblique=False)
    one = write_series(tmp_path / "a", first.image, first.affine)
    two = write_series(tmp_path / "b", second.image[::-1], second.affine, study=one.study)
    for series in (one, two):
        server.add(series)
    store = open_store()
    assert np.array_equal(read_volume(store.get_image_uri(one.series)).array, first.image)
    assert np.array_equal(read_volume(store.get_image_uri(two.series)).array, second.image[::-1])
    submit(store, two.series, tmp_path)
    assert store.get_labeled_images() == [two.series]
    assert server.series("SEG")[0].StudyInstanceUID == one.study


@pytest.mark.parametrize("image", ["1.2.3", "../etc", "case_a", ""])
def test_unknown_series_is_no_image(open_store: Open, image: str) -> None:
    assert open_store().get_image_uri(image) == ""


def spoiled(folder: Path, kind: str) -> WrittenSeries:
    one = phantom(oblique=False)
    if kind == "gap":
        series = write_series(folder, one.image, one.affine)
        return WrittenSeries(series.study, series.series, series.instances, (*series.files[:2], *series.files[3:]))
    tilted = one.affine.copy()
    tilted[1, 2] = 0.8
    return write_series(folder, one.image, tilted)


@pytest.mark.parametrize(("kind", "reason"), [("gap", "slice distances vary"), ("tilt", "gantry is tilted")])
def test_refused_series_says_why_and_is_not_served_again(
    tmp_path: Path, server: FakeDicomWeb, open_store: Open, kind: str, reason: str
) -> None:
    series = spoiled(tmp_path / "bad", kind)
    server.add(series)
    good = add(server, tmp_path / "good")
    store = open_store()
    assert sorted(store.get_unlabeled_images()) == sorted([good, series.series])
    with pytest.raises(HTTPException, match=reason) as caught:
        store.get_image_uri(series.series)
    assert caught.value.status_code == 415
    assert str(tmp_path) not in caught.value.detail
    assert store.get_unlabeled_images() == [good]
    assert reason in store.get_image_info(series.series)["refused"]


def test_series_that_grows_is_fetched_again(tmp_path: Path, server: FakeDicomWeb, open_store: Open) -> None:
    one = phantom()
    series = write_series(tmp_path / "s", one.image, one.affine)
    server.add(WrittenSeries(series.study, series.series, series.instances[:3], series.files[:3]))
    store = open_store()
    assert read_volume(store.get_image_uri(series.series)).array.shape == (7, 9, 3)
    server.add(series)
    store.list_images()
    assert read_volume(store.get_image_uri(series.series)).array.shape == (7, 9, 5)
    submit(store, series.series, tmp_path)
    more = write_series(tmp_path / "more", one.image, one.affine, SeriesInstanceUID=series.series)
    server.add(more)
    store.list_images()
    assert read_volume(store.get_image_uri(series.series)).array.shape == (7, 9, 5), "it is labelled"


def test_one_slice_is_a_volume_of_one_slice(tmp_path: Path, server: FakeDicomWeb, open_store: Open) -> None:
    one = phantom()
    thin = Phantom(one.image[:, :, :1], one.labels[:, :, 1:2], one.affine)
    image = add(server, tmp_path / "s", one=thin)
    store = open_store()
    submit(store, image, tmp_path, thin)
    assert store.dicom_note(image)["SeriesInstanceUID"] == server.series("SEG")[0].SeriesInstanceUID


# --- labels to the server ---------------------------------------------------------------------------------------------


def test_every_submit_is_a_segmentation_and_one_completed_image(
    tmp_path: Path, server: FakeDicomWeb, open_store: Open
) -> None:
    image, other = add(server, tmp_path / "s"), add(server, tmp_path / "t")
    store = open_store()
    submit(store, image, tmp_path, client_id="reader1")
    submit(store, image, tmp_path, client_id="reader2")
    segs = server.series("SEG")
    assert sorted(str(seg.ContentCreatorName) for seg in segs) == ["reader1^", "reader2^"]
    assert store.get_labeled_images() == [image]
    assert store.get_unlabeled_images() == [other]
    wait_for(lambda: store.status()["total"] == 2)
    assert store.status()["completed"] == 1
    assert len(store.get_image_info(image)["segmentations"]) == 2
    assert store.stored_segmentation(image).SOPInstanceUID == segs[1].SOPInstanceUID


@pytest.mark.parametrize(("state", "reason"), [("down", "nobody answers"), ("refuses", "refused it with failure")])
def test_server_that_takes_nothing_loses_nothing(
    tmp_path: Path, server: FakeDicomWeb, open_store: Open, state: str, reason: str
) -> None:
    image = add(server, tmp_path / "s")
    store = open_store()
    store.get_image_uri(image)
    setattr(server, state, True)
    submit(store, image, tmp_path)
    assert reason in store.dicom_note(image)["waiting"]
    assert store.stored_segmentation(image).SegmentSequence[1].SegmentLabel == "liver"
    assert read_mask(store.folder / "labels" / "final" / f"{image}.nii.gz")[0].any()
    setattr(server, state, False)
    again = open_store()  # after a restart
    assert again.dicom_note(image)["waiting"] == "not sent yet"
    assert len(again.datalist()) == 1
    assert "waiting" not in again.dicom_note(image)
    assert [str(d.SOPInstanceUID) for d in server.series("SEG")] == [again.dicom_note(image)["SOPInstanceUID"]]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        ({"FrameOfReferenceUID": None}, "has no FrameOfReferenceUID"),
        ({"LossyImageCompression": "01"}, "headers do not allow a DICOM SEG"),
    ],
)
def test_images_that_allow_no_segmentation_keep_their_label_here(
    tmp_path: Path, server: FakeDicomWeb, open_store: Open, spoil: dict[str, Any], reason: str
) -> None:
    image = add(server, tmp_path / "s", **spoil)
    store = open_store()
    submit(store, image, tmp_path)
    assert reason in store.dicom_note(image)["refused"]
    assert np.array_equal(final_mask(store, image), phantom().labels)
    assert not server.series("SEG")


def test_empty_label_is_kept_here_and_says_so(tmp_path: Path, server: FakeDicomWeb, open_store: Open) -> None:
    image, one = add(server, tmp_path / "s"), phantom()
    store = open_store()
    submit(store, image, tmp_path, Phantom(one.image, np.zeros_like(one.labels), one.affine))
    assert "label is empty" in store.dicom_note(image)["refused"]
    assert store.get_labeled_images() == [image]


def test_a_draft_stays_here_until_it_is_submitted(tmp_path: Path, server: FakeDicomWeb, open_store: Open) -> None:
    image = add(server, tmp_path / "s")
    store = open_store()
    submit(store, image, tmp_path, segmentationMeta={"status": "draft"})
    assert (server.series("SEG"), store.get_labeled_images(), store.dicom_note(image)) == ([], [], {})
    store.update_label_info(image, "version_1", {"segmentationMeta": {"status": "approved"}})
    assert [str(seg.SOPInstanceUID) for seg in server.series("SEG")] == [store.dicom_note(image)["SOPInstanceUID"]]
    assert store.get_labeled_images() == [image]


@pytest.mark.parametrize("fails", ["store_instances", "writing"])
def test_no_failure_takes_back_a_kept_label(
    tmp_path: Path, server: FakeDicomWeb, open_store: Open, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no answer this client knows")

    image = add(server, tmp_path / "s")
    if fails == "writing":
        monkeypatch.setattr(dicomweb_store, "build_segmentation", broken)
    else:
        monkeypatch.setattr(server, fails, broken)
    store = open_store()
    submit(store, image, tmp_path)
    note = store.dicom_note(image)
    assert "no answer this client knows" in note["refused" if fails == "writing" else "waiting"]
    assert store.final_version(image) == 1


def test_reply_to_a_label_says_what_became_of_its_segmentation(
    running: Running, tmp_path: Path, server: FakeDicomWeb, open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = add(server, tmp_path / "s")
    store = open_store()
    monkeypatch.setattr(running.app, "_datastore", store)
    submit(store, image, tmp_path)
    server.refuses = True
    with open(tmp_path / "label.nii.gz", "rb") as stream:
        reply = running.client.post(
            "/medvl/labels",
            params={"image": image},
            data={"params": json.dumps(INFO)},
            files={"label": ("label.nii.gz", stream)},
        )
    assert reply.status_code == 200, reply.text
    assert "refused it with failure" in reply.json()["dicom_seg"]["waiting"]
    first, second = running.client.get("/medvl/labels", params={"image": image}).json()["versions"]
    assert "waiting" not in first["dicom_seg"]
    assert second == reply.json()
    restored = running.client.post("/medvl/labels/restore", params={"image": image, "version": 1}, json={})
    assert "refused it with failure" in restored.json()["dicom_seg"]["waiting"]


# --- labels from the server -------------------------------------------------------------------------------------------


def test_segmentation_of_others_becomes_the_label_by_name(
    tmp_path: Path, server: FakeDicomWeb, open_store: Open
) -> None:
    truth = phantom().stored((1, 2, 0), (-1, 1, 1))
    image = add(server, tmp_path / "s", one=truth)
    others(tmp_path, server, image, truth.displayed().labels, LATER)
    store = open_store()
    assert store.get_labeled_images() == [image]
    pair = store.datalist()[0]
    labels, grid = read_mask(pair["label"])
    named = stored_names(store.get_label_info(image, "final"), np.unique(labels).tolist())
    assert named == {2: "kidney_right", 5: "liver", 18: "metastasis"}
    assert np.array_equal(truth.at(grid, np.where(labels == 18, 17, labels)), truth.labels)
    assert store.get_label_info(image, "final")["author"] == "Elsewhere Anna"
    assert store.datalist() == [pair]


def test_newest_segmentation_is_final_and_older_ones_can_be_read(
    tmp_path: Path, server: FakeDicomWeb, open_store: Open
) -> None:
    image, labels = add(server, tmp_path / "s"), phantom().labels
    old = others(tmp_path, server, image, np.where(labels == 5, 5, 0), BEFORE)
    store = open_store()
    submit(store, image, tmp_path)
    assert np.array_equal(final_mask(store, image), labels), "what was submitted here is newer"
    new = others(tmp_path, server, image, np.where(labels == 2, 2, 0), LATER)
    assert np.array_equal(final_mask(store, image), np.where(labels == 2, 2, 0))
    by_series = [read_mask(store.get_label_uri(str(d.SeriesInstanceUID), "final"))[0] for d in (old, new)]
    assert np.array_equal(by_series[0], np.where(labels == 5, 5, 0))
    assert np.array_equal(by_series[1], np.where(labels == 2, 2, 0))
    listed = [seg["instance"] for seg in store.get_image_info(image)["segmentations"]]
    assert (listed[0], listed[-1]) == (str(new.SOPInstanceUID), str(old.SOPInstanceUID))


def test_label_deleted_here_does_not_come_back(tmp_path: Path, server: FakeDicomWeb, open_store: Open) -> None:
    image = add(server, tmp_path / "s")
    others(tmp_path, server, image, phantom().labels, BEFORE)
    store = open_store()
    assert len(store.datalist()) == 1
    store.remove_label(image, "final")
    store.refresh()
    assert store.get_labeled_images() == []
    assert store.datalist() == []


def test_segmentation_that_cannot_be_read_is_left_out_with_a_reason(
    tmp_path: Path, server: FakeDicomWeb, open_store: Open, caplog: pytest.LogCaptureFixture
) -> None:
    image, labels = add(server, tmp_path / "s"), phantom().labels
    others(tmp_path, server, image, np.where(labels == 5, 5, 0), BEFORE)
    broken = others(tmp_path, server, image, labels, LATER)
    server.held[str(broken.SOPInstanceUID)].SegmentationType = "LABELMAP"
    store = open_store()
    assert np.array_equal(final_mask(store, image), np.where(labels == 5, 5, 0)), "the newest that can be read"
    assert "LABELMAP cannot be read" in caplog.text
    with pytest.raises(HTTPException, match="LABELMAP"):
        store.get_label_uri(str(broken.SeriesInstanceUID), "final")


def test_a_passing_failure_makes_no_older_segmentation_final(
    tmp_path: Path, server: FakeDicomWeb, open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, labels = add(server, tmp_path / "s"), phantom().labels
    others(tmp_path, server, image, np.where(labels == 5, 5, 0), BEFORE)
    newest = others(tmp_path, server, image, labels, LATER)
    store, fetch = open_store(), server.retrieve_instance

    def fails(study: str, series: str, instance: str) -> Dataset:
        if instance == newest.SOPInstanceUID:
            raise requests.ConnectionError("not now")
        return fetch(study, series, instance)

    with monkeypatch.context() as patch:
        patch.setattr(server, "retrieve_instance", fails)
        assert store.datalist() == []
    assert len(store.datalist()) == 1
    assert (final_mask(store, image) == 2).any(), "all of the newest"


def test_image_with_nothing_but_an_unreadable_segmentation_is_unlabelled(
    tmp_path: Path, server: FakeDicomWeb, open_store: Open
) -> None:
    image = add(server, tmp_path / "s")
    packed = server.held[str(others(tmp_path, server, image, phantom().labels, LATER).SOPInstanceUID)]
    packed.file_meta.TransferSyntaxUID = RLELossless
    packed.PixelData = encapsulate([b"\0" * 64])
    packed["PixelData"].is_undefined_length = True
    store = open_store()
    assert store.get_labeled_images() == [image]
    assert store.datalist() == []
    assert (store.get_labeled_images(), store.get_unlabeled_images()) == ([], [image])
    assert "compressed as RLE Lossless" in next(iter(store._unreadable.values()))


def test_two_processes_take_a_segmentation_over_once(tmp_path: Path, server: FakeDicomWeb, open_store: Open) -> None:
    image = add(server, tmp_path / "s")
    seg = others(tmp_path, server, image, phantom().labels, LATER)
    first, second = open_store(), open_store()
    first.get_image_uri(image)
    record = second._catalog.segmentations(image)[0]
    read = second._read(record)
    first.datalist()
    before = first.get_label_info(image, "final")
    second._take(record, *read)
    assert second.get_label_info(image, "final") == before
    assert second.get_image_info(image)["known_segmentations"] == [str(seg.SOPInstanceUID)]
