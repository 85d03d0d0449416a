"""A real DICOM server with generated CT, the annotation server over it, and a browser."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import requests
from playwright.sync_api import Error as PlaywrightError

from e2e.browser import Requests, Viewer, chromium, open_page
from medvl_sam2.evaluation.cases import FIRST_SEED
from medvl_sam2.synthesis import generate_case
from medvl_sam2.synthesis.records import QA, Case
from orthanc import Orthanc, WrittenSeries, free_port, orthanc_missing, running_orthanc, write_series

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "outputs" / "e2e"
SEEDS = {"ann": 12, "ben": FIRST_SEED + 23}
"""Two small studies, 115 x 115 x 25 and 89 x 80 x 24 voxels, with lesions in the liver.

The seed of ``ann`` lies in the range that the demo weights' heads were trained on: what these tests ask of its masks
and answers says that the chain from click to DICOM works, not how good the model is. ``ben`` is held out.
"""
ORIGIN_Z = -40.0
"""Height of the lowest slice in mm."""
_START_S = 240.0


@dataclass(frozen=True)
class Study:
    """A study on the server, and what is true of it.

    ``organs`` (with lesions inside) and ``lesions`` are (I, J, K); ``questions`` have their true answers.
    """

    study: str
    series: str
    organs: np.ndarray
    lesions: np.ndarray
    spacing_z: float
    questions: tuple[QA, ...] = ()


@dataclass(frozen=True)
class Site:
    """``address`` of the annotation server; the DICOM server; the studies by patient."""

    address: str
    orthanc: Orthanc
    studies: dict[str, Study]


def store_case(orthanc: Orthanc, folder: Path, name: str, case: Case, of: Study | None = None) -> Study:
    """Store a generated case as a CT series: i to the patient's left, j to posterior, k to superior.

    ``of`` is the study it joins, as a later series.
    """
    sz, sy, sx = case.spacing
    affine = np.array([[-sx, 0, 0, 90.0], [0, -sy, 0, 60.0], [0, 0, sz, ORIGIN_Z], [0, 0, 0, 1]])
    tags = {"PatientID": name, "PatientName": f"{name.capitalize()}^Generated", "SeriesDescription": "generated CT"}
    if of:
        tags |= {"SeriesDescription": "later CT", "SeriesNumber": "2"}
    files, study = folder / (f"{name}-later" if of else name), of.study if of else None
    series: WrittenSeries = write_series(files, case.image.transpose(2, 1, 0), affine, study=study, **tags)
    orthanc.store(series.files)
    organs, lesions = (array.transpose(2, 1, 0) for array in (case.organs, case.lesions))
    return Study(series.study, series.series, organs, lesions, sz, case.qa)


def store_real_case(orthanc: Orthanc, folder: Path, source: Path) -> Study:
    """Store the real abdominal CT, which lies in RAS order, as scanners do: i to the left, j to posterior."""
    image, mask = (nib.load(source / name) for name in ("ct.nii.gz", "seg_total_fast.nii.gz"))
    voxels, organs = (np.asarray(one.dataobj)[::-1, ::-1].astype(np.int16) for one in (image, mask))
    turn = np.diag([-1.0, -1.0, 1.0, 1.0])
    turn[:2, 3] = np.array(voxels.shape[:2]) - 1
    tags = {"PatientID": "real", "PatientName": "Abdomen^Real", "SeriesDescription": "abdomen CT"}
    series = write_series(folder / "real", voxels, image.affine @ turn, **tags)
    orthanc.store(series.files)
    return Study(series.study, series.series, organs, np.zeros_like(organs), float(image.affine[2, 2]))


@contextmanager
def annotation_server(folder: Path, dicomweb: str) -> Iterator[str]:
    """The server, started by ``scripts/serve.py`` with everything it writes in ``folder``."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MONAI_LABEL")}
    environment.pop("PYTHONPATH", None)
    environment |= {
        "MONAI_LABEL_DICOMWEB_CACHE_EXPIRY": "1",
        "MONAI_LABEL_DICOMWEB_CACHE_PATH": str(folder / "cache"),
        "MONAI_LABEL_SESSION_PATH": str(folder / "sessions"),
    }
    command = [sys.executable, "scripts/serve.py", "--studies", dicomweb, "--port", str(port)]
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(
            [*command, "--conf", "store", str(folder / "store")],
            cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + _START_S
        while True:
            if server.poll() is not None or time.monotonic() > end:
                pytest.fail((folder / "server.log").read_text(errors="replace")[-3000:])
            try:
                requests.get(f"{address}/info/", timeout=10)
                break
            except requests.ConnectionError:
                time.sleep(0.5)
        yield address
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(timeout=60)


@pytest.fixture(scope="package")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Orthanc with the two studies, and the annotation server; skips where Orthanc or a browser is missing."""
    if reason := orthanc_missing():
        pytest.skip(reason)
    chromium()
    folder = tmp_path_factory.mktemp("site")
    with running_orthanc(folder / "orthanc") as orthanc:
        studies = {name: store_case(orthanc, folder, name, generate_case(seed)) for name, seed in SEEDS.items()}
        with annotation_server(folder, orthanc.dicomweb) as address:
            yield Site(address, orthanc, studies)


@pytest.fixture
def viewer(site: Site, tmp_path: Path) -> Iterator[Viewer]:
    """A browser with a profile of its own. What goes wrong in its scripts fails the test at the end."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    problems: list[str] = []
    with open_page(tmp_path / "profile", problems) as page:
        yield Viewer(page, site.address, PICTURES, Requests(page))
        page.screenshot(path=PICTURES / "last.png")
    assert problems == []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test also says what the page last asked for and showed."""
    report = yield
    viewer = getattr(item, "funcargs", {}).get("viewer")
    if report.when == "call" and report.failed and isinstance(viewer, Viewer):
        try:
            report.sections.append(("the page, last", viewer.last_words()))
        except PlaywrightError as error:  # whatever is wrong with the page is not what the test failed on
            report.sections.append(("the page, last", f"cannot be asked: {error}"))
    return report
