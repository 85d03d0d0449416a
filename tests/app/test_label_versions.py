"""Every submitted label is a version: listed, fetched, reviewed, restored, compared, merged, and never lost."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from app.conftest import AFFINE, SHAPE, Running
from lib.label_names import stored_names

LIVER = [{"name": "liver", "idx": 1}]
BOTH = [{"name": "liver", "idx": 1}, {"name": "spleen", "idx": 2}]


def blocks(**spans: tuple[int, int]) -> np.ndarray:
    """Mask values named v1, v2, ... on spans of slices."""
    mask = np.zeros(SHAPE, np.uint8)
    for name, (first, end) in spans.items():
        mask[2:8, 3:7, first:end] = int(name[1:])
    return mask


def write(path: Path, mask: np.ndarray) -> Path:
    if path.name.endswith(".bin"):
        path.write_bytes(mask.tobytes(order="F"))
    elif path.name.endswith(".nrrd"):
        from medvl_sam2.types import Geometry
        from medvl_sam2.volume_io import write_mask

        write_mask(path, mask, Geometry(SHAPE, AFFINE))
    else:
        nib.save(nib.Nifti1Image(mask, AFFINE), path)
    return path


def settle(placed: Path) -> None:
    """As if it had been written a minute ago."""
    os.utime(placed, (time.time() - 60,) * 2)


def post(running: Running, file: Path, image: str = "case_a", **params: Any) -> Any:
    with open(file, "rb") as stream:
        files = {"label": (file.name, stream)}
        data = {"params": json.dumps(params)}
        return running.client.post("/medvl/labels", params={"image": image}, data=data, files=files)


def listed(running: Running, image: str = "case_a") -> dict[str, Any]:
    response = running.client.get("/medvl/labels", params={"image": image})
    assert response.status_code == 200, response.text
    return response.json()


def index(running: Running) -> dict[str, Any]:
    return json.loads((running.studies / "datastore_v2.json").read_text())["objects"]


def final(running: Running, image: str = "case_a") -> np.ndarray:
    return np.asarray(nib.load(running.studies / "labels" / "final" / f"{image}.nii.gz").dataobj)


def test_every_submit_is_a_version_and_final_is_the_newest(running: Running, tmp_path: Path) -> None:
    one, two = blocks(v1=(2, 9)), blocks(v1=(2, 10), v2=(12, 15))
    first = write(tmp_path / "one.nii.gz", one)
    assert running.submit("case_a", first, label_info=LIVER, client_id="user-xyz").status_code == 200
    reply = post(
        running,
        write(tmp_path / "two.bin", two),
        author="ann",
        note="spleen added",
        source="ohif",
        model_version="7",
        label_info=BOTH,
        prompts=[{"object": "spleen", "box": [[2, 3, 12], [7, 6, 14]]}],
    )
    assert reply.status_code == 200, reply.text
    state = listed(running)
    assert (state["image"], state["final"]) == ("case_a", 2)
    old, new = state["versions"]
    assert reply.json() == new
    assert (old["version"], old["tag"], old["author"], old["source"]) == (1, "version_1", "user-xyz", "slicer")
    assert old["checksum"] == hashlib.sha256(first.read_bytes()).hexdigest()
    assert (old["model_version"], old["client_id"]) == ("shipped", "user-xyz")
    assert old["structures"] == [{"name": "liver", "value": 1, "voxels": int(one.sum())}]
    assert (new["author"], new["note"], new["source"], new["model_version"]) == ("ann", "spleen added", "ohif", "7")
    assert new["prompts"] == [{"object": "spleen", "box": [[2, 3, 12], [7, 6, 14]]}]
    assert [s["name"] for s in new["structures"]] == ["liver", "spleen"]
    assert (final(running) == two).all()
    stored = running.studies / "labels" / "version_2" / "case_a.nii.gz"
    assert new["checksum"] == hashlib.sha256(stored.read_bytes()).hexdigest()
    assert listed(running, "case_b") == {"image": "case_b", "final": None, "versions": []}


@pytest.mark.parametrize("name", ["label.nii.gz", "label.nii", "label.nrrd", "label.bin"])
@pytest.mark.parametrize("wanted", ["nrrd", "nii.gz"])
def test_a_mask_comes_back_voxel_by_voxel(running: Running, tmp_path: Path, name: str, wanted: str) -> None:
    from medvl_sam2.volume_io import read_mask

    mask = np.random.default_rng(3).integers(0, 4, SHAPE).astype(np.uint8)
    assert post(running, write(tmp_path / name, mask)).status_code == 200
    response = running.client.get("/medvl/labels/file", params={"image": "case_a", "version": 1, "format": wanted})
    assert response.status_code == 200, response.text
    received = tmp_path / f"received.{wanted}"
    received.write_bytes(response.content)
    labels, grid = read_mask(received)
    assert (labels == mask).all()
    np.testing.assert_allclose(grid.affine, AFFINE, atol=1e-4)


def test_names_follow_positions_from_slicer_and_values_from_others(running: Running, tmp_path: Path) -> None:
    """Slicer left out a segment before these, so its idx runs ahead; the panel's numbers are the mask's."""
    file = write(tmp_path / "label.nii.gz", blocks(v1=(0, 5), v2=(6, 9)))
    running.submit("case_a", file, label_info=[{"name": "liver", "idx": 2}, {"name": "spleen", "idx": 3}])
    swapped = [{"name": "spleen", "idx": 2}, {"name": "liver", "idx": 1}]
    assert post(running, file, label_info=swapped).status_code == 200
    for version in listed(running)["versions"]:
        assert [(s["value"], s["name"]) for s in version["structures"]] == [(1, "liver"), (2, "spleen")]
    from lib.trainers.finetune import datastore_samples

    (sample,) = datastore_samples(running.app.datastore())
    assert sample.names == {1: "liver", 2: "spleen"}
    assert post(running, file, label_info=[{"name": "liver"}]).status_code == 400


def test_prompts_of_the_clients_session_are_kept(running: Running, tmp_path: Path) -> None:
    response = running.slicer("medvl_interactive", label="liver", foreground=[[3, 4, 5]], background=[[1, 1, 1]])
    assert response.status_code == 200, response.text
    file = write(tmp_path / "label.nii.gz", blocks(v1=(0, 5)))
    running.submit("case_a", file, label_info=LIVER, client_id="user-xyz")
    running.submit("case_a", file, label_info=LIVER, client_id="somebody else")
    mine, theirs = listed(running)["versions"]
    (prompt,) = mine["prompts"]
    assert (prompt["object"], prompt["foreground"], prompt["background"]) == ("liver", [[3, 4, 5]], [[1, 1, 1]])
    assert theirs["prompts"] == []
    assert "prompts" not in index(running)["case_a"]["labels"]["final"]["info"]


def test_the_reviewer_module_sees_and_changes_versions(running: Running, tmp_path: Path) -> None:
    """The requests MONAI Label's Reviewer module for Slicer sends, with what it reads and writes."""
    file = write(tmp_path / "case_a.nrrd", blocks(v1=(0, 5)))
    running.submit("case_a", file, label_info=LIVER, client_id="user-xyz")
    running.infer("medvl_semantic", classes="liver", save_label=True, label_tag="original")
    meta = {"status": "flagged", "level": "hard", "approvedBy": "rev", "comment": "check", "editTime": 1_700_000_000}
    names = [{"name": "other", "idx": 1}]
    sent = running.submit("case_a", file, tag="version_2", label_info=names, segmentationMeta=meta)
    assert sent.status_code == 200, sent.text
    labels = running.client.get("/datastore/", params={"output": "all"}).json()["objects"]["case_a"]["labels"]
    assert list(labels) == ["final", "original", "version_1", "version_2"]  # the module counts on from the last
    assert labels["version_2"]["info"]["segmentationMeta"] == meta
    assert set(labels["version_1"]["info"]["segmentationMeta"]) == set(meta)
    verdict = {"label_info": names, "segmentationMeta": {**meta, "status": "approved", "comment": "good"}}
    query = {"label": "case_a", "tag": "version_1"}
    response = running.client.put("/datastore/updatelabelinfo", params=query, data={"params": json.dumps(verdict)})
    assert response.status_code == 200, response.text
    first, second = listed(running)["versions"]
    assert (first["status"], first["note"], first["approved_by"]) == ("approved", "good", "rev")
    assert (second["status"], second["source"]) == ("flagged", "reviewer")
    info = index(running)["case_a"]["labels"]["version_1"]["info"]
    assert info["label_info"] == LIVER  # the module sends the names of final with every verdict
    # Sent again under a tag that is taken: neither is lost.
    assert running.submit("case_a", file, tag="version_2", label_info=names).status_code == 200
    assert [v["version"] for v in listed(running)["versions"]] == [1, 2, 3]
    assert running.client.get("/datastore/label", params={"label": "case_a", "tag": "version_1"}).status_code == 200


def test_verdict_on_final_is_one_on_its_version(running: Running, tmp_path: Path) -> None:
    running.submit("case_a", write(tmp_path / "label.nii.gz", blocks(v1=(0, 5))), label_info=LIVER)
    query = {"label": "case_a", "tag": "final"}
    sent = {"info": json.dumps({"segmentationMeta": {"status": "approved"}, "label_info": BOTH})}
    assert running.client.put("/datastore/label/info", params=query, data=sent).status_code == 200
    assert listed(running)["versions"][0]["status"] == "approved"
    labels = index(running)["case_a"]["labels"]
    assert labels["final"]["info"] == labels["version_1"]["info"]
    assert labels["final"]["info"]["label_info"] == BOTH


def test_restore_makes_a_new_version(running: Running, tmp_path: Path) -> None:
    one, two = blocks(v1=(2, 9)), blocks(v1=(3, 12))
    post(running, write(tmp_path / "one.nii.gz", one), author="ann", label_info=LIVER)
    post(running, write(tmp_path / "two.nii.gz", two), author="bob", label_info=LIVER)
    body = {"author": "cleo", "note": "the first was right"}
    response = running.client.post("/medvl/labels/restore", params={"image": "case_a", "version": 1}, json=body)
    assert response.status_code == 200, response.text
    state = listed(running)
    assert state["final"] == 3
    assert state["versions"][2] == response.json()
    assert (response.json()["restored_from"], response.json()["author"]) == (1, "cleo")
    assert response.json()["checksum"] == state["versions"][0]["checksum"]
    assert response.json()["structures"] == state["versions"][0]["structures"]
    assert (final(running) == one).all()


def test_compare_by_name(running: Running, tmp_path: Path) -> None:
    from medvl_sam2.evaluation.metrics import dice
    from medvl_sam2.evaluation.surface import surface_dice

    one, two = blocks(v1=(2, 9), v2=(12, 15)), blocks(v2=(3, 9), v3=(16, 18))
    post(running, write(tmp_path / "one.nii.gz", one), label_info=BOTH)
    names = [{"name": "liver", "idx": 2}, {"name": "left kidney", "idx": 3}]
    post(running, write(tmp_path / "two.nii.gz", two), label_info=names)
    reply = running.client.get("/medvl/labels/compare", params={"image": "case_a", "a": 1, "b": 2})
    assert reply.status_code == 200, reply.text
    found = {item["name"]: item for item in reply.json()["structures"]}
    assert list(found) == ["left kidney", "liver", "spleen"]
    assert found["liver"]["dice"] == pytest.approx(dice(one == 1, two == 2))
    assert found["liver"]["nsd"] == pytest.approx(surface_dice(one == 1, two == 2, (2.0, 1.5, 3.0), 2.0))
    assert 0 < found["liver"]["nsd"] < 1
    assert (found["liver"]["voxels_a"], found["liver"]["voxels_b"]) == (int((one == 1).sum()), int((two == 2).sum()))
    assert [found[name]["dice"] for name in ("spleen", "left kidney")] == [0, 0]


def annotated(running: Running, tmp_path: Path) -> list[np.ndarray]:
    """Labels by ann, bob and cleo; ann's first is no longer hers."""
    masks = [blocks(v1=(0, 2)), blocks(v1=(2, 9)), blocks(v1=(3, 10), v2=(12, 14)), blocks(v1=(3, 12), v2=(12, 15))]
    for author, mask in zip(("ann", "ann", "bob", "cleo"), masks, strict=True):
        response = post(running, write(tmp_path / "label.nii.gz", mask), author=author, label_info=BOTH)
        assert response.status_code == 200, response.text
    return masks[1:]


def test_agreement_of_annotators(running: Running, tmp_path: Path) -> None:
    from medvl_sam2.evaluation.metrics import dice

    ann, bob, cleo = annotated(running, tmp_path)
    reply = running.client.get("/medvl/labels/agreement", params={"image": "case_a"}).json()
    assert reply["latest"] == {"ann": 2, "bob": 3, "cleo": 4}
    pairs = {tuple(pair["authors"]): pair for pair in reply["pairs"]}
    assert list(pairs) == [("ann", "bob"), ("ann", "cleo"), ("bob", "cleo")]
    for (one, other), pair in zip([(ann, bob), (ann, cleo), (bob, cleo)], pairs.values(), strict=True):
        assert pair["structures"][0]["dice"] == pytest.approx(dice(one == 1, other == 1))


def test_consensus_of_annotators(running: Running, tmp_path: Path) -> None:
    masks = annotated(running, tmp_path)
    votes = {value: sum((mask == value).astype(int) for mask in masks) for value in (1, 2)}
    for method in ("majority", "staple"):
        body = {"method": method, "author": "curator"}
        reply = running.client.post("/medvl/labels/consensus", params={"image": "case_a"}, json=body)
        assert reply.status_code == 200, reply.text
        assert (reply.json()["made_from"], reply.json()["author"]) == ([2, 3, 4], "curator")
        assert reply.json()["source"] == f"consensus-{method}"
        assert [(s["name"], s["value"]) for s in reply.json()["structures"]] == [("liver", 1), ("spleen", 2)]
        if method == "majority":
            for value in (1, 2):
                assert ((final(running) == value) == (votes[value] >= 2)).all()
        else:
            agreed = np.all([mask == masks[0] for mask in masks], axis=0)
            assert (final(running) == masks[0])[agreed].all()
    latest = running.client.get("/medvl/labels/agreement", params={"image": "case_a"}).json()["latest"]
    assert latest == {"ann": 2, "bob": 3, "cleo": 4}
    body = {"versions": [2, 3, 4], "authors": ["ann"]}
    for wrong, status in (
        ({"versions": [2]}, 400),
        ({"versions": [2, 9]}, 404),
        ({"authors": ["nn"]}, 404),
        (body, 400),
    ):
        reply = running.client.post("/medvl/labels/consensus", params={"image": "case_a"}, json=wrong)
        assert reply.status_code == status, reply.text


def test_consensus_is_looked_at_before_it_is_made(running: Running, tmp_path: Path) -> None:
    import nrrd

    annotated(running, tmp_path)
    count = len(running.client.get("/medvl/labels", params={"image": "case_a"}).json()["versions"])
    shown = running.client.get("/medvl/labels/consensus", params={"image": "case_a"})
    assert shown.status_code == 200, shown.text
    said = json.loads(shown.headers["MedVL-Consensus"])
    named = [{"name": "liver", "value": 1}, {"name": "spleen", "value": 2}]
    assert said == {"versions": [2, 3, 4], "structures": named, "passed_over": []}
    assert len(running.client.get("/medvl/labels", params={"image": "case_a"}).json()["versions"]) == count
    running.client.post("/medvl/labels/consensus", params={"image": "case_a"}, json={"versions": said["versions"]})
    (tmp_path / "shown.nrrd").write_bytes(shown.content)
    np.testing.assert_array_equal(nrrd.read(str(tmp_path / "shown.nrrd"), index_order="F")[0], final(running))


def test_a_consensus_that_a_client_saves_is_nobodys_vote(running: Running, tmp_path: Path) -> None:
    annotated(running, tmp_path)
    file = write(tmp_path / "label.nii.gz", blocks(v1=(0, 5)))
    before = running.client.get("/medvl/labels/agreement", params={"image": "case_a"}).json()["latest"]
    reply = post(running, file, author="ann", source="consensus-majority", made_from=[2, 4, 2], label_info=LIVER)
    assert reply.status_code == 200, reply.text
    assert (reply.json()["made_from"], reply.json()["source"]) == ([2, 4], "consensus-majority")
    assert running.client.get("/medvl/labels/agreement", params={"image": "case_a"}).json()["latest"] == before
    fifth = {"image": "case_a", "version": 5}
    restored = running.client.post("/medvl/labels/restore", params=fifth, json={"author": "ann"})
    assert (restored.json()["made_from"], restored.json()["restored_from"]) == ([2, 4], 5)
    for wrong in (3, "2", ["2"], [0], [True], [2.0]):
        assert post(running, file, made_from=wrong).status_code == 400, wrong
        assert running.submit("case_a", file, made_from=wrong).status_code == 400, wrong
    assert post(running, file, author="ann", made_from=[], label_info=LIVER).json()["made_from"] == []
    latest = running.client.get("/medvl/labels/agreement", params={"image": "case_a"}).json()["latest"]
    assert latest == before | {"ann": 7}


def test_what_is_unknown_is_a_404(running: Running, tmp_path: Path) -> None:
    post(running, write(tmp_path / "label.nii.gz", blocks(v1=(0, 5))))
    client = running.client
    for image, status in (("nobody", 404), ("../case_a", 400)):
        assert client.get("/medvl/labels", params={"image": image}).status_code == status
        assert post(running, tmp_path / "label.nii.gz", image=image).status_code == status
    known = {"image": "case_a"}
    assert client.get("/medvl/labels/file", params=known | {"version": 2}).status_code == 404
    assert client.get("/medvl/labels/compare", params=known | {"a": 1, "b": 7}).status_code == 404
    assert client.post("/medvl/labels/restore", params=known | {"version": 3}, json={}).status_code == 404
    assert client.delete("/datastore/label", params={"id": "case_a", "tag": "version_9"}).status_code == 404
    other_grid = tmp_path / "other.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((3, 4, 5), np.uint8), AFFINE), other_grid)
    assert post(running, other_grid).status_code == 422


def test_only_final_counts_elsewhere(running: Running, tmp_path: Path) -> None:
    """Counts, next sample, ZIP and training are as they were before there were versions."""
    for end in (5, 6):
        post(running, write(tmp_path / "label.nii.gz", blocks(v1=(0, end))), label_info=LIVER)
    datastore = running.client.get("/info/").json()["datastore"]
    assert datastore == {"total": 2, "completed": 1, "label_tags": {"final": 1}}
    for strategy in ("first", "random", "uncertainty"):
        sample = running.client.post(f"/activelearning/{strategy}", json={"client_id": "x"}).json()
        assert sample["id"] == "case_b"
    store = running.app.datastore()
    assert store.get_labeled_images() == ["case_a"]
    (pair,) = store.datalist()
    assert pair["label"] == str(running.studies / "labels" / "final" / "case_a.nii.gz")
    names = zipfile.ZipFile(BytesIO(running.client.get("/datastore/dataset").content)).namelist()
    assert sorted(names) == ["image/case_a.nii.gz", "label/case_a.nii.gz", "metadata.json"]


def test_labels_of_an_earlier_release_become_versions(start: Any, tmp_path: Path) -> None:
    """A label ``final`` with two copies in ``.history``; nothing of it is lost, nothing is guessed."""
    running = start()
    studies = running.studies
    history = studies / ".history" / "final" / "case_a"
    history.mkdir(parents=True)
    masks = [blocks(v1=(0, 3)), blocks(v1=(0, 4)), blocks(v1=(0, 5))]
    write(history / "1700000000000000000.nii.gz", masks[0])
    write(history / "1700000001000000000.nii.gz", masks[1])
    write(studies / "labels" / "final" / "case_a.nii.gz", masks[2])
    (studies / "labels" / "final" / "case_b.nii.gz").write_bytes(b"accepted by another server")
    for image in ("case_a", "case_b"):
        settle(studies / "labels" / "final" / f"{image}.nii.gz")
    running.app.datastore().refresh()
    running.app.datastore().update_label_info("case_a", "final", {"label_info": LIVER, "client_id": "user-xyz"})
    state = listed(running)
    assert state["final"] == 3
    assert [v["source"] for v in state["versions"]] == ["history", "history", "found"]
    assert state["versions"][0]["time"].startswith("2023-11-14T22:13:20")
    assert [v["structures"][0]["name"] for v in state["versions"]] == ["label 1", "label 1", "liver"]
    assert state["versions"][2]["author"] == "user-xyz"
    for number, mask in enumerate(masks, start=1):
        stored = np.asarray(nib.load(studies / "labels" / f"version_{number}" / "case_a.nii.gz").dataobj)
        assert (stored == mask).all()
    assert list(history.iterdir()) == []
    assert listed(running)["versions"] == state["versions"]
    assert [v["structures"] for v in listed(running, "case_b")["versions"]] == [[]]
    for number in (1, 3):
        running.client.post("/medvl/labels/restore", params={"image": "case_a", "version": number}, json={})
    after = listed(running)["versions"]
    assert [v["structures"] for v in after[3:]] == [after[0]["structures"], after[2]["structures"]]
    names = [stored_names(running.app.datastore().get_label_info("case_a", v["tag"]), [1]) for v in after]
    assert names[3:] == [names[0], names[2]], "restoring changes no name"


def test_index_is_made_anew(start: Any, tmp_path: Path) -> None:
    """Missing or damaged: what is known of every label comes back from the records beside the masks."""
    running = start()
    post(running, write(tmp_path / "one.nii.gz", blocks(v1=(0, 5))), author="ann", label_info=LIVER)
    post(running, write(tmp_path / "two.nii.gz", blocks(v1=(0, 6))), author="bob", label_info=LIVER)
    before, labels = listed(running), index(running)["case_a"]["labels"]
    file = running.studies / "datastore_v2.json"
    for damage in (file.unlink, lambda: file.write_text(file.read_text()[:200]), lambda: file.write_text("{}")):
        damage()
        running = start()
        assert listed(running) == before
        assert index(running)["case_a"]["labels"] == labels
    assert len(list(running.studies.glob("datastore_v2.json.damaged-*"))) == 2


def test_a_save_cut_off_before_final_is_finished(start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lib.datastore import GuardedStore

    running = start()
    one, two = blocks(v1=(0, 5)), blocks(v1=(0, 6))
    post(running, write(tmp_path / "one.nii.gz", one), label_info=LIVER)
    with monkeypatch.context() as patch:
        patch.setattr(GuardedStore, "_set_final", lambda *_: (_ for _ in ()).throw(OSError("disk gone")))
        assert post(running, write(tmp_path / "two.nii.gz", two), label_info=LIVER).status_code == 500
    running = start()
    assert listed(running)["final"] == 2
    assert (final(running) == two).all()


def test_leftovers_are_cleaned_and_what_is_being_written_is_not(start: Any, tmp_path: Path) -> None:
    from lib.version_files import stage

    running = start()
    file = write(tmp_path / "label.nii.gz", blocks(v1=(0, 5)))
    post(running, file, label_info=LIVER)
    labels = running.studies / "labels"
    orphan = labels / "version_1" / "case_b.json"
    orphan.write_text("{}")
    torn = labels / ".abandoned.part"
    torn.write_bytes(b"half a ma")
    os.utime(torn, (1, 1))
    with stage(file, labels) as staged:
        os.utime(staged, (1, 1))
        running.app.datastore().refresh()
        assert staged.exists()
    assert not torn.exists()
    assert not orphan.exists()
    assert [v["version"] for v in listed(running)["versions"]] == [1]


def test_concurrent_submits_all_survive(running: Running, tmp_path: Path) -> None:
    """Eight threads of this process and, between them, another process's store on the same folder."""
    from monailabel.interfaces.datastore import DefaultLabelTag

    from lib.datastore import open_local_store

    other = open_local_store(str(running.studies), running.app.runtime.geometry)
    files = [write(tmp_path / f"label{n}.nii.gz", blocks(v1=(0, n + 1))) for n in range(16)]

    def save(n: int) -> int:
        info: dict[str, Any] = {"author": f"a{n}", "label_info": LIVER}
        store = other if n % 2 else running.app.datastore()
        store.save_label("case_a", str(files[n]), DefaultLabelTag.FINAL, info)
        return info["version"]

    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(save, range(16)))
    assert sorted(numbers) == list(range(1, 17))
    running.app.datastore().refresh()
    versions = listed(running)["versions"]
    assert {v["author"]: v["version"] for v in versions} == {f"a{n}": number for n, number in enumerate(numbers)}
    assert all(v["structures"][0]["voxels"] == 24 * (int(v["author"][1:]) + 1) for v in versions)
    newest = next(n for n, number in enumerate(numbers) if number == 16)
    assert (final(running) == blocks(v1=(0, newest + 1))).all()
    assert len(index(running)["case_a"]["labels"]) == 17
