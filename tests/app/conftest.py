"""The app in this process, behind the real HTTP front, with a fake predictor and a folder of phantoms."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

APP = Path(__file__).resolve().parents[2] / "apps" / "medvl_sam2"

# Before MONAI Label is imported: it reads its settings then. One copy of lib, so that classes compare equal.
os.environ["MONAI_LABEL_RELOAD_APP_LIB"] = "false"
os.environ["MONAI_LABEL_AUTO_UPDATE_SCORING"] = "false"
os.environ["MONAI_LABEL_DATASTORE_FILE_EXT"] = '["*.nii.gz", "*.nii", "*.nrrd"]'
if str(APP) not in sys.path:
    sys.path.insert(0, str(APP))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # third parties' deprecations
    import monailabel.interfaces.utils.app as app_registry
    from fastapi.testclient import TestClient
    from monailabel.config import settings

    import lib.server
    from lib import runtime

from app.fake_dicomweb import FakeDicomWeb, Open, store_opener  # noqa: E402 - after the settings above
from app.fakes import FakePredictor  # noqa: E402

SHAPE = (12, 10, 20)
"""All sizes differ, and there are more slices than classes."""
AFFINE = np.array([[-2.0, 0, 0, 30], [0, -1.5, 0, 40], [0, 0, 3.0, -50], [0, 0, 0, 1]])
"""As CT is stored: i to the left, j to posterior, k to superior."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """MONAI Label sends a result file without closing it; that warning is not about this project."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.filterwarnings("ignore:Exception ignored in.*FileIO"))
            item.add_marker(pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"))


def write_phantom(path: Path, mean: int = 100, shape: tuple[int, ...] = SHAPE, affine: np.ndarray = AFFINE) -> Path:
    """An image whose mean is about ``mean``."""
    values = np.random.default_rng(mean).integers(mean - 50, mean + 51, shape).astype(np.int16)
    image = nib.Nifti1Image(values, affine)
    image.set_sform(affine, 1)
    nib.save(image, path)
    return path


@dataclass
class Running:
    """A running app: ``client`` speaks HTTP to it."""

    client: TestClient
    app: Any
    studies: Path
    store: Path
    predictors: list[FakePredictor] = field(default_factory=list)

    def infer(self, model: str, image: str = "case_a", output: str | None = None, **params: Any) -> Any:
        query = {"image": image} | ({"output": output} if output else {})
        return self.client.post(f"/infer/{model}", params=query, data={"params": json.dumps(params)})

    def slicer(self, model: str, image: str = "case_a", **params: Any) -> Any:
        """As Slicer's Auto Segmentation and SmartEdit ask."""
        sent = {"result_extension": ".nrrd", "result_dtype": "uint8", "client_id": "user-xyz"}
        return self.infer(model, image, **{**sent, **params})

    def ohif(self, model: str, image: str = "case_a", **params: Any) -> Any:
        """As OHIF's panels ask."""
        sent = {"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False}
        return self.infer(model, image, output="image", **{**sent, "restore_label_idx": False, **params})

    def submit(self, image: str, file: Path, tag: str | None = None, **params: Any) -> Any:
        query = {"image": image} | ({"tag": tag} if tag is not None else {})
        with open(file, "rb") as stream:
            files = {"label": (file.name, stream)}
            return self.client.put("/datastore/label", params=query, data={"params": json.dumps(params)}, files=files)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Running]]:
    """Start an app over ``tmp_path/studies`` (phantoms case_a and case_b) with the given ``--conf`` values."""
    studies, store = tmp_path / "studies", tmp_path / "store"
    studies.mkdir()
    write_phantom(studies / "case_a.nii.gz", 100)
    write_phantom(studies / "case_b.nii.gz", 300)
    monkeypatch.setattr(settings, "MONAI_LABEL_APP_DIR", str(APP))
    monkeypatch.setattr(settings, "MONAI_LABEL_STUDIES", str(studies))
    monkeypatch.setattr(settings, "MONAI_LABEL_SESSION_PATH", str(tmp_path / "sessions"))
    monkeypatch.setattr(settings, "MONAI_LABEL_DATASTORE_AUTO_RELOAD", False)
    predictors: list[FakePredictor] = []

    def load(path: Path | None, **_: str) -> FakePredictor:
        predictors.append(FakePredictor.load(path))
        return predictors[-1]

    monkeypatch.setattr(runtime, "load_predictor", load)

    def begin(**conf: str) -> Running:
        app_registry.clear_cache()
        app = app_registry.app_instance(conf={"store": str(store), **conf})
        app.server_mode(True)
        client = TestClient(lib.server.app, raise_server_exceptions=False)
        return Running(client, app, studies, store, predictors)

    yield begin
    app_registry.clear_cache()


@pytest.fixture
def running(start: Callable[..., Running]) -> Running:
    """The app with default settings."""
    return start()


@pytest.fixture
def server() -> FakeDicomWeb:
    """A DICOMweb server in memory."""
    return FakeDicomWeb()


@pytest.fixture
def open_store(server: FakeDicomWeb, tmp_path: Path) -> Open:
    """Opens stores over ``server``."""
    return store_opener(server, tmp_path)


@pytest.fixture
def read_label() -> Callable[[bytes, Path], np.ndarray]:
    """Voxels (I, J, K) of an NRRD a client received, through ITK as Slicer reads it."""
    import SimpleITK as sitk

    def read(content: bytes, folder: Path) -> np.ndarray:
        path = folder / "received.nrrd"
        path.write_bytes(content)
        return sitk.GetArrayFromImage(sitk.ReadImage(str(path))).transpose(2, 1, 0)

    return read


def multipart(response: Any) -> tuple[dict[str, Any], str, bytes]:
    """Parameters, file name and content of a multipart reply, as the Slicer client takes it apart."""
    from requests_toolbelt.multipart import decoder

    parts = decoder.MultipartDecoder(response.content, response.headers["content-type"]).parts
    by_name = {}
    for part in parts:
        disposition = part.headers[b"Content-Disposition"].decode()
        fields = dict(item.strip().split("=", 1) for item in disposition.split(";")[1:])
        by_name[fields["name"].strip('"')] = (fields.get("filename", "").strip('"'), part.content)
    file, content = by_name["image"]
    return json.loads(by_name["params"][1]), file, content
