"""Versions whose mask cannot be read, as other programs leave them: the others count, and no reply tells a path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.conftest import Running
from app.test_label_versions import LIVER, blocks, listed, post, settle, write


@pytest.fixture(params=[".nii.gz", ".nrrd"])
def torn(running: Running, tmp_path: Path, request: pytest.FixtureRequest) -> Running:
    """Labels by ann, ann, bob and nobody; ann's second is half a mask, and nobody's is another program's."""
    name = f"one{request.param}"
    for author, end in (("ann", 9), ("ann", 10), ("bob", 11)):
        reply = post(running, write(tmp_path / name, blocks(v1=(2, end))), author=author, label_info=LIVER)
        assert reply.status_code == 200, reply.text
    mask = running.studies / "labels" / "version_2" / f"case_a{request.param}"
    mask.write_bytes(mask.read_bytes()[:-20])
    placed = running.studies / "labels" / "version_4" / f"case_a{request.param}"
    placed.parent.mkdir()
    placed.write_bytes(mask.read_bytes()[:50])
    settle(placed)
    assert [(v["author"], len(v["structures"])) for v in listed(running)["versions"]][2:] == [("bob", 1), ("", 0)]
    return running


def ask(running: Running, method: str, what: str, **more: Any) -> Any:
    reply = running.client.request(
        method, f"/medvl/labels{what}", params={"image": "case_a", **more.pop("params", {})}, **more
    )
    assert str(running.studies) not in reply.text
    return reply


def test_the_others_are_compared_and_agreed_on(torn: Running) -> None:
    reply = ask(torn, "GET", "/agreement")
    assert reply.status_code == 200, reply.text
    assert reply.json()["latest"] == {"ann": 1, "bob": 3}
    assert [pair["versions"] for pair in reply.json()["pairs"]] == [[1, 3]]
    assert reply.json()["passed_over"] == [2]
    reply = ask(torn, "GET", "/consensus")
    assert reply.status_code == 200, reply.content
    said = json.loads(reply.headers["MedVL-Consensus"])
    assert (said["versions"], said["passed_over"]) == ([1, 3], [2])
    reply = ask(torn, "POST", "/consensus", json={"authors": ["bob", "ann", "bob"]})
    assert (reply.status_code, reply.json()["made_from"], reply.json()["passed_over"]) == (200, [3, 1], [2])
    reply = ask(torn, "POST", "/consensus", json={"versions": [1, 3]})
    assert reply.json()["passed_over"] == []


@pytest.mark.parametrize(
    ("method", "what", "more"),
    [
        ("GET", "/compare", {"params": {"a": 1, "b": 2}}),
        ("POST", "/consensus", {"json": {"versions": [1, 2]}}),
        ("POST", "/consensus", {"json": {"authors": ["bob", "unknown"]}}),
        ("POST", "/restore", {"params": {"version": 2}, "json": {}}),
    ],
)
def test_who_asks_for_one_learns_that_it_cannot_be_read(torn: Running, method: str, what: str, more: Any) -> None:
    reply = ask(torn, method, what, **more)
    assert reply.status_code == 415, reply.text
    assert any(named in reply.json()["detail"] for named in ("version 2", "'unknown'", "the label"))


def test_a_mask_or_an_image_that_cannot_be_read_has_no_path(torn: Running, tmp_path: Path) -> None:
    stored = "nrrd" if list((torn.studies / "labels" / "version_2").glob("*.nrrd")) else "nii.gz"
    other = {"nrrd": "nii.gz", "nii.gz": "nrrd"}[stored]
    reply = ask(torn, "GET", "/file", params={"version": 2, "format": other})
    assert (reply.status_code, "version 2 of 'case_a'" in reply.json()["detail"]) == (415, True), reply.text
    (torn.studies / "case_a.nii.gz").write_bytes(b"no image any more")
    for reply in (
        ask(torn, "GET", "/file", params={"version": 1, "format": other}),
        ask(torn, "GET", "/consensus"),
        post(torn, write(tmp_path / "label.nii.gz", blocks(v1=(2, 9)))),
    ):
        assert (reply.status_code, "image 'case_a'" in reply.json()["detail"]) == (415, True), reply.text
        assert str(torn.studies) not in reply.text


def test_an_empty_label_is_a_vote(running: Running, tmp_path: Path) -> None:
    """Its author says that there is nothing."""
    for author, mask in (("ann", blocks(v1=(2, 9))), ("bob", blocks())):
        post(running, write(tmp_path / "label.nii.gz", mask), author=author, label_info=LIVER)
    assert ask(running, "GET", "/agreement").json()["latest"] == {"ann": 1, "bob": 2}
