"""Labels on their way to a DICOMweb server: what each annotator is told of the own one, and which series it is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.conftest import Running
from app.fake_dicomweb import FakeDicomWeb, Open
from app.test_dicomweb_store import INFO, add, submit


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
