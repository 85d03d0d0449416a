"""Whose versions vote in agreement and consensus: annotators', never outvoted by masks that nobody signed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app.conftest import Running
from app.test_label_versions import LIVER, blocks, final, listed, post, settle, write


def place(running: Running, ends: list[int]) -> None:
    """Another program writes one mask after another over the label."""
    for end in ends:
        settle(write(running.studies / "labels" / "final" / "case_a.nii.gz", blocks(v1=(2, end))))
        listed(running)


def agreement(running: Running) -> dict[str, int]:
    reply = running.client.get("/medvl/labels/agreement", params={"image": "case_a"})
    assert reply.status_code == 200, reply.text
    latest: dict[str, int] = reply.json()["latest"]
    return latest


def consensus(running: Running, **body: Any) -> Any:
    return running.client.post("/medvl/labels/consensus", params={"image": "case_a"}, json=body)


def test_masks_of_another_program_outvote_nobody(running: Running, tmp_path: Path) -> None:
    for author in ("ann", "bob"):
        post(running, write(tmp_path / "one.nii.gz", blocks(v1=(2, 9))), author=author, label_info=LIVER)
    place(running, [3, 4, 5])
    assert [v["author"] for v in listed(running)["versions"]] == ["ann", "bob", "", "", ""]
    assert agreement(running) == {"ann": 1, "bob": 2}
    assert consensus(running).json()["made_from"] == [1, 2]
    assert (final(running) == blocks(v1=(2, 9))).all()


def test_what_nobody_signed_is_one_voter_where_it_is_asked_for(running: Running, tmp_path: Path) -> None:
    post(running, write(tmp_path / "one.nii.gz", blocks(v1=(2, 9))), author="ann", label_info=LIVER)
    place(running, [3, 4])
    assert consensus(running).status_code == 400, "of ann's alone"
    assert consensus(running, authors=["ann", "unknown"]).json()["made_from"] == [1, 3]


def test_where_nobody_signed_anything_the_newest_counts(running: Running, tmp_path: Path) -> None:
    """As labels of an earlier release, or labels sent without an author."""
    post(running, write(tmp_path / "one.nii.gz", blocks(v1=(2, 9))), label_info=LIVER)
    place(running, [3, 4])
    assert agreement(running) == {"unknown": 3}
    reply = consensus(running)
    assert (reply.status_code, "at least two" in reply.json()["detail"]) == (400, True)


def test_an_author_called_unknown_votes_with_his_own(running: Running, tmp_path: Path) -> None:
    for author in ("ann", "unknown"):
        post(running, write(tmp_path / "one.nii.gz", blocks(v1=(2, 9))), author=author, label_info=LIVER)
    place(running, [3])
    assert agreement(running) == {"ann": 1, "unknown": 2}
    assert consensus(running, authors=["unknown", "ann"]).json()["made_from"] == [2, 1]


def test_an_image_without_versions_has_no_voters(running: Running) -> None:
    assert agreement(running) == {}
    reply = consensus(running, authors=["unknown"])
    assert (reply.status_code, reply.json()["detail"]) == (404, "no version by 'unknown'; there are some by nobody")
