"""A client that keeps its last mask gets what changed, and has the whole mask after it pasted that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from app.conftest import SHAPE, Running, multipart
from lib.changed_box import SentMasks
from medvl_sam2.types import Geometry

AFFINE = np.array([[0.0, -1.5, 0.3, 12], [0, 0.2, 2.0, -30], [-4.0, 0, 0, 55], [0, 0, 0, 1]])


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1)])
def test_pasting_the_parts_gives_every_mask(order: str, axes: tuple[int, int, int]) -> None:
    rng, sent, have = np.random.default_rng(1), SentMasks(), np.zeros((7, 9, 5), np.uint8)
    geometry = Geometry(have.shape, AFFINE)
    mask, last_number = have.copy(), 0
    for n in range(12):
        low = rng.integers(0, np.array(have.shape) - 1)
        if n % 4:
            mask[tuple(slice(a, a + 2) for a in low)] = n % 2
        stored = np.asarray(mask.transpose(axes), order=order).copy(order="K").transpose(np.argsort(axes))  # type: ignore[call-overload]
        before, part = have.copy(), sent.part("a", stored, geometry, None if n < 6 else last_number)
        assert part.whole == (n == 0)
        assert part.number > last_number
        last_number = part.number
        if part.box is None:
            assert np.array_equal(before, mask)
            assert part.mask.shape == (1, 1, 1)
            continue
        first, last = part.box
        have[tuple(slice(a, b + 1) for a, b in zip(first, last, strict=True))] = part.mask
        assert np.array_equal(have, mask)
        assert np.allclose(part.geometry.voxel_to_world(np.zeros((1, 3))), geometry.voxel_to_world(np.array([first])))
        changed = np.argwhere(before != mask)
        if not part.whole:
            assert (changed.min(axis=0).tolist(), changed.max(axis=0).tolist()) == (first, last)
    assert sent.bytes == 40
    assert sent.part("a", mask, geometry, 3).whole  # a reply was lost
    assert sent.part("b", mask, geometry).whole
    sent.forget("a")
    assert sent.part("a", mask, geometry).whole


def test_a_mask_from_before_a_reset_is_not_taken_for_the_last_one() -> None:
    sent, mask, geometry = SentMasks(), np.ones((3, 4, 5), np.uint8), Geometry((3, 4, 5), AFFINE)
    had = sent.part("a", mask, geometry).number
    sent.clear()
    sent.part("a", mask, geometry)  # lost on its way
    assert sent.part("a", mask, geometry, had).whole


def test_a_mask_that_lies_otherwise_in_memory_is_sent_whole() -> None:
    sent, geometry = SentMasks(), Geometry((3, 4, 5), AFFINE)
    mask = np.zeros((3, 4, 5), np.uint8)
    mask[0, 0, 1] = 1
    sent.part("a", mask, geometry)
    assert sent.part("a", np.asfortranarray(mask), geometry).whole


def ask(running: Running, folder: Path, **params: Any) -> tuple[dict[str, Any], sitk.Image]:
    sent = {"client_id": "program", "changed_box": True, "label": "liver"}
    values, _, content = multipart(running.infer("medvl_interactive", **{**sent, **params}))
    path = folder / "part.nrrd"
    path.write_bytes(content)
    return values, sitk.ReadImage(str(path))


def test_over_http(running: Running, tmp_path: Path) -> None:
    values, whole = ask(running, tmp_path, foreground=[[1, 2, 3]])
    assert (values["whole"], values["changed_box"]) == (True, [[0, 0, 0], [side - 1 for side in SHAPE]])
    first = values["mask_number"]
    assert whole.GetSize() == SHAPE
    two = [[1, 2, 3], [5, 4, 8]]
    values, part = ask(running, tmp_path, foreground=two, have=first)
    assert (values["whole"], values["changed_box"]) == (False, [[5, 4, 8], [5, 4, 8]])
    assert part.GetSize() == (1, 1, 1)
    assert part[0, 0, 0] == 1
    assert np.allclose(part.GetOrigin(), whole.TransformIndexToPhysicalPoint((5, 4, 8)))
    values, _ = ask(running, tmp_path, foreground=two)
    assert (values["whole"], values["changed_box"]) == (False, None)
    values, _ = ask(running, tmp_path, foreground=two, have=first)
    assert values["whole"]
    values, _ = ask(running, tmp_path, foreground=two, label="spleen")
    assert values["whole"]
    running.infer("medvl_interactive", client_id="program", label="liver", foreground=two)  # a whole mask in between
    assert ask(running, tmp_path, foreground=two)[0]["whole"]
    assert ask(running, tmp_path, foreground=two, reset_state=True)[0]["whole"]
    refused = running.infer("medvl_interactive", changed_box=True, have="x", foreground=two)
    assert (refused.status_code, "mask_number" in refused.text) == (400, True)


def test_clients_that_share_a_session_or_do_not_ask_get_whole_masks(running: Running) -> None:
    for asked in (running.ohif, running.slicer):
        asked("medvl_interactive", foreground=[[1, 2, 3]])
        reply = asked("medvl_interactive", foreground=[[1, 2, 3]])
        assert b"changed_box" not in reply.content
    for _ in range(2):
        values, _, _ = multipart(running.infer("medvl_interactive", changed_box=True, foreground=[[1, 2, 3]]))
        assert "changed_box" not in values
