"""The loop against a server that exists only in memory; the requests are the ones Slicer sends."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from finetune_fakes import ORGANS, make_samples, readable
from medvl_sam2.errors import DataError
from medvl_sam2.types import Geometry
from medvl_sam2.vocabulary import CLASSES
from medvl_sam2.volume_io import read_mask, read_volume, write_mask

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("demo_loop_script", SCRIPTS / "demo_loop.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


class MemoryServer:
    """Segments ``skill`` of a structure inside the box; a training on right labels raises the skill."""

    def __init__(self, folder: Path, fails: bool = False) -> None:
        self.folder, self.fails = folder, fails
        self.images: dict[str, Path] = {}
        self.labels: dict[str, tuple[np.ndarray, list[dict[str, Any]]]] = {}
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.patients: dict[str, str] = {}
        self.skill = 0.5
        self.polls = 0
        self.stats: dict[str, Any] = {}

    def upload_image(self, path: Path, image_id: str, params: dict[str, Any]) -> None:
        self.images[image_id] = Path(path)
        self.patients[image_id] = params["PatientID"]

    def infer(self, model: str, image_id: str, params: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        self.requests.append((image_id, params))
        volume = read_volume(self.images[image_id])
        roi = np.array(params["roi"]).reshape(3, 2)
        inside = tuple(slice(low, high + 1) for low, high in roi)
        values = readable(volume.array)
        value = int(np.bincount(values[inside][values[inside] > 0]).argmax())
        where = np.argwhere(values == value)
        mask = np.zeros(values.shape, dtype=np.uint8)
        mask[tuple(where[: round(len(where) * self.skill)].T)] = 1
        path = self.folder / "answer.nrrd"
        write_mask(path, mask, volume.geometry)
        return str(path), {}

    def save_label(self, image_id: str, path: Path, tag: str, params: dict[str, Any]) -> None:
        assert tag == "final"
        self.labels[image_id] = (read_mask(path)[0], params["label_info"])

    def train_start(self, model: str, params: dict[str, Any]) -> None:
        assert model == "medvl_sam2"
        self.polls = 0

    def train_status(self) -> dict[str, Any]:
        self.polls += 1
        if self.polls < 3:
            return {"status": "RUNNING"}
        if self.fails:
            return {"status": "ERROR", "details": ["out of luck"]}
        right = all(
            CLASSES[int(np.bincount(readable(read_volume(self.images[i]).array)[mask == n]).argmax()) - 1] == e["name"]
            for i, (mask, info) in self.labels.items()
            for n, e in enumerate(info, start=1)
        )
        self.skill = 0.9 if right else 0.5
        self.stats = {"epoch": 2, "total_epochs": 2, "published": right, "reason": "measured"}
        return {"status": "DONE"}

    def info(self) -> dict[str, Any]:
        return {"train_stats": {"medvl_sam2": self.stats}}


def studies(demo: ModuleType, tmp_path: Path) -> tuple[list[Any], list[Any]]:
    samples = make_samples(tmp_path, 3)
    (tmp_path / "labels").mkdir()
    for sample in samples:
        sample.label.rename(tmp_path / "labels" / sample.image.name)
    (tmp_path / "labels" / "labels.json").write_text(json.dumps(dict(enumerate(CLASSES, start=1))))
    return demo.studies_of_folder(tmp_path, [])


def test_the_loop_prompts_corrects_trains_and_prompts_again(demo: ModuleType, tmp_path: Path) -> None:
    annotated, held_out = studies(demo, tmp_path)
    assert [study.id for study in held_out] == ["case2"]
    server = MemoryServer(tmp_path)
    loop = demo.Loop(server, clicks=2, objects=2, least=50, pictures=tmp_path / "png")
    loop.upload([*annotated, *held_out], tmp_path)
    before = loop.prompt(held_out, "before")
    assert loop.correct(annotated, tmp_path, None) == 2 * len(ORGANS)
    training = loop.train({"minutes": 1}, limit=60, pause=0)
    rows = demo.rows_of(held_out, before, loop.prompt(held_out, "after"))
    assert training.published
    assert set(server.labels) == {"case0", "case1"}, "the server never sees a label of a held-out volume"
    assert len(set(server.patients.values())) == 3
    assert len(rows) == 2
    assert all(len(row.before) == len(row.after) == 3 and row.gain > 0.1 for row in rows)
    assert demo.outcome(rows, training, None)[0]
    text = demo.table(rows)
    assert all(row.structure in text for row in rows)
    assert sorted(path.name for path in (tmp_path / "png").iterdir()) == sorted(
        f"case2_{row.structure}_{stage}.png" for row in rows for stage in ("before", "after")
    )


def test_requests_carry_box_and_cumulative_clicks_in_stored_voxels(demo: ModuleType, tmp_path: Path) -> None:
    _, held_out = studies(demo, tmp_path)
    server = MemoryServer(tmp_path)
    loop = demo.Loop(server, clicks=2, objects=1, least=50, pictures=None)
    loop.upload(held_out, tmp_path)
    loop.prompt(held_out, "before")
    (name,) = demo.large(held_out[0], 1, 50)
    where = np.argwhere(held_out[0].masks[name])
    requests = [request for _, request in server.requests]
    assert [len(r["foreground"]) + len(r["background"]) for r in requests] == [0, 1, 2]
    assert [r.get("reset_state", False) for r in requests] == [True, False, False]
    for request in requests:
        assert request["label"] == name
        low, high = np.array(request["roi"]).reshape(3, 2).T
        assert (low >= where.min(axis=0)).all()
        assert (high <= where.max(axis=0)).all()
        assert all(isinstance(edge, int) for edge in request["roi"])
        for point in request["foreground"]:
            assert held_out[0].masks[name][tuple(point)]


@pytest.mark.parametrize("kind", ["displaced", "renamed"])
def test_poisoned_labels_are_wrong_and_judged_by_not_being_published(
    demo: ModuleType, tmp_path: Path, kind: str
) -> None:
    annotated, held_out = studies(demo, tmp_path)
    server = MemoryServer(tmp_path)
    loop = demo.Loop(server, clicks=1, objects=1, least=50, pictures=None)
    loop.upload([*annotated, *held_out], tmp_path)
    before = loop.prompt(held_out, "before")
    loop.correct(annotated, tmp_path, kind)
    training = loop.train({}, limit=60, pause=0)
    rows = demo.rows_of(held_out, before, loop.prompt(held_out, "after"))
    assert not training.published
    assert demo.outcome(rows, training, kind)[0]
    assert not demo.outcome(rows, training, None)[0]
    published = demo.Training(1.0, {"published": True})
    assert not demo.outcome(rows, published, kind)[0]
    assert demo.Training(1.0, {"message": "published: better"}).published
    assert not demo.Training(1.0, {"message": "not published: worse"}).published


def test_a_failed_training_shows_the_end_of_its_log(demo: ModuleType, tmp_path: Path) -> None:
    loop = demo.Loop(MemoryServer(tmp_path, fails=True), clicks=1, objects=1, least=50, pictures=None)
    with pytest.raises(DataError, match="out of luck"):
        loop.train({}, limit=60, pause=0)


def test_a_training_that_takes_too_long_is_stopped(demo: ModuleType, tmp_path: Path) -> None:
    stopped: list[bool] = []

    class Slow(MemoryServer):
        def train_status(self) -> dict[str, Any]:
            return {"status": "RUNNING"}

        def train_stop(self) -> None:
            stopped.append(True)

    with pytest.raises(DataError, match="--train-limit"):
        demo.Loop(Slow(tmp_path), 1, 1, 50, None).train({}, limit=0, pause=0)
    assert stopped == [True]


def test_an_unknown_held_out_id_is_refused(demo: ModuleType, tmp_path: Path) -> None:
    studies(demo, tmp_path)
    with pytest.raises(DataError, match="'case9' is no volume"):
        demo.studies_of_folder(tmp_path, ["case9"])


def test_without_a_server_the_message_says_how_to_get_one(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    studies(demo, tmp_path)
    assert demo.main([str(tmp_path), "--server", "http://127.0.0.1:9", "--out", str(tmp_path / "out")]) == 1
    assert "no server answers at http://127.0.0.1:9; start scripts/quickstart or give" in capsys.readouterr().err


def test_label_values_are_contiguous_and_small_structures_stay_visible(demo: ModuleType) -> None:
    large = np.zeros((8, 8, 8), dtype=bool)
    large[1:7, 1:7, 1:7] = True
    small = np.zeros_like(large)
    small[3:5, 3:5, 3:5] = True
    from medvl_sam2.types import Modality, Volume

    volume = Volume(np.zeros((8, 8, 8), dtype=np.int16), Geometry((8, 8, 8), np.eye(4)), Modality.CT)
    labels, names = demo.label_map(demo.Study("s", "p", volume, {"small": small, "large": large}))
    assert names == ["large", "small"]
    assert (labels[small] == 2).all()
    assert set(np.unique(labels)) == {0, 1, 2}


def test_shared_sets_never_share_a_patient(demo: ModuleType) -> None:
    from medvl_sam2.training.real_cases import TRAINABLE_REAL, UNSEEN_REAL

    patients = {source.name: source.patient for source in (*TRAINABLE_REAL, *UNSEEN_REAL)}
    trainable = {source.name for source in TRAINABLE_REAL}
    for annotated, held_out in demo.SHARED_SETS.values():
        assert set(annotated) <= trainable
        assert not {patients[name] for name in annotated} & {patients[name] for name in held_out}
        assert len({patients[name] for name in annotated}) >= 2, "the server needs a patient of its own to hold out"
