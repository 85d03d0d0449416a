"""The app over a real Orthanc: phantoms, prompts' masks, segmentations and reports, through HTTP where clients go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import monailabel.interfaces.utils.app as app_registry
import numpy as np
import pydicom
import pytest
import requests
from fastapi.testclient import TestClient
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMwebClientX
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

import lib.server
from app.conftest import APP
from app.fake_dicomweb import Open, store_opener
from app.fakes import FakePredictor
from app.phantom import ORDERS, Phantom, phantom
from app.segs import renumbered
from lib import runtime
from lib.dicom_seg import LabelOrigin, build_segmentation
from lib.dicom_seg_reading import read_segmentation
from lib.dicom_sr import Report, build_report_sr, report_text, store_report_sr
from medvl_sam2.volume_io import read_mask, read_volume
from orthanc import Orthanc, running_orthanc, write_series

pytestmark = pytest.mark.e2e

NAMES = [{"name": "kidney_right", "idx": 2}, {"name": "liver", "idx": 5}, {"name": "lesion", "idx": 17}]


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    with running_orthanc(tmp_path_factory.mktemp("orthanc")) as server:
        yield server


@pytest.fixture
def over_orthanc(orthanc: Orthanc, tmp_path: Path) -> Open:
    """Opens stores over Orthanc with the client the app uses."""
    return store_opener(DICOMwebClientX(url=orthanc.dicomweb), tmp_path)


@pytest.fixture
def served(orthanc: Orthanc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """The app over Orthanc, as ``scripts/serve.py`` sets it up, with a fake predictor."""
    for name, value in {
        "MONAI_LABEL_APP_DIR": str(APP),
        "MONAI_LABEL_STUDIES": orthanc.dicomweb,
        "MONAI_LABEL_SESSION_PATH": str(tmp_path / "sessions"),
        "MONAI_LABEL_DICOMWEB_CACHE_PATH": str(tmp_path / "cache"),
        "MONAI_LABEL_DICOMWEB_CACHE_EXPIRY": 0,
        "MONAI_LABEL_DICOMWEB_SEARCH_FILTER": {"Modality": "CT\\MR"},
    }.items():
        monkeypatch.setattr(settings, name, value)
    monkeypatch.setattr(runtime, "load_predictor", FakePredictor.load)
    app_registry.clear_cache()
    app = app_registry.app_instance(conf={"store": str(tmp_path / "store")})
    app.server_mode(True)
    app.datastore()._observer.stop()
    app.datastore()._observer.join()
    yield TestClient(lib.server.app, raise_server_exceptions=False)
    app_registry.clear_cache()


def put_phantom(orthanc: Orthanc, folder: Path, one: Phantom, modality: str = "CT") -> str:
    series = write_series(folder, one.image, one.affine, modality)
    orthanc.store(series.files)
    return series.series


def submit(served: TestClient, image: str, mask: np.ndarray, **more: Any) -> dict[str, Any]:
    """As OHIF's panel: raw voxels of the volume on display, first axis fastest."""
    reply = served.put(
        "/datastore/label",
        params={"image": image, "tag": "final"},
        data={"params": json.dumps({"label_info": NAMES, "client_id": "reader1", **more})},
        files={"label": ("label.bin", mask.tobytes(order="F"))},
    )
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


@pytest.mark.parametrize("order", [0, 7, 18, 29, 47])
@pytest.mark.parametrize("oblique", [False, True], ids=["straight", "oblique"])
def test_phantom_goes_to_orthanc_and_comes_back_for_training(
    orthanc: Orthanc, served: TestClient, over_orthanc: Open, tmp_path: Path, order: int, oblique: bool
) -> None:
    truth = phantom(oblique)
    stored = truth.stored(*ORDERS[order])
    image = put_phantom(orthanc, tmp_path / "s", stored, "MR" if order % 2 else "CT")
    note = submit(served, image, stored.displayed().labels)["dicom_seg"]
    assert "waiting" not in note
    assert "refused" not in note
    # Another machine over the same Orthanc: nothing but DICOM goes there.
    other = over_orthanc()
    pair = next(pair for pair in other.datalist() if image in pair["image"])
    volume = read_volume(pair["image"])
    assert np.array_equal(truth.at(volume.geometry, volume.array), truth.image)
    labels, grid = read_mask(pair["label"])
    assert np.array_equal(truth.at(grid, labels), truth.labels)


def test_label_of_orthanc_is_downloaded_and_counted_once(
    orthanc: Orthanc, served: TestClient, over_orthanc: Open, tmp_path: Path
) -> None:
    one = phantom()
    image = put_phantom(orthanc, tmp_path / "s", one)
    assert served.get("/datastore/label", params={"label": image, "tag": "final"}).status_code == 404
    first = submit(served, image, np.where(one.labels == 5, 5, 0).astype(np.uint8))
    submit(served, image, one.labels)
    mine = [seg for seg in orthanc.series() if _references(orthanc, seg, image)]
    assert len(mine) == 2
    for label, expected in ((image, one.labels), (first["dicom_seg"]["SeriesInstanceUID"], one.labels == 5)):
        reply = served.get("/datastore/label", params={"label": label, "tag": "final"})
        assert reply.status_code == 200, reply.text
        (tmp_path / "label.nii.gz").write_bytes(reply.content)
        assert np.array_equal(read_mask(tmp_path / "label.nii.gz")[0] > 0, expected > 0)
    assert over_orthanc().get_labeled_images().count(image) == 1
    # As OHIF stores it: segments numbered alphabetically.
    seg = orthanc.instances(mine[0])[0]
    grid = read_volume(over_orthanc().get_image_uri(image)).geometry
    assert np.array_equal(read_segmentation(renumbered(seg), grid).mask, read_segmentation(seg, grid).mask)


def _references(orthanc: Orthanc, seg: str, image: str) -> bool:
    return bool(orthanc.instances(seg)[0].ReferencedSeriesSequence[0].SeriesInstanceUID == image)


def test_new_study_is_served_and_a_bad_one_explained(orthanc: Orthanc, served: TestClient, tmp_path: Path) -> None:
    one = phantom()
    tilted = phantom(oblique=False).affine
    tilted[1, 2] = 0.8
    bad = put_phantom(orthanc, tmp_path / "bad", Phantom(one.image, one.labels, tilted))
    reply = served.post("/infer/medvl_semantic", params={"image": bad}, data={"params": "{}"})
    assert reply.status_code == 415
    assert "gantry is tilted" in reply.json()["detail"]
    assert "gantry is tilted" in served.get("/datastore/image/info", params={"image": bad}).json()["refused"]
    good = put_phantom(orthanc, tmp_path / "good", one, "MR")
    seen = set()
    for _ in range(30):
        reply = served.post("/activelearning/random", json={})
        assert reply.status_code == 200, reply.text
        sample = reply.json()
        assert sample["id"] != bad
        seen.add(sample["id"])
        if good in seen:
            break
    assert good in seen
    assert sample["SeriesInstanceUID"] == good


def test_series_are_told_apart_before_they_are_fetched(orthanc: Orthanc, served: TestClient, tmp_path: Path) -> None:
    one = phantom()
    early = write_series(tmp_path / "early", one.image, one.affine, SeriesDescription="native")
    late = {"SeriesDescription": "portal venous", "SeriesNumber": 2}
    later = write_series(tmp_path / "late", one.image, one.affine, study=early.study, **late)
    for series in (early, later):
        orthanc.store(series.files)
    told = {case["image"]: case for case in served.get("/medvl/cases").json()}
    names = ("PatientID", "StudyDate", "SeriesNumber", "SeriesDescription")
    assert [[told[series.series][name] for name in names] for series in (early, later)] == [
        ["phantom", "20240102", "1", "native"],
        ["phantom", "20240102", "2", "portal venous"],
    ]


def test_report_lies_beside_its_study(orthanc: Orthanc, over_orthanc: Open, tmp_path: Path) -> None:
    image = put_phantom(orthanc, tmp_path / "s", phantom())
    stored = store_report_sr(over_orthanc(), image, Report("report", "Liver: läsion.", "reader1", "demo-4"))
    assert stored is not None
    assert stored.waiting is None
    document = orthanc.instances(stored.series)[0]
    assert report_text(document) == "Liver: läsion."
    assert document.SOPInstanceUID == stored.instance
    assert image not in over_orthanc().get_labeled_images()


def test_what_is_sent_twice_lies_there_once(orthanc: Orthanc, over_orthanc: Open, tmp_path: Path) -> None:
    """A SEG and an SR that were sent before a kill, and whose sending nobody noted."""
    image, made = put_phantom(orthanc, tmp_path / "s", phantom()), datetime(2024, 2, 29, tzinfo=UTC)
    store = over_orthanc()
    headers = store.source_headers(image)
    for _ in range(2):
        names = {2: "kidney_right", 5: "liver", 17: "lesion"}
        seg = build_segmentation(headers, phantom().labels, names, LabelOrigin("ann", version=1, made=made))
        report = build_report_sr(headers, Report("report", "Normal.", "ann", version=1, made=made), seg)
        for document in (seg, report):
            assert store.send(document) is None
            assert store._has(document)
    for document in (seg, report):
        assert [one.SOPInstanceUID for one in orthanc.instances(document.SeriesInstanceUID)] == [
            document.SOPInstanceUID
        ]
    assert len([series for series in orthanc.series() if _references(orthanc, series, image)]) == 1


def _multipart(files: Sequence[Path]) -> tuple[bytes, str]:
    """Body and content type of a STOW-RS request."""
    head = b"\r\n--pieces\r\nContent-Type: application/dicom\r\n\r\n"
    body = b"".join(head + file.read_bytes() for file in files) + b"\r\n--pieces--\r\n"
    return body, 'multipart/related; type="application/dicom"; boundary=pieces'


def test_viewer_stores_and_searches_through_the_proxy(orthanc: Orthanc, served: TestClient, tmp_path: Path) -> None:
    """As Orthanc itself answers, also to what it does not know: it takes fuzzymatching and matches as without it."""
    one, name = phantom(), {"PatientName": "Müller^Änne", "SpecificCharacterSet": "ISO_IR 192"}
    series = write_series(tmp_path / "s", one.image, one.affine, PatientID="fuzzy-1", **name)
    body, kind = _multipart(series.files)
    headers = {"Content-Type": kind, "Accept": "application/dicom+json"}
    reply = served.post("/proxy/dicom/stow/studies", content=body, headers=headers)
    assert reply.status_code == 200, reply.text
    stored = pydicom.Dataset.from_json(reply.json())
    assert sorted(item.ReferencedSOPInstanceUID for item in stored.ReferencedSOPSequence) == sorted(series.instances)
    assert sorted(one.SOPInstanceUID for one in orthanc.instances(series.series)) == sorted(series.instances)

    def search(query: str) -> list[dict[str, Any]]:
        found = served.get(f"/proxy/dicom/qido/studies?{query}", headers={"Accept": "application/dicom+json"})
        assert found.status_code == 200, found.text
        assert found.json() == requests.get(f"{orthanc.dicomweb}/studies?{query}", timeout=10).json(), query
        return list(found.json())

    queries = ("PatientID=fuzzy-1", "PatientName=M*", "PatientName=M%C3%BCller*", "PatientName=Muller%5EAnne")
    found = {query: search(query) for query in queries}
    assert {query: search(f"{query}&fuzzymatching=true") for query in queries} == found
    (study,) = found["PatientID=fuzzy-1"]
    assert str(pydicom.Dataset.from_json(study).PatientName) == "Müller^Änne"
    assert study in found["PatientName=M*"]
    spoilt, kind = _multipart([Path(__file__)])
    refused = served.post("/proxy/dicom/stow/studies", content=spoilt, headers={**headers, "Content-Type": kind})
    direct = requests.post(f"{orthanc.dicomweb}/studies", data=spoilt, headers=headers, timeout=10)
    assert (refused.status_code, refused.content) == (direct.status_code, direct.content)
    assert "00081198" in refused.json(), "FailedSOPSequence"


@pytest.mark.shared_data
def test_compressed_series_is_read(orthanc: Orthanc, over_orthanc: Open, shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "ts_ct_dicom20" / "dicom"
    study, series, space = generate_uid(), generate_uid(), generate_uid()
    files = []
    for number, file in enumerate(sorted(source.iterdir())):
        data = pydicom.dcmread(file)
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = study, series, space
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        files.append(tmp_path / f"{number}.dcm")
        data.save_as(files[-1], write_like_original=False)
    assert data.file_meta.TransferSyntaxUID != ExplicitVRLittleEndian
    orthanc.store(files)
    shutil.copytree(source, tmp_path / "plain")
    expected = read_volume(tmp_path / "plain")
    volume = read_volume(over_orthanc().get_image_uri(series))
    assert np.array_equal(volume.array, expected.array)
    assert volume.geometry.matches(expected.geometry)
