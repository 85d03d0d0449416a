"""Requests of both clients become prompts in stored voxels, or are refused with the reason."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib import request_parsing as parsing
from lib.request_parsing import Client, TextTooLongError, UnknownImageError
from medvl_sam2.errors import PromptError
from medvl_sam2.strokes import Plane
from medvl_sam2.types import Geometry
from medvl_sam2.vocabulary import CLASSES
from medvl_sam2.volume_io import write_mask


@pytest.mark.parametrize(
    ("sent", "client", "key"),
    [
        ({"client_id": "user-xyz"}, Client.SLICER, "user-xyz"),
        ({"restore_label_idx": False, "result_compress": False}, Client.OHIF, "ohif"),
        ({}, Client.API, "api"),
        ({"client_id": "", "restore_label_idx": False}, Client.OHIF, "ohif"),
    ],
)
def test_clients_are_told_apart(tmp_path: Path, sent: dict[str, Any], client: Client, key: str) -> None:
    parsed = parsing.parse_request({"image": str(tmp_path), **sent})
    assert (parsed.client, parsed.client_id) == (client, key)
    assert parsed.compress is (client is not Client.OHIF)


@pytest.mark.parametrize("image", ["", None, 3, "no-such-file.nii.gz"])
def test_unknown_image(image: Any) -> None:
    with pytest.raises(UnknownImageError):
        parsing.parse_request({"image": image})


def test_slicer_box_is_interleaved_and_unsorted() -> None:
    prompt = parsing.parse_prompt({"roi": [120, 80, 180, 120, 40, 60]})
    assert prompt.box is not None
    assert prompt.box.tolist() == [[80, 120, 40], [120, 180, 60]]


def test_points_of_every_panel_mean_the_same() -> None:
    deepgrow = {"foreground": [[1, 2, 3]], "background": [[4, 5, 6]], "label": "liver"}
    vista = {"points": [[1, 2, 3], [4, 5, 6]], "point_labels": [1, 0], "label_prompt": [5]}
    deepedit = {"label": "liver", "liver": [[1, 2, 3]], "spleen": [], "background": [[4, 5, 6]]}
    for request in (deepgrow, vista, deepedit):
        prompt = parsing.parse_prompt(request)
        assert prompt.points.tolist() == [[1, 2, 3], [4, 5, 6]]
        assert prompt.labels.tolist() == [1, 0]
        assert prompt.box is None


@pytest.mark.parametrize(
    "request_",
    [
        {"foreground": "[[1,2,3]]"},
        {"foreground": [[1, 2]]},
        {"foreground": [["a", 2, 3]]},
        {"foreground": [1, 2, 3]},
        {"foreground": [[True, 2, 3]]},
        {"foreground": [[0, 0, 0]] * 1001},
        {"foreground": [[10**400, 2, 3]]},
        {"points": [[1, 2, 3]], "point_labels": [2]},
        {"points": [[1, 2, 3]], "point_labels": [[1]]},
        {"points": [[1, 2, 3]]},
        {"roi": [1, 2, 3]},
        {"roi": [1, 2, 3, 4, 5, "x"]},
        {"roi": "1,2,3,4,5,6"},
    ],
)
def test_bad_prompts_are_refused(request_: dict[str, Any]) -> None:
    with pytest.raises(PromptError):
        parsing.parse_prompt(request_)


def test_empty_values_are_no_prompt() -> None:
    """Slicer sends an empty list for a segment without points."""
    prompt = parsing.parse_prompt({"foreground": [], "background": [], "roi": []})
    assert prompt.points.shape == (0, 3)
    assert prompt.box is None


def test_uploaded_mask_is_a_prompt_and_a_path_elsewhere_is_a_name(tmp_path: Path) -> None:
    mask = np.zeros((3, 4, 5), np.uint8)
    mask[1, 2, 3] = 7
    geometry = Geometry((3, 4, 5), np.eye(4))
    uploaded = Path(tempfile.mkstemp(suffix=".nrrd")[1])
    elsewhere = tmp_path / "mask.nrrd"
    write_mask(uploaded, mask, geometry)
    write_mask(elsewhere, mask, geometry)
    try:
        prompt = parsing.parse_prompt({"label": str(uploaded)})
        assert prompt.mask is not None
        assert np.argwhere(prompt.mask).tolist() == [[1, 2, 3]]
        assert parsing.parse_label({"label": str(uploaded)}) == "object"
        assert parsing.parse_label({"label": str(uploaded), "label_name": "lesion 2"}) == "lesion 2"
    finally:
        uploaded.unlink()
    assert parsing.parse_prompt({"label": str(elsewhere)}).mask is None
    assert parsing.parse_label({"label": str(elsewhere)}) == str(elsewhere)


@pytest.mark.parametrize(
    ("request_", "classes"),
    [
        ({}, CLASSES),
        ({"classes": ""}, CLASSES),
        ({"classes": " , "}, CLASSES),
        ({"classes": "liver,spleen"}, ("liver", "spleen")),
        ({"classes": " Right Kidney, liver ,liver"}, ("kidney_right", "liver")),
        ({"classes": ["liver"]}, ("liver",)),
        ({"classes": "", "label_prompt": [5, 1]}, ("spleen", "liver")),
        ({"label_prompt": [18, 1]}, ("spleen",)),
    ],
)
def test_classes(request_: dict[str, Any], classes: tuple[str, ...]) -> None:
    assert parsing.parse_classes(request_) == classes


@pytest.mark.parametrize(
    "request_", [{"classes": "liver,unicorn"}, {"label_prompt": []}, {"label_prompt": [99]}, {"label_prompt": "all"}]
)
def test_classes_that_do_not_exist(request_: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match="spleen"):  # the message lists what does
        parsing.parse_classes(request_)


@pytest.mark.parametrize("value", [None, "", "  \n", 7, ["liver"]])
def test_text_must_say_something(value: Any) -> None:
    with pytest.raises(PromptError, match="prompt"):
        parsing.parse_text({"prompt": value}, "prompt", "the liver")


def test_text_has_a_limit() -> None:
    assert parsing.parse_text({"prompt": " x" * 5000}, "prompt", "the liver").startswith("x")
    with pytest.raises(TextTooLongError, match="100000"):
        parsing.parse_text({"prompt": "x" * 100_000}, "prompt", "the liver")


def test_only_labels_ohif_ticked_alone_count() -> None:
    assert parsing.ticked_label({"label_prompt": [17]}) == 17
    for ticked in ([], [1, 2], [99], None, "17"):
        assert parsing.ticked_label({"label_prompt": ticked}) is None


def test_drawn_lines_come_bare_or_with_a_label() -> None:
    line = [[1, 2, 3], [4, 2, 3]]
    prompt = parsing.parse_prompt({"scribbles": [line, {"points": line, "label": 0}], "lasso": []})
    assert [(s.kind, s.label) for s in prompt.strokes] == [("scribble", 1), ("scribble", 0)]
    assert prompt.strokes[0].points.tolist() == line
    assert not prompt.names_only
    alone = parsing.parse_prompt({"lasso": {"points": [[1, 2, 3], [4, 2, 3], [4, 5, 3]], "label": 0}})
    assert [(s.kind, s.label) for s in alone.strokes] == [("lasso", 0)]


def test_accepted_planes_are_those_of_k_unless_axes_are_named() -> None:
    assert parsing.parse_prompt({"accepted": [4, 7]}).accepted == (Plane(2, 4), Plane(2, 7))
    assert parsing.parse_prompt({"accepted": {"j": [1], "k": [4]}}).accepted == (Plane(1, 1), Plane(2, 4))
    assert parsing.parse_prompt({"accepted": []}).accepted == ()


def test_what_clients_send_of_their_own_asks_for_nothing_more() -> None:
    """Slicer's options are strings and flags, OHIF repeats stale keys of other panels."""
    prompt = parsing.parse_prompt(
        {"prompt": " ", "scribbles": "", "propagate": "false", "slice": 3, "label_prompt": [2]}
    )
    assert prompt.names_only
    assert prompt.text is None
    assert not prompt.propagate
    assert parsing.parse_prompt({"propagate": "true"}).propagate


def test_a_flat_roi_is_a_box_on_one_plane_and_corners_are_a_box_too() -> None:
    flat = parsing.parse_prompt({"roi": [120, 80, 180, 120, 40, 40]}).box
    assert flat is not None
    assert flat.tolist() == [[80, 120, 40], [120, 180, 40]]
    corners = parsing.parse_prompt({"roi": [0, 1, 0, 1, 0, 1], "box": [[1, 2, 3], [4, 5, 6]]}).box
    assert corners is not None
    assert corners.tolist() == [[1, 2, 3], [4, 5, 6]]
