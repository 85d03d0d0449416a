"""What is submitted is a label of that image, nothing stored is lost, and two processes do not undo each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from app.conftest import AFFINE, SHAPE, Running, write_phantom


def write_label(path: Path, shape: tuple[int, ...] = SHAPE, affine: np.ndarray = AFFINE, value: Any = 1) -> Path:
    label = np.full(shape, value)
    label = label.astype(np.uint8 if np.issubdtype(label.dtype, np.integer) and value >= 0 else np.float32)
    nib.save(nib.Nifti1Image(label, affine), path)
    return path


@pytest.fixture
def label(tmp_path: Path) -> Path:
    return write_label(tmp_path / "label.nii.gz")


def stored(running: Running, image: str = "case_a", tag: str = "final") -> np.ndarray:
    return np.asarray(nib.load(running.app.datastore().get_label_uri(image, tag)).dataobj)


def test_submitted_label_is_stored_and_counted(running: Running, label: Path) -> None:
    info = [{"name": "liver", "idx": 1}]
    response = running.submit("case_a", label, label_info=info, client_id="user-xyz")
    assert response.status_code == 200
    assert response.json() == {"image": "case_a", "label": "case_a", "labels_since_training": 1}
    assert stored(running).shape == SHAPE
    assert running.client.get("/info/").json()["datastore"]["completed"] == 1
    saved = running.client.get("/datastore/label/info", params={"label": "case_a", "tag": "final"}).json()
    assert saved["label_info"] == info


def _junk(path: Path) -> Path:
    path.write_bytes(b"junk" * 100)
    return path


@pytest.mark.parametrize(
    ("name", "make", "status", "reason"),
    [
        ("junk.nii.gz", _junk, 415, "not a readable"),
        ("junk.nrrd", _junk, 415, "not a readable"),
        ("label.json", _junk, 415, ".json"),
        ("label.exe", _junk, 415, ".exe"),
        ("raw.bin", _junk, 422, "400 bytes"),
        ("shape.nii.gz", lambda p: write_label(p, (5, 5, 5)), 422, "(5, 5, 5)"),
        ("turned.nii.gz", lambda p: write_label(p, SHAPE[::-1]), 422, "shape"),
        ("apart.nii.gz", lambda p: write_label(p, affine=np.diag([2.0, 1.5, 3.0, 1.0])), 422, "apart"),
        ("grey.nii.gz", lambda p: write_label(p, value=0.5), 415, "not a label map"),
        ("negative.nii.gz", lambda p: write_label(p, value=-1), 415, "not a label map"),
        ("4d.nii.gz", lambda p: write_label(p, (*SHAPE, 2)), 415, "4D"),
    ],
)
def test_what_is_no_label_is_refused(
    running: Running, label: Path, tmp_path: Path, name: str, make: Any, status: int, reason: str
) -> None:
    assert running.submit("case_a", label).status_code == 200
    index = (running.studies / "datastore_v2.json").read_text()
    before = sorted(str(path) for path in running.studies.rglob("*"))
    response = running.submit("case_a", make(tmp_path / name))
    assert response.status_code == status, response.text
    assert reason in response.json()["detail"]
    assert "/tmp" not in response.json()["detail"]
    assert sorted(str(path) for path in running.studies.rglob("*")) == before
    assert (running.studies / "datastore_v2.json").read_text() == index
    assert stored(running).all()


@pytest.mark.parametrize("tag", ["../../outside", "..", "a/b", "/tmp/x", "a\\b", ".hidden"])
def test_tags_stay_inside_the_store(running: Running, label: Path, tag: str) -> None:
    response = running.submit("case_a", label, tag=tag)
    assert response.status_code == 400
    assert "tag" in response.json()["detail"]
    assert list(running.studies.parent.rglob("outside*")) == []


def test_label_of_an_unknown_image(running: Running, label: Path) -> None:
    response = running.submit("no_such_case", label)
    assert response.status_code == 404
    assert "no_such_case" in response.json()["detail"]


def test_params_of_a_label_that_are_not_json(running: Running, label: Path) -> None:
    with open(label, "rb") as stream:
        response = running.client.put(
            "/datastore/label", params={"image": "case_a"}, data={"params": "{"}, files={"label": (label.name, stream)}
        )
    assert response.status_code == 400
    assert running.app.datastore().get_labels_by_image_id("case_a") == {}


def test_small_differences_of_the_header_are_no_other_grid(running: Running, tmp_path: Path) -> None:
    near = AFFINE.copy()
    near[:3, 3] += 0.01
    assert running.submit("case_a", write_label(tmp_path / "near.nii.gz", affine=near)).status_code == 200


def test_image_sent_again_keeps_its_labels(running: Running, label: Path, tmp_path: Path) -> None:
    running.submit("case_a", label)
    same = running.studies / "case_a.nii.gz"
    other = write_phantom(tmp_path / "other.nii.gz", 700)
    for path, status in ((same, 200), (other, 409)):
        content = path.read_bytes()
        with_file = {"file": ("case_a.nii.gz", content)}
        response = running.client.put("/datastore/", params={"image": "case_a"}, files=with_file)
        assert response.status_code == status, response.text
        assert running.app.datastore().get_labels_by_image_id("case_a") == {"final": "case_a", "version_1": "case_a"}
    response = running.client.put("/datastore/", params={"image": "../evil"}, files={"file": ("x.nii.gz", content)})
    assert response.status_code == 400
    response = running.client.put("/datastore/", params={"image": "new"}, files={"file": ("x.nii.gz", content)})
    assert response.status_code == 200
    assert "new" in running.app.datastore().list_images()


def test_two_processes_do_not_undo_each_other(running: Running, label: Path) -> None:
    """A scoring process holds an index from before the server saved a label."""
    from lib.datastore import open_local_store

    scoring = open_local_store(str(running.studies), running.app.runtime.geometry)
    running.submit("case_a", label, client_id="user-xyz")
    scoring.update_image_info("case_b", {"dice": 0.5})
    running.app.datastore().update_image_info("case_a", {"seen": True})
    index = json.loads((running.studies / "datastore_v2.json").read_text())["objects"]
    assert index["case_a"]["labels"]["final"]["info"]["client_id"] == "user-xyz"
    assert index["case_a"]["image"]["info"]["seen"] is True
    assert index["case_b"]["image"]["info"]["dice"] == 0.5


def test_damaged_session_folder_does_not_stop_the_start(running: Running, tmp_path: Path) -> None:
    import os
    import time

    sessions = Path(running.app.sessions().store_path)
    (sessions / "torn").mkdir(parents=True)
    (sessions / "old").mkdir()
    long_ago = time.time() - 7200
    os.utime(sessions / "old", (long_ago, long_ago))
    running.app.cleanup_sessions()
    assert [path.name for path in sessions.iterdir()] == ["torn"]
