"""MONAI Label's own tests against this server with ``--conf upstream_aliases true``.

``MEDVL_UPSTREAM`` names a checkout of its repository; its tests are copied to a temporary folder for the run, beside
generated volumes in place of the data set they download. Each of their tests is reported by name with its seconds.
Left out are those of other kinds of images (pathology, endoscopy, lung nodule detection) and the DICOMweb test, whose
recorded replies are part of that download.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import zoom

from medvl_sam2.synthesis import generate_case
from medvl_sam2.vocabulary import CLASSES
from script_modules import load_script

CHECKOUT = os.environ.get("MEDVL_UPSTREAM", "")

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.weights,
    pytest.mark.timeout(3600),
    # MONAI Label's client, which waits for the server, leaves its connections to the garbage collector.
    pytest.mark.filterwarnings("ignore:Exception ignored in"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.skipif(not CHECKOUT, reason="MEDVL_UPSTREAM names no checkout of MONAI Label's repository"),
]

SHAPE = (160, 220, 40)
"""Their click [140, 210, 28] lies inside."""
SEEDS: Mapping[str, int] = {"spleen_3": 2_000_003, "spleen_8": 2_000_005, "spleen_9": 2_000_006, "spleen_10": 2_000_009}
LABELLED = ("spleen_3", "spleen_9")

INTEGRATION = tuple(
    f"tests/integration/{name}.py"
    for name in (
        *("radiology/test_info", "radiology/test_session", "radiology/test_infer", "radiology/test_batch_infer"),
        *("pathology/test_info", "monaibundle/bundles/test_infer"),
    )
)
INTEGRATION_TRAINING = tuple(
    f"tests/integration/{name}/test_trainer.py" for name in ("radiology", "monaibundle/bundles")
)
ENDPOINTS = tuple(
    f"tests/unit/endpoints/test_{name}.py"
    for name in (
        *("activelearning", "batch_infer", "datastore", "info", "infer", "infer_v2", "logs", "model", "ohif", "proxy"),
        *("scoring", "scoring_v2", "session"),
    )
)
_WEIGHTS = "weights are published as checked versions, so no file of one is handed out, replaced or deleted"
_DETECTION = "there is no lung nodule detection here"
DIFFERENT: Mapping[str, str] = {
    "test_model.EndPointModel.test_info": _WEIGHTS,
    "test_model.EndPointModel.test_download": _WEIGHTS,
    "test_ohif.TestEndPointLogs.test_ohif": "they expect no viewer in a source checkout; the installed package has one",
    "TestDetectionBundleInferTask.test_lung_nodule_detector_infer": _DETECTION,
    "TestDetectionBundleTrainTask.test_007_lung_nodule_detection_train": _DETECTION,
    "TestDetectionBundleTrainTask.test_008_bundle_stop": _DETECTION,
    **({} if shutil.which("nvidia-smi") else {"test_logs.TestEndPointLogs.test_logs_gpu": "there is no NVIDIA driver"}),
}
"""Their tests that fail here, each with the reason."""


@dataclass(frozen=True)
class Outcome:
    """How one of their tests ended: ``failure`` is empty when it passed."""

    name: str
    seconds: float
    failure: str


def write_studies(folder: Path) -> Path:
    """Their four volumes by name, two of them with a label of the spleen."""
    (folder / "labels" / "final").mkdir(parents=True)
    for name, seed in SEEDS.items():
        case = generate_case(seed)
        image, spleen = case.image.transpose(2, 1, 0), (case.organs == CLASSES.index("spleen") + 1).transpose(2, 1, 0)
        factors = [new / old for new, old in zip(SHAPE, image.shape, strict=True)]
        spacing = np.array(case.spacing[::-1]) / factors
        affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
        nib.save(nib.Nifti1Image(zoom(image, factors, order=1).astype(np.int16), affine), folder / f"{name}.nii.gz")
        if name in LABELLED:
            label = zoom(spleen.astype(np.uint8), factors, order=0)
            nib.save(nib.Nifti1Image(label, affine), folder / "labels" / "final" / f"{name}.nii.gz")
    return folder


@dataclass(frozen=True)
class Guest:
    """Their tests in a folder of their own."""

    root: Path
    environment: Mapping[str, str]

    @property
    def studies(self) -> Path:
        return self.root / "tests" / "data" / "dataset" / "local" / "spleen"

    def run(self, *files: str) -> list[Outcome]:
        """Files of their tests in a process of their own."""
        report = self.root / "report.xml"
        command = [sys.executable, "-m", "pytest", *files, "-q", "-p", "upstream_guest", "-p", "no:cacheprovider"]
        command += ["-W", "ignore", f"--rootdir={self.root}", f"--junitxml={report}"]
        done = subprocess.run(
            command, cwd=self.root, env={**os.environ, **self.environment}, capture_output=True, text=True, check=False
        )
        if not report.exists():
            raise AssertionError(f"{files} did not run:\n{done.stdout}\n{done.stderr}")
        outcomes = []
        for case in ElementTree.parse(report).iter("testcase"):
            if case.find("skipped") is None:
                problem = next((found for tag in ("failure", "error") if (found := case.find(tag)) is not None), None)
                name = f"{case.get('classname')}.{case.get('name')}".removeprefix("tests.")
                failure = "" if problem is None else problem.text or str(problem.get("message"))
                outcomes.append(Outcome(name, float(case.get("time", 0)), failure))
        report.unlink()
        return outcomes


def guest(root: Path, repository: Path, environment: Mapping[str, str]) -> Guest:
    """Copy their tests to ``root`` and write the studies."""
    shutil.copytree(Path(CHECKOUT) / "tests", root / "tests", ignore=shutil.ignore_patterns("data", "downloads"))
    paths = [str(repository / "model"), str(repository / "tests"), environment.get("PYTHONPATH", "")]
    made = Guest(root, {**environment, "PYTHONPATH": os.pathsep.join(path for path in paths if path)})
    write_studies(made.studies)
    return made


def check(outcomes: list[Outcome], subtests: pytest.Subtests) -> None:
    """Report each by name; those in :data:`DIFFERENT` must fail, or the list is out of date."""
    assert outcomes
    for one in outcomes:
        different = next((reason for name, reason in DIFFERENT.items() if one.name.endswith(name)), "")
        print(f"{'failed' if one.failure else 'passed'} {one.seconds:7.1f} s  {one.name}  {different}")
        with subtests.test(one.name, seconds=one.seconds):
            assert bool(one.failure) == bool(different), one.failure or f"passes, though listed: {different}"


@pytest.fixture(scope="module")
def against_server(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Guest]:
    """Their integration tests beside a running server."""
    folder = tmp_path_factory.mktemp("integration")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "scripts"))
        patch.setenv("MONAI_LABEL_SESSION_PATH", str(folder / "sessions"))
        local_server = load_script("local_server", patch)
        made = guest(folder, repository, {})
        with local_server.own_server(folder, studies=made.studies, conf={"upstream_aliases": "true"}) as server:
            yield Guest(made.root, {**made.environment, "MONAILABEL_SERVER_PORT": server.address.rsplit(":", 1)[1]})


@pytest.fixture(scope="module")
def in_process(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Guest:
    """Their endpoint tests, with this app in the places of their sample apps."""
    root = tmp_path_factory.mktemp("endpoints")
    app = root / "sample-apps" / "radiology"
    source = repository / "apps" / "medvl_sam2"
    shutil.copytree(source, app, ignore=shutil.ignore_patterns("model", "logs", "__pycache__"))
    (app.parent / "monaibundle").symlink_to(app)
    environment = {
        "MEDVL_UPSTREAM_IN_PROCESS": "1",
        "MONAI_LABEL_RELOAD_APP_LIB": "false",
        "MONAI_LABEL_AUTO_UPDATE_SCORING": "false",
        "MONAI_LABEL_TRACKING_URI": f"sqlite:///{root / 'tracking.db'}",
        "PYTHONPATH": str(app),
    }
    return guest(root, repository, environment)


def test_integration(against_server: Guest, subtests: pytest.Subtests) -> None:
    check(against_server.run(*INTEGRATION), subtests)


def test_endpoints(in_process: Guest, subtests: pytest.Subtests) -> None:
    check(in_process.run(*ENDPOINTS), subtests)


@pytest.mark.hours
def test_training(against_server: Guest, subtests: pytest.Subtests) -> None:
    check(against_server.run(*INTEGRATION_TRAINING), subtests)


@pytest.mark.hours
def test_training_endpoints(in_process: Guest, subtests: pytest.Subtests) -> None:
    check(in_process.run("tests/unit/endpoints/test_train.py"), subtests)
