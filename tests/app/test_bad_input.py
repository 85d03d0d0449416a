"""Bad input gets a 4xx with the reason, and the server and everything stored live on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from app.conftest import AFFINE, SHAPE, Running


@pytest.mark.parametrize(
    ("model", "params", "status", "reason"),
    [
        ("medvl_interactive", {}, 400, "foreground point"),
        ("medvl_interactive", {"foreground": [], "background": []}, 400, "foreground point"),
        ("medvl_interactive", {"background": [[1, 1, 1]]}, 400, "background"),
        ("medvl_interactive", {"foreground": [[99, 1, 1]]}, 400, "outside the volume"),
        ("medvl_interactive", {"foreground": [[-3, 1, 1]]}, 400, "outside the volume"),
        ("medvl_interactive", {"foreground": [[1, 1]]}, 400, "three numbers"),
        ("medvl_interactive", {"foreground": "here"}, 400, "list of voxels"),
        ("medvl_interactive", {"roi": [90, 99, 1, 2, 1, 2]}, 400, "outside the volume"),
        ("medvl_interactive", {"foreground": [[1, 1, 1]], "result_extension": ".exe"}, 400, ".exe"),
        ("medvl_interactive", {"label": "x" * 100_000}, 413, "100000 characters"),
        ("medvl_semantic", {"classes": "unicorn"}, 400, "unicorn"),
        ("medvl_semantic", {"classes": "x" * 100_000}, 413, "100000"),
        ("medvl_referring", {}, 400, "prompt is empty"),
        ("medvl_referring", {"prompt": "  "}, 400, "prompt is empty"),
        ("medvl_referring", {"prompt": "x" * 100_000}, 413, "at most 10000"),
        ("medvl_vqa", {"question": ""}, 400, "question is empty"),
        ("medvl_vqa", {"question": "x" * 100_000}, 413, "at most 10000"),
        ("medvl_vqa", {"question": 5}, 400, "must be text"),
        ("medvl_unknown", {}, 404, "medvl_semantic"),
    ],
)
def test_bad_requests(running: Running, model: str, params: dict[str, Any], status: int, reason: str) -> None:
    for ask in (running.slicer, running.ohif, running.infer):
        response = ask(model, **params)
        assert response.status_code == status, response.text
        assert reason in response.json()["detail"]
    assert running.slicer("medvl_semantic", classes="liver").status_code == 200


NAN = float("nan")
BOW_TIE = [[1, 1, 3], [8, 8, 3], [8, 1, 3], [1, 7, 3]]


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"foreground": [[NAN, 1, 1]]}, "not finite"),
        ({"foreground": [[1, 1, float("inf")]]}, "not finite"),
        ({"foreground": [[1, 2, 3]] * 20_000}, "20000 points; give at most 1000"),
        ({"points": [[1, 2, 3]] * 20_000, "point_labels": [1] * 20_000}, "give at most 1000"),
        ({"roi": [1, NAN, 1, 5, 1, 5]}, "finite"),
        ({"roi": [1, 5, 1, 5, 30, 40]}, "outside the volume"),
        ({"box": [[5, 5, 5], [1, 9, 9]]}, "inverted"),
        ({"box": [[5, 5, 5]]}, "lowest and its highest"),
        ({"box": "1,2,3"}, "lowest and its highest"),
        ({"scribbles": [[[1, 2, 3]]]}, "scribble of one voxel"),
        ({"scribbles": [[[1, 2, 3], [1, 2, NAN]]]}, "not finite"),
        ({"scribbles": [[[1, 2, 3], [1, 2, 20]]]}, "outside the volume"),
        ({"scribbles": [[[1, 2, 3]] * 20_000]}, "give at most 10000"),
        ({"scribbles": [[[1, 2, 3], [2, 2, 3]]] * 201}, "201 lines; give at most 200"),
        ({"scribbles": [{"points": [[1, 2, 3], [2, 2, 3]], "label": 2}]}, "label 2"),
        ({"scribbles": [{"points": [[1, 2, 3], [2, 2, 3]], "label": "liver"}]}, "label 'liver'"),
        ({"label": "new", "scribbles": [{"points": [[1, 2, 3], [2, 2, 3]], "label": 0}]}, "only background"),
        ({"scribbles": [7]}, "list of voxels"),
        ({"scribbles": "here"}, "list of lines"),
        ({"lasso": [BOW_TIE]}, "crosses itself"),
        ({"lasso": [[[1, 1, 3], [8, 1, 3], [8, 8, 4]]]}, "leaves its plane"),
        ({"lasso": [[[1, 1, 3], [8, 1, 3]]]}, "at least three"),
        ({"lasso": [[[1, 1, 3], [4, 1, 3], [8, 1, 3]]]}, "no area"),
        ({"lasso": [[[1, 1, 3]] * 20_000]}, "give at most 1000"),
        ({"foreground": [[1, 2, 3]], "accepted": [20]}, "no plane 20"),
        ({"foreground": [[1, 2, 3]], "accepted": [-1]}, "no plane -1"),
        ({"foreground": [[1, 2, 3]], "accepted": {"z": [1]}}, "i, j and k"),
        ({"foreground": [[1, 2, 3]], "accepted": [1.5]}, "whole numbers"),
        ({"foreground": [[1, 2, 3]], "accepted": [3] * 20_000}, "whole numbers"),
    ],
)
def test_bad_prompts_are_refused_in_time_and_the_session_lives_on(
    start: Callable[..., Running], params: dict[str, Any], reason: str
) -> None:
    """Time is that of this process, which holds the server, too: other programs on the machine do not count."""
    running = start(prepare="false")  # opens no session besides
    good = {"foreground": [[1, 2, 3]], "label": "liver"}
    assert running.slicer("medvl_interactive", **good).status_code == 200
    started = time.process_time()
    response = running.slicer("medvl_interactive", **{"label": "liver", **params})
    seconds = time.process_time() - started
    assert response.status_code == 400, response.text
    assert reason in response.json()["detail"]
    assert len(response.json()["detail"]) < 500
    assert running.slicer("medvl_interactive", **good).status_code == 200
    assert len(running.predictors[0].opened) == 1
    assert seconds < 2


@pytest.mark.parametrize("key", ["foreground", "scribbles", "lasso"])
def test_a_million_points_are_refused_in_time(running: Running, key: str) -> None:
    line = [[1, 2, 3]] * 1_000_000
    text = json.dumps({key: line if key == "foreground" else [line]})
    started = time.process_time()
    response = running.client.post(
        "/infer/medvl_interactive", params={"image": "case_a"}, files={"params": (None, text)}
    )
    seconds = time.process_time() - started
    assert response.status_code == 400, response.text
    assert "maximum size" in response.json()["detail"]  # refused before it is read as JSON
    assert seconds < 2
    assert running.slicer("medvl_interactive", foreground=[[1, 2, 3]]).status_code == 200


@pytest.mark.parametrize("image", ["no_such_case", "../case_a", "case_a.nii.gz"])
def test_unknown_image(running: Running, image: str) -> None:
    for model in ("medvl_semantic", "medvl_report"):
        response = running.slicer(model, image=image)
        assert response.status_code == 404
        assert "image" in response.json()["detail"]


def test_files_of_the_server_are_no_images(running: Running, repository: Path) -> None:
    secret = repository / "pyproject.toml"
    for response in (
        running.slicer("medvl_semantic", image=str(secret)),
        running.slicer("medvl_semantic", image=str(secret)),
    ):
        assert response.status_code == 404
        assert "not in the datastore" in response.json()["detail"]
    assert running.infer("medvl_report", image=str(running.studies / "case_a.nii.gz")).status_code == 200


@pytest.mark.parametrize("params", ["{", "[1, 2]", "null", '"text"'])
def test_params_that_are_no_object(running: Running, params: str) -> None:
    response = running.client.post("/infer/medvl_report", params={"image": "case_a"}, data={"params": params})
    assert response.status_code == 400
    assert "params" in response.json()["detail"]


def test_no_image_at_all(running: Running) -> None:
    assert running.client.post("/infer/medvl_report").status_code == 400


def _corrupt(path: Path) -> None:
    path.write_bytes(b"this is no image")


def _cut(path: Path) -> None:
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random(SHAPE), AFFINE), path)
    path.write_bytes(path.read_bytes()[:2000])


def _empty(path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.int16), AFFINE), path)


def _four_dimensional(path: Path) -> None:
    nib.save(nib.Nifti1Image(np.ones((*SHAPE, 3), np.int16), AFFINE), path)


@pytest.mark.parametrize("spoil", [_corrupt, _cut, _empty, _four_dimensional])
def test_images_that_cannot_be_read(running: Running, spoil: Callable[[Path], None]) -> None:
    spoil(running.studies / "case_c.nii.gz")
    running.app.datastore().refresh()
    for model, params in (("medvl_semantic", {}), ("medvl_interactive", {"foreground": [[1, 1, 1]]})):
        response = running.slicer(model, image="case_c", **params)
        assert response.status_code == 415
        assert "case_c" in response.json()["detail"]
    assert running.slicer("medvl_semantic", classes="liver").status_code == 200


def test_a_failure_inside_states_a_reason_and_spoils_no_session(start: Callable[..., Running]) -> None:
    running = start(prepare="false")  # opens no session besides
    click = {"foreground": [[1, 1, 1]], "label": "liver"}
    running.slicer("medvl_interactive", **click)
    running.predictors[0].broken = True
    response = running.slicer("medvl_interactive", **click)
    assert response.status_code == 500
    assert "the fake is broken" in response.json()["detail"]
    running.predictors[0].broken = False
    assert running.slicer("medvl_interactive", **click).status_code == 200
    assert len(running.predictors[0].opened) == 2


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/activelearning/nonsense", 404),
        ("/scoring/nonsense", 404),
        ("/train/nonsense", 404),
        ("/batch/infer/nonsense", 404),
    ],
)
def test_unknown_tasks(running: Running, path: str, status: int) -> None:
    response = running.client.post(path, json={})
    assert response.status_code == status
    assert "nonsense" in response.json()["detail"]


def test_errors_of_monai_label_itself_state_a_reason(running: Running) -> None:
    response = running.client.delete("/datastore/image", params={"id": "no_such_case"})
    assert response.status_code == 404
    assert "no_such_case" in response.json()["detail"]
    response = running.client.put("/datastore/image/info", params={"image": "case_a"}, data={"info": "{"})
    assert response.status_code == 400


def test_every_route_of_monai_label_is_still_there(running: Running) -> None:
    paths = running.client.get("/openapi.json").json()["paths"]
    for path in (
        "/info/",
        "/infer/{model}",
        "/train/{model}",
        "/datastore/label",
        "/session/",
        "/activelearning/{strategy}",
    ):
        assert path in paths
    assert running.client.get("/ohif/").status_code == 200
    assert running.client.get("/logs/", params={"lines": 1}).status_code in (200, 404)
