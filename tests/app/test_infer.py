"""Every infer task, asked as each client asks, answers in that client's own terms."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nrrd
import numpy as np
import pytest

from app.conftest import AFFINE, SHAPE, Running, multipart
from app.fakes import NOTICE
from lib.result_writing import result_folder
from medvl_sam2.vocabulary import CLASSES

Read = Callable[[bytes, Path], np.ndarray]


def test_slicer_click_lands_on_its_voxel(running: Running, read_label: Read, tmp_path: Path) -> None:
    response = running.slicer(
        "medvl_interactive", label="liver", foreground=[[1, 2, 3]], background=[[4, 5, 6]], dimension=3, unknown="x"
    )
    params, file, content = multipart(response)
    assert file.endswith(".nrrd")
    mask = read_label(content, tmp_path)
    assert mask.shape == SHAPE
    assert np.argwhere(mask).tolist() == [[1, 2, 3]]
    assert mask[1, 2, 3] == 1
    assert params["label_names"] == {"liver": 1}
    name, prompt = running.predictors[0].prompts[0]
    assert name == "liver"
    assert prompt.labels.tolist() == [1, 0]


def test_slicer_box(running: Running, read_label: Read, tmp_path: Path) -> None:
    _, _, content = multipart(running.slicer("medvl_interactive", label="liver", roi=[5, 3, 2, 6, 9, 7]))
    voxels = np.argwhere(read_label(content, tmp_path))
    assert voxels.min(axis=0).tolist() == [3, 2, 7]
    assert voxels.max(axis=0).tolist() == [5, 6, 9]


def test_named_segment_without_points_is_a_text_prompt(running: Running, read_label: Read, tmp_path: Path) -> None:
    params, _, content = multipart(running.slicer("medvl_interactive", label="left adrenal", foreground=[]))
    assert params["label_names"] == {"left adrenal": 1}
    assert np.argwhere(read_label(content, tmp_path)).tolist() == [[0, 0, 0]]
    name, prompt = running.predictors[0].prompts[0]
    assert (name, prompt.text) == ("left adrenal", "left adrenal")
    response = running.slicer("medvl_interactive", label="left adrenal", foreground=[[1, 2, 3]])
    assert response.status_code == 200
    name, prompt = running.predictors[0].prompts[1]  # goes on from the text's mask, in the same session
    assert (name, prompt.text, prompt.points.tolist()) == ("left adrenal", None, [[1, 2, 3]])


def test_ohif_click(running: Running) -> None:
    response = running.ohif("medvl_interactive", foreground=[[1, 2, 3]], background=[])
    assert response.status_code == 200
    values, header = _nrrd(response.content)
    assert header["type"] in ("uint8", "unsigned char", "uchar")
    assert header["encoding"] == "raw"
    # OHIF pastes by flat voxel order, i fastest.
    i, j, _ = SHAPE
    assert values.ravel(order="F").nonzero()[0].tolist() == [1 + i * (2 + j * 3)]


def test_written_grid_is_the_stored_one(running: Running) -> None:
    _, header = _nrrd(running.ohif("medvl_interactive", foreground=[[1, 2, 3]]).content)
    lps = np.diag([-1.0, -1.0, 1.0])
    assert header["space"] == "left-posterior-superior"
    np.testing.assert_allclose(header["space directions"], (lps @ AFFINE[:3, :3]).T)
    np.testing.assert_allclose(header["space origin"], lps @ AFFINE[:3, 3])


def test_semantic_values_for_slicer_count_from_one(running: Running, read_label: Read, tmp_path: Path) -> None:
    params, _, content = multipart(running.slicer("medvl_semantic", classes="liver,spleen"))
    assert params["label_names"] == {"liver": 1, "spleen": 2}  # only these segments are cleared and replaced
    mask = read_label(content, tmp_path)
    assert (mask[..., CLASSES.index("liver")] == 1).all()
    assert (mask[..., CLASSES.index("spleen")] == 2).all()
    assert np.unique(mask).tolist() == [0, 1, 2]


@pytest.mark.parametrize("options", [{"classes": "liver,spleen"}, {"label_prompt": [5, 1]}])
def test_semantic_values_for_ohif_are_those_of_info(running: Running, options: dict[str, Any]) -> None:
    values, _ = _nrrd(running.ohif("medvl_semantic", **options).content)
    assert np.unique(values).tolist() == [0, 1, 5]
    assert (values[..., CLASSES.index("liver")] == 5).all()


def test_semantic_all_classes_agree_for_everyone(running: Running, read_label: Read, tmp_path: Path) -> None:
    ohif, _ = _nrrd(running.ohif("medvl_semantic").content)
    params, _, content = multipart(running.slicer("medvl_semantic", classes=""))
    assert np.array_equal(ohif, read_label(content, tmp_path))
    assert list(params["label_names"]) == list(CLASSES)


def test_program_gets_values_that_match_the_names(running: Running, read_label: Read, tmp_path: Path) -> None:
    params, _, content = multipart(running.infer("medvl_semantic", classes="liver"))
    mask = read_label(content, tmp_path)
    assert np.unique(mask).tolist() == [0, params["label_names"]["liver"]]
    # Position equals value, so that Slicer reads a stored prediction rightly.
    assert list(params["label_names"].values()) == list(range(1, len(params["label_names"]) + 1))
    assert params["segmented"] == ["liver"]


@pytest.mark.parametrize(
    ("prompt", "name", "value"),
    [
        ("right kidney", "kidney_right", 2),
        ("the liver", "liver", 5),
        ("the largest cyst in the left kidney", "largest cyst in the left kidney", 17),
        ("the thing near the spine", "thing near the spine", 18),
    ],
)
def test_referring(running: Running, read_label: Read, tmp_path: Path, prompt: str, name: str, value: int) -> None:
    params, _, content = multipart(running.slicer("medvl_referring", prompt=prompt))
    assert params["label_names"] == {name: 1}
    assert read_label(content, tmp_path)[0, 0, 0] == 1
    values, _ = _nrrd(running.ohif("medvl_referring", prompt=prompt).content)
    assert np.unique(values).tolist() == [0, value]


def test_referring_takes_the_label_ohif_ticked(running: Running) -> None:
    values, _ = _nrrd(running.ohif("medvl_referring", prompt="the thing", label_prompt=[9]).content)
    assert np.unique(values).tolist() == [0, 9]
    values, _ = _nrrd(running.ohif("medvl_referring", prompt="liver", label_prompt=[9]).content)
    assert np.unique(values).tolist() == [0, 5]


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        ("medvl_vqa", {"question": "is there a lesion?"}, "No, to 'is there a lesion?'."),
        ("medvl_report", {}, "Liver: normal. Spleen: normal."),
    ],
)
def test_text_answers(running: Running, tmp_path: Path, model: str, options: dict[str, Any], text: str) -> None:
    for response in (running.infer(model, **options), running.infer(model, output="json", **options)):
        assert response.headers["content-type"] == "application/json"
        assert response.json()["answer"] == text
        assert response.json()["notice"] == NOTICE

    params, file, content = multipart(running.slicer(model, **options))
    assert file.endswith(".json")
    assert "markups-schema" in content[:300].decode()
    points = json.loads(content)["markups"][0]["controlPoints"]
    assert [point["label"] for point in points] == [text, NOTICE, "liver"]  # what the map does not show has no point
    center = AFFINE @ [*((np.array(SHAPE) - 1) / 2), 1]
    np.testing.assert_allclose(points[0]["position"], center[:3], atol=1e-3)
    np.testing.assert_allclose(points[2]["position"], (AFFINE @ [1, 2, 3.5, 1])[:3], atol=1e-3)
    assert [item["name"] for item in params["evidence"]] == ["liver", "spleen"]
    assert params["evidence"][0]["centroid_voxel"] == [1, 2, 3.5]
    assert "label_names" not in params  # no segment may change

    response = running.ohif(model, **options)
    assert response.status_code == 200
    path = tmp_path / "ohif.nrrd"
    path.write_bytes(response.content)
    values, _ = nrrd.read(str(path))
    assert values.shape == SHAPE
    assert not values.any()


@pytest.mark.parametrize("model", ["medvl_vqa", "medvl_report"])
def test_text_answers_are_never_stored_as_labels(running: Running, model: str) -> None:
    response = running.slicer(model, question="why?", save_label=True, label_tag="original")
    assert response.status_code == 200
    assert running.app.datastore().get_labels_by_image_id("case_a") == {}


def test_saved_prediction_is_what_slicer_reads_back(running: Running) -> None:
    assert running.ohif("medvl_semantic", classes="liver", save_label=True).status_code == 200
    info = running.client.get("/datastore/label/info", params={"label": "case_a", "tag": "original"}).json()
    assert list(info["params"]["label_names"].values()) == list(range(1, len(CLASSES) + 2))
    assert Path(running.app.datastore().get_label_uri("case_a", "original")).is_file()


def test_result_files_are_throw_away(running: Running) -> None:
    before = set(result_folder().iterdir())  # of tests in this process that broke an answer off
    for _ in range(2):
        assert running.slicer("medvl_semantic", classes="liver").status_code == 200
        assert running.slicer("medvl_report").status_code == 200
        assert running.ohif("medvl_report").status_code == 200
    assert set(result_folder().iterdir()) == before
    assert (running.studies / "case_a.nii.gz").is_file()


def test_client_on_the_same_machine_keeps_what_it_received(running: Running) -> None:
    """MONAI Label's client stores a result in the temporary folder under the server's name for it."""
    _, file, _ = multipart(running.slicer("medvl_semantic", classes="liver"))
    assert result_folder() != Path(tempfile.gettempdir())
    assert not (Path(tempfile.gettempdir()) / file).exists()


def test_other_result_kinds(running: Running, tmp_path: Path) -> None:
    import nibabel as nib

    _, file, content = multipart(running.infer("medvl_semantic", classes="spleen", result_extension=".nii.gz"))
    assert file.endswith(".nii.gz")
    path = tmp_path / "received.nii.gz"
    path.write_bytes(content)
    image = nib.load(path)
    np.testing.assert_allclose(image.affine, AFFINE)
    assert np.asarray(image.dataobj)[..., 0].all()


def test_uploaded_file_and_session(running: Running, tmp_path: Path) -> None:
    from app.conftest import write_phantom

    shape = (5, 6, 7)
    path = write_phantom(tmp_path / "mine.nii.gz", 50, shape)
    with open(path, "rb") as stream:
        created = running.client.put("/session/", files={"files": (path.name, stream)}).json()
    data = {"params": json.dumps({"client_id": "u", "foreground": [[4, 5, 6]]})}
    query = {"image": "mine", "session_id": created["session_id"]}
    response = running.client.post("/infer/medvl_interactive", params=query, data=data)
    values, _ = _nrrd(multipart(response)[2])
    assert values.shape == shape
    with open(path, "rb") as stream:
        response = running.client.post("/infer/medvl_interactive", data=data, files={"file": (path.name, stream)})
    assert _nrrd(multipart(response)[2])[0].shape == shape


def test_mask_prompt_by_upload(running: Running, tmp_path: Path, read_label: Read) -> None:
    start = np.zeros(SHAPE, np.uint8)
    start[7, 8, 9] = 1
    import nibabel as nib

    nib.save(nib.Nifti1Image(start, AFFINE), tmp_path / "start.nii.gz")
    with open(tmp_path / "start.nii.gz", "rb") as stream:
        response = running.client.post(
            "/infer/medvl_interactive", params={"image": "case_a"}, files={"label": ("start.nii.gz", stream)}
        )
    assert np.argwhere(read_label(multipart(response)[2], tmp_path)).tolist() == [[7, 8, 9]]


def test_batch_inference_without_a_gpu(running: Running) -> None:
    request = {"model": "medvl_semantic", "images": "all", "multi_gpu": True, "label_tag": "original"}
    result = running.app.batch_infer(request)
    assert sorted(result) == ["case_a", "case_b"]
    assert running.app.datastore().get_labels_by_image_id("case_b") == {"original": "case_b"}


def _nrrd(content: bytes) -> tuple[np.ndarray, dict[str, Any]]:
    import io

    stream = io.BytesIO(content)
    header = nrrd.read_header(stream)
    return nrrd.read_data(header, stream, index_order="F"), header


def test_drawn_prompts_reach_the_predictor_in_stored_voxels(running: Running, read_label: Read, tmp_path: Path) -> None:
    line, outline = [[1, 2, 3], [2, 2, 3]], [[5, 5, 9], [8, 5, 9], [8, 8, 9]]
    for ask in (running.slicer, running.infer):
        response = ask(
            "medvl_interactive",
            label="cyst",
            scribbles=[line, {"points": [[1, 2, 4], [1, 3, 4]], "label": 0}],
            lasso={"points": outline},
            box=[[0, 0, 2], [9, 9, 12]],
            accepted={"k": [4, 5], "i": [0]},
            propagate=True,
        )
        assert response.status_code == 200
    prompts = [prompt for _, prompt in running.predictors[0].prompts]
    for prompt in prompts:
        assert [(stroke.kind, stroke.label) for stroke in prompt.strokes] == [
            ("scribble", 1),
            ("scribble", 0),
            ("lasso", 1),
        ]
        assert prompt.strokes[2].points.tolist() == outline
        assert {(plane.axis, plane.index) for plane in prompt.accepted} == {(2, 4), (2, 5), (0, 0)}
        assert prompt.propagate
        assert prompt.box is not None
        assert prompt.box.tolist() == [[0, 0, 2], [9, 9, 12]]
    _, _, content = multipart(running.slicer("medvl_interactive", scribbles=[line]))
    assert np.argwhere(read_label(content, tmp_path)).tolist() == line


def test_words_may_be_given_with_points(running: Running) -> None:
    assert running.infer("medvl_interactive", prompt="the liver", foreground=[[1, 2, 3]]).status_code == 200
    _, prompt = running.predictors[0].prompts[0]
    assert prompt.text == "the liver"
    assert len(prompt.points) == 1


def test_undo_and_redo_by_request(running: Running, read_label: Read, tmp_path: Path) -> None:
    assert running.slicer("medvl_interactive", label="liver", undo=True).status_code == 400  # nothing placed yet
    assert running.slicer("medvl_interactive", label="liver", foreground=[[1, 2, 3]]).status_code == 200
    _, _, content = multipart(running.slicer("medvl_interactive", label="liver", undo=2))
    assert not read_label(content, tmp_path).any()
    assert running.predictors[0].moves == [("liver", -2)]
    refused = running.slicer("medvl_interactive", label="liver", redo=True)
    assert (refused.status_code, "cannot be redone" in refused.text) == (400, True)
    for bad in ({"undo": True, "redo": True}, {"undo": -1}, {"redo": "yes"}):
        assert running.slicer("medvl_interactive", label="liver", **bad).status_code == 400


def test_what_words_found_is_corrected_by_background_points_alone(running: Running) -> None:
    background = {"label": "liver", "background": [[1, 2, 3]]}
    refused = running.slicer("medvl_interactive", **background)
    assert (refused.status_code, "no 'liver' yet" in refused.text) == (400, True)
    assert running.slicer("medvl_interactive", label="liver").status_code == 200
    assert running.slicer("medvl_interactive", **background).status_code == 200
    assert running.slicer("medvl_interactive", **{**background, "label": "spleen"}).status_code == 400
    name, prompt = running.predictors[0].prompts[-1]
    assert (name, prompt.text, prompt.labels.tolist()) == ("liver", None, [0])
    assert running.slicer("medvl_interactive", label="liver", undo=True).status_code == 200
    assert running.slicer("medvl_interactive", **background).status_code == 400
