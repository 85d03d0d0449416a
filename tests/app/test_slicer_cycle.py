"""Everything Slicer's module sends, through its own client library, against a real server with the shipped weights.

The library lies in MONAI Label's wheel; ``MEDVL_SLICER_CLIENT`` names another copy (the plugin's own ``client.py``).
Values are sent as the module makes them: options with every request, the ROI as interleaved pairs in any order.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from medvl_sam2.synthesis import Case, generate_case
from medvl_sam2.vocabulary import CLASSES
from script_modules import load_script

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.weights,
    pytest.mark.timeout(900),
    # The client leaves its connections and uploads to the garbage collector.
    pytest.mark.filterwarnings("ignore:Exception ignored in"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

SEEDS = {"case_1": 2_000_003, "case_2": 2_000_005}


def lps(array: np.ndarray) -> np.ndarray:
    """Canonical (z, y, x) as CT files store it: i to the left, j to posterior, k to superior."""
    return np.ascontiguousarray(array.transpose(2, 1, 0))


def write(path: Path, array: np.ndarray, spacing: tuple[float, float, float]) -> Path:
    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])
    affine[:3, 3] = [20, -30, 40]
    image = nib.Nifti1Image(lps(array), affine)
    image.set_sform(affine, 1)
    nib.save(image, path)
    return path


def read(path: str) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(path)).transpose(2, 1, 0)


def dice(mask: np.ndarray, truth: np.ndarray) -> float:
    return 2 * np.count_nonzero(mask & truth) / (np.count_nonzero(mask) + np.count_nonzero(truth))


def middle(truth: np.ndarray) -> list[int]:
    """The voxel of a structure that is nearest to its centre."""
    voxels = np.argwhere(truth)
    return [int(n) for n in voxels[np.abs(voxels - voxels.mean(axis=0)).sum(axis=1).argmin()]]


class Slicer:
    """The module's logic over its client."""

    def __init__(self, module: Any, address: str, folder: Path) -> None:
        self.client = module.MONAILabelClient(address, str(folder), client_id="user-slicer")
        self.failure: type[Exception] = module.MONAILabelClientException
        self.folder = folder

    def options(self, section: str, name: str) -> dict[str, Any]:
        """All options of a task, lists as their first item, as the module sends them."""
        config = self.client.info()[section][name]["config"]
        return {key: value[0] if isinstance(value, list) else value for key, value in config.items()}

    def infer(
        self, model: str, image: str, upload: Path | None = None, session: str | None = None, **params: Any
    ) -> Any:
        """In SmartEdit the options come last: they win over prompts of the same name."""
        typed = params.pop("typed", {})
        sent = {**params, **self.options("models", model), **typed}
        sent |= {"result_extension": ".nrrd", "result_dtype": "uint8"}
        return self.client.infer(model, image, sent, str(upload) if upload else None, session_id=session)


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {name: generate_case(seed) for name, seed in SEEDS.items()}


@pytest.fixture(scope="module")
def slicer(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Slicer]:
    """A module connected to a server of this checkout with two uploaded cases."""
    given = os.environ.get("MEDVL_SLICER_CLIENT")
    name = "monailabel.client.client"
    spec = importlib.util.spec_from_file_location("plugin_client", given) if given else importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("slicer")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "scripts"))
        patch.setenv("MONAI_LABEL_SESSION_PATH", str(folder / "sessions"))
        local_server = load_script("local_server", patch)
        with local_server.own_server(folder) as server:
            user = Slicer(module, server.address, folder)
            for image, case in cases.items():
                user.client.upload_image(str(write(folder / f"{image}.nii.gz", case.image, case.spacing)), image)
            yield user


def truth(case: Case, name: str) -> np.ndarray:
    return lps(case.organs == CLASSES.index(name) + 1)


def test_info_fills_every_panel(slicer: Slicer) -> None:
    info = slicer.client.info()
    types = {model["type"] for model in info["models"].values()}
    assert types == {"segmentation", "deepgrow", "scribbles"}
    assert info["labels"][: len(CLASSES)] == list(CLASSES)
    assert info["datastore"]["total"] == 2
    assert "medvl_sam2" in info["trainers"]


def test_next_sample(slicer: Slicer) -> None:
    for strategy in slicer.client.info()["strategies"]:
        sample = slicer.client.next_sample(strategy, {})
        assert sample["id"] in SEEDS
        assert Path(sample["path"]).is_file()


def test_auto_segmentation_with_typed_options(slicer: Slicer, cases: dict[str, Case]) -> None:
    file, params = slicer.infer("medvl_semantic", "case_1", typed={"classes": "liver, left lung"})
    assert params["label_names"] == {"liver": 1, "lung_left": 2}
    mask = read(file)
    for value, name in enumerate(("liver", "lung_left"), start=1):
        assert dice(mask == value, truth(cases["case_1"], name)) > 0.7, name


def test_smart_edit_with_points_and_roi(slicer: Slicer, cases: dict[str, Case]) -> None:
    target = truth(cases["case_1"], "liver")
    low, high = np.argwhere(target).min(axis=0).tolist(), np.argwhere(target).max(axis=0).tolist()
    roi = [high[0], low[0], high[1], low[1], low[2], high[2]]  # interleaved; i and j fall where RAS grows
    prompts: dict[str, Any] = {"label": "liver", "foreground": [], "background": [], "roi": roi, "slice": 5}
    file, params = slicer.infer("medvl_interactive", "case_1", reset_state=True, **prompts)
    boxed = dice(read(file) > 0, target)
    assert params["label_names"] == {"liver": 1}
    assert boxed > 0.7
    prompts |= {"foreground": [middle(target)], "background": [[1, 1, 1]]}
    file, _ = slicer.infer("medvl_interactive", "case_1", **prompts)
    mask = read(file)
    assert mask[tuple(middle(target))] == 1
    assert mask[1, 1, 1] == 0
    assert dice(mask > 0, target) > boxed - 0.05


def test_the_segments_name_is_a_text_prompt(slicer: Slicer, cases: dict[str, Case]) -> None:
    file, params = slicer.infer("medvl_interactive", "case_1", label="left lung", foreground=[], background=[])
    assert params["label_names"] == {"left lung": 1}
    assert dice(read(file) > 0, truth(cases["case_1"], "lung_left")) > 0.7
    file, params = slicer.infer("medvl_referring", "case_1", typed={"prompt": "segment the liver"})
    assert dice(read(file) > 0, truth(cases["case_1"], "liver")) > 0.7


def test_text_answers_are_markups_on_their_evidence(slicer: Slicer, cases: dict[str, Case]) -> None:
    file, params = slicer.infer("medvl_vqa", "case_1", typed={"question": "Is the liver visible?"})
    assert file.endswith(".json")
    points = json.loads(Path(file).read_text())["markups"][0]["controlPoints"]
    assert points[0]["label"] == params["answer"]
    (liver,) = [point for point in points if point["label"] == "liver"]
    affine = nib.load(slicer.folder / "case_1.nii.gz").affine
    voxel = np.rint(np.linalg.inv(affine) @ [*liver["position"], 1])[:3].astype(int)
    assert truth(cases["case_1"], "liver")[tuple(voxel)]
    file, params = slicer.infer("medvl_report", "case_1")
    assert " ".join(sentence["text"] for sentence in params["sentences"]) == params["answer"]
    assert any(item["voxels"] for item in params["evidence"])


def test_scribbles_correct_the_selected_segment(slicer: Slicer, cases: dict[str, Case]) -> None:
    case, target = cases["case_1"], truth(cases["case_1"], "liver")
    at = middle(target)
    labels = np.zeros(target.shape, np.uint8)
    labels[target] = 1
    labels[..., at[2] :] = 0  # the upper part is still to be segmented
    inside = np.argwhere(target[:, at[1], at[2] + 2])[:, 0]
    labels[inside.min() + 2 : inside.max() - 1, at[1], at[2] + 2] = 3
    labels[1:4, 1, 1] = 2
    path = write(slicer.folder / "scribbles.nii.gz", labels.transpose(2, 1, 0), case.spacing)
    names = ("liver", "background_scribbles", "foreground_scribbles")
    info = [{"name": name, "id": n} for n, name in enumerate(names, start=1)]
    file, _ = slicer.infer("medvl_scribbles", "case_1", path, roi=[], label_info=info, selected_label_name="liver")
    mask = read(file) > 0
    assert mask[labels == 3].all()
    assert not mask[labels == 2].any()
    assert dice(mask, target) > dice(labels == 1, target)


def test_sessions_for_local_volumes(slicer: Slicer, cases: dict[str, Case]) -> None:
    path = write(slicer.folder / "local volume.nii.gz", cases["case_2"].image, cases["case_2"].spacing)
    session = slicer.client.create_session(str(path))["session_id"]
    assert Path(slicer.client.get_session(session)["image"]).is_file()
    file, _ = slicer.infer("medvl_semantic", "local volume", session=session, typed={"classes": "liver"})
    assert dice(read(file) > 0, truth(cases["case_2"], "liver")) > 0.7
    slicer.client.remove_session(session)
    with pytest.raises(slicer.failure) as failed:
        slicer.infer("medvl_semantic", "local volume", session=session, typed={"classes": "liver"})
    assert "session" in failed.value.msg  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("model", "image", "params", "reason"),
    [
        ("medvl_interactive", "case_1", {"label": "liver", "foreground": [[9999, 1, 1]]}, "lies outside the volume"),
        ("medvl_interactive", "case_1", {"label": "object", "foreground": []}, "place at least one foreground"),
        ("medvl_semantic", "case_1", {"typed": {"classes": "unicorn"}}, "not in the vocabulary"),
        ("medvl_vqa", "case_1", {}, "question is empty"),
        ("medvl_semantic", "nobody", {}, "nobody"),
    ],
)
def test_errors_reach_the_pop_up(slicer: Slicer, model: str, image: str, params: dict[str, Any], reason: str) -> None:
    with pytest.raises(slicer.failure) as failed:
        slicer.infer(model, image, **params)
    if image == "nobody":
        reason = "image"
    assert reason in failed.value.msg  # type: ignore[attr-defined]


def submit_kidneys(slicer: Slicer, cases: dict[str, Case]) -> None:
    """Submit a corrected label of every case."""
    for image, case in cases.items():
        labels = (case.organs == CLASSES.index("kidney_left") + 1).astype(np.uint8)
        path = write(slicer.folder / f"{image}_label.nii.gz", labels, case.spacing)
        info = [{"name": "kidney_left", "idx": 3}]  # segments that were left out come first: idx and value differ
        slicer.client.save_label(image, str(path), params={"label_info": info, "model": "medvl_semantic"})
        stored = read(slicer.client.download_label(image, "final"))
        assert np.array_equal(stored, lps(labels))


def test_submit_and_train(slicer: Slicer, cases: dict[str, Case]) -> None:
    """Two corrected cases are submitted, a training begins, refuses a second one and is stopped."""
    submit_kidneys(slicer, cases)
    assert slicer.client.info()["datastore"]["completed"] == 2
    assert set(slicer.client.datastore()["objects"]["case_1"]["labels"]) >= {"final"}

    options = slicer.options("trainers", "medvl_sam2")
    slicer.client.train_start("medvl_sam2", options)
    end = time.monotonic() + 30
    while not slicer.client.train_status(True) and time.monotonic() < end:
        time.sleep(0.2)  # submitted is not running yet
    assert slicer.client.train_status(True)
    with pytest.raises(slicer.failure):  # one at a time
        slicer.client.train_start("medvl_sam2", options)
    slicer.client.train_stop()
    assert not slicer.client.train_status(True)
    assert slicer.client.train_status()["status"] == "STOPPED"


@pytest.mark.hours
def test_a_training_runs_to_its_end(slicer: Slicer, cases: dict[str, Case]) -> None:
    """Most of its time goes into measuring the served model."""
    submit_kidneys(slicer, cases)
    options = slicer.options("trainers", "medvl_sam2")
    slicer.client.train_start("medvl_sam2", {**options, "max_epochs": 1, "steps_per_epoch": 1, "minutes": 0.2})
    end = time.monotonic() + 850
    while (task := slicer.client.train_status())["status"] in ("SUBMITTED", "RUNNING") and time.monotonic() < end:
        time.sleep(2)
    assert task["status"] == "DONE", task
    stats = slicer.client.info()["train_stats"]["medvl_sam2"]
    assert stats["epoch"] == 1
    assert stats["total_time"]
