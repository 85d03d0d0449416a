"""What is left of deleted labels and images: labels in the trash, and nothing that comes back by itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from fastapi import HTTPException

from app.conftest import Running
from app.fake_dicomweb import FakeDicomWeb, Open
from app.phantom import phantom
from app.test_dicomweb_store import add, final_mask, submit
from app.test_label_versions import LIVER, blocks, final, index, listed, post, write
from lib.version_files import VersionFiles


def test_deleted_labels_lie_in_the_trash(running: Running, tmp_path: Path) -> None:
    masks = [blocks(v1=(0, 5)), blocks(v1=(0, 6)), blocks(v1=(0, 7))]
    for mask in masks:
        post(running, write(tmp_path / "label.nii.gz", mask), label_info=LIVER)

    def delete(tag: str) -> None:
        response = running.client.delete("/datastore/label", params={"id": "case_a", "tag": tag})
        assert response.status_code == 200, response.text

    delete("version_3")
    assert listed(running)["final"] == 2
    assert (final(running) == masks[1]).all()
    trash = running.studies / ".trash" / "case_a"
    (mask,) = trash.glob("version_3-*.nii.gz")
    assert (np.asarray(nib.load(mask).dataobj) == masks[2]).all()
    # What README says: put mask and record back under the version's tag.
    for path in trash.iterdir():
        name = f"case_a{'.json' if path.suffix == '.json' else '.nii.gz'}"
        shutil.move(path, running.studies / "labels" / "version_3" / name)
    running.app.datastore().refresh()
    assert listed(running)["final"] == 3
    assert (final(running) == masks[2]).all()
    # Without final the image is unlabelled, also after a restart, until the next label.
    delete("final")
    assert running.client.get("/info/").json()["datastore"]["completed"] == 0
    running.app.datastore().refresh()
    state = listed(running)
    assert (state["final"], len(state["versions"])) == (None, 3)
    post(running, tmp_path / "label.nii.gz", label_info=LIVER)
    assert listed(running)["final"] == 4
    beside = [running.studies / "texts" / "case_a", running.studies / ".history" / "final" / "case_a"]
    for folder in beside:
        folder.mkdir(parents=True)
        (folder / "kept").touch()
    assert running.client.delete("/datastore/image", params={"id": "case_a"}).status_code == 200
    assert "case_a" not in index(running)
    assert len(list(trash.glob("version_*.nii.gz"))) == 4
    assert sorted(path.parent.name.split("-")[0] for path in trash.glob("*/kept")) == ["history", "texts"]
    assert not any(folder.exists() for folder in beside), "the next image of this id does not inherit them"


@pytest.mark.parametrize("watched", [False, True])
def test_a_deleted_image_leaves_nothing_behind_and_loses_no_label(
    running: Running, tmp_path: Path, watched: bool
) -> None:
    """Also labels that the index does not know yet; the next image of that name begins anew."""
    store = running.app.datastore()
    store._auto_reload = watched
    for end in (5, 6):
        post(running, write(tmp_path / "label.nii.gz", blocks(v1=(0, end))), label_info=LIVER)
    folder = running.studies / "labels" / "version_3"
    folder.mkdir()
    write(folder / "case_a.nii.gz", blocks(v1=(0, 7)))
    image = (running.studies / "case_a.nii.gz").read_bytes()
    assert running.client.delete("/datastore/image", params={"id": "case_a"}).status_code == 200
    assert list(index(running)) == ["case_b"]
    assert not list((running.studies / "labels").glob("**/case_a.*"))
    trash = running.studies / ".trash" / "case_a"
    for extension in (".nii.gz", ".json"):
        kept = sorted(path.name.split("-")[0] for path in trash.glob(f"version_*{extension}"))
        assert kept == ["version_1", "version_2", "version_3"]
    (tmp_path / "case_a.nii.gz").write_bytes(image)
    with open(tmp_path / "case_a.nii.gz", "rb") as file:
        sent = running.client.put("/datastore/image", params={"image": "case_a"}, files={"file": file})
    assert sent.status_code == 200, sent.text
    assert listed(running) == {"image": "case_a", "final": None, "versions": []}


def test_a_deletion_that_is_cut_off_brings_no_label_back_as_a_new_one(
    running: Running, tmp_path: Path, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for end in (5, 6):
        post(running, write(tmp_path / "label.nii.gz", blocks(v1=(0, end))), label_info=LIVER)
    before = listed(running)
    for step in ("discard", "_set_final"):
        owner = VersionFiles if step == "discard" else type(running.app.datastore())
        with monkeypatch.context() as patch:
            patch.setattr(owner, step, lambda *_, **__: (_ for _ in ()).throw(OSError("killed here")))
            reply = running.client.delete("/datastore/label", params={"id": "case_a", "tag": "version_2"})
            assert reply.status_code == 500
        running = start()
        assert listed(running) == before
        assert (final(running) == blocks(v1=(0, 6))).all()


def test_a_series_is_not_deleted_here(tmp_path: Path, server: FakeDicomWeb, open_store: Open) -> None:
    """It would be listed again, and its labels come back from the server."""
    image = add(server, tmp_path / "s")
    store = open_store()
    submit(store, image, tmp_path)
    with pytest.raises(HTTPException, match="lies on the DICOMweb server") as caught:
        store.remove_image(image)
    assert caught.value.status_code == 409
    assert np.array_equal(final_mask(store, image), phantom().labels)
