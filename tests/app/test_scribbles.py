"""Slicer's Scribbles panel: a labelmap with painted voxels in, the corrected segment out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from app.conftest import AFFINE, SHAPE, Running, multipart
from lib.scribble_paths import painted_strokes
from medvl_sam2.errors import PromptError
from medvl_sam2.predictor.edits import CanonicalStroke
from medvl_sam2.strokes import StrokeKind

INFO = [
    {"name": "spleen", "id": 1},
    {"name": "liver", "id": 2},
    {"name": "background_scribbles", "id": 3},
    {"name": "foreground_scribbles", "id": 4},
]


def paint(running: Running, folder: Path, labels: np.ndarray, **params: Any) -> Any:
    """As the panel asks: the segmentation is uploaded, an ROI that was not placed is an empty list."""
    nib.save(nib.Nifti1Image(labels, AFFINE), folder / "scribbles.nii.gz")
    sent = {"client_id": "user-xyz", "roi": [], "label_info": INFO, "selected_label_name": "liver", **params}
    with open(folder / "scribbles.nii.gz", "rb") as stream:
        return running.client.post(
            "/infer/medvl_scribbles",
            params={"image": "case_a"},
            data={"params": json.dumps(sent)},
            files={"label": ("scribbles.nii.gz", stream)},
        )


def test_painted_voxels_correct_the_selected_segment(
    running: Running, tmp_path: Path, read_label: Callable[[bytes, Path], np.ndarray]
) -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[0, 0, :] = 1  # another segment stays out of it
    labels[3:6, 3:6, 8] = 2
    labels[8, 2:6, 8] = 4
    labels[3:6, 3, 8] = 3  # painted over the segment
    response = paint(running, tmp_path, labels)
    params, file, content = multipart(response)
    assert (file.endswith(".nrrd"), params["label_names"]) == (True, {"liver": 1})
    expected = (labels == 2) | (labels == 4)
    assert np.array_equal(read_label(content, tmp_path) > 0, expected)
    name, prompt = running.predictors[0].prompts[0]
    assert name == "liver"
    assert prompt.mask is not None
    assert np.array_equal(prompt.mask, labels == 2)
    assert sorted(stroke.label for stroke in prompt.strokes) == [0, 1]


def test_the_roi_is_the_box_of_a_segment_that_is_still_empty(running: Running, tmp_path: Path) -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[1, 1, 1] = 4  # a single voxel is a point
    assert paint(running, tmp_path, labels, roi=[8, 0, 2, 7, 10, 3]).status_code == 200
    _, prompt = running.predictors[0].prompts[0]
    assert prompt.mask is None
    assert prompt.box is not None
    assert prompt.box.tolist() == [[0, 2, 3], [8, 7, 10]]
    assert prompt.points.tolist() == [[1, 1, 1]]


@pytest.mark.parametrize(
    ("value", "params", "reason"),
    [(0, {}, "paint foreground"), (3, {}, "paint foreground"), (4, {"label_info": None}, "label_info")],
)
def test_what_says_nothing_is_refused(
    running: Running, tmp_path: Path, value: int, params: dict[str, Any], reason: str
) -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:5, 2, 2] = value
    response = paint(running, tmp_path, labels, **params)
    assert (response.status_code, reason in response.text) == (400, True)
    assert running.slicer("medvl_scribbles", label_info=INFO).status_code == 400  # no labelmap


def test_strokes_run_through_exactly_the_painted_voxels() -> None:
    """Also where a scribble bends round something, which a straight line between its voxels would cross."""
    painted = np.zeros((20, 30, 12), bool)
    painted[2:18, 3:5, 4] = painted[2:18, 20:23, 4] = painted[2:4, 3:23, 4] = True
    painted[10, 10, 4] = painted[5:8, 26, 2:9] = True
    points, strokes = painted_strokes(painted, 1)
    assert [point.tolist() for point in points] == [[10, 10, 4]]
    marked = np.zeros_like(painted)
    marked[10, 10, 4] = True
    for stroke in strokes:
        voxels = CanonicalStroke.through(StrokeKind.SCRIBBLE, stroke.well_formed().points, 1).voxels
        marked[tuple(voxels.T)] = True
    assert np.array_equal(marked, painted)
    assert len(strokes) == 2


def test_a_large_piece_is_several_strokes_and_a_whole_organ_is_none() -> None:
    painted = np.zeros((30, 30, 20), bool)
    painted[2:28, 2:28, 2:18] = True
    _, strokes = painted_strokes(painted, 0)
    assert len(strokes) > 1
    assert len(np.unique(np.concatenate([stroke.well_formed().points for stroke in strokes]), axis=0)) == painted.sum()
    with pytest.raises(PromptError, match="painted voxels"):
        painted_strokes(np.ones((80, 80, 40), bool), 1)
