"""A session goes on where it was after the server was stopped or killed: a small model behind the real runtime."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from lib.configs.medvl_sam2 import AppConfig
from lib.request_parsing import Client
from lib.runtime import Held, Runtime
from medvl_sam2.errors import PromptError
from medvl_sam2.predictor.journal import FILE, SPARE_LINES, Journal, JournalHeader, session_name
from medvl_sam2.predictor.timeline import Change, Step, Timeline, prompt_key
from medvl_sam2.strokes import Plane, Stroke, StrokeKind
from medvl_sam2.types import Prompt
from small_model import oblique_volume, small_predictor

CLIENT = "../ä user/..\n\0"
SCRIBBLE = Stroke(StrokeKind.SCRIBBLE, np.array([[10.0, 18, 7], [14, 19, 7], [15, 22, 7]]))


def click(*point: int, label: int = 1, mask: np.ndarray | None = None) -> Prompt:
    return Prompt(points=np.array([point], dtype=float), labels=np.array([label]), mask=mask)


PROMPTS = (
    click(15, 20, 9),
    dataclasses.replace(click(15, 20, 9), strokes=(SCRIBBLE,), accepted=(Plane(2, 9),)),
    click(16, 21, 9, label=0, mask=oblique_volume()[1]),
)


@pytest.fixture
def config(tmp_path: Path) -> AppConfig:
    return AppConfig(store=tmp_path / "store")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    volume, _ = oblique_volume()
    path = tmp_path / "case.nii.gz"
    nib.save(nib.Nifti1Image(volume.array, volume.geometry.affine), path)
    return path


def runtime(config: AppConfig, seed: int = 0, version: str = "0") -> Runtime:
    """A server's runtime; another seed and version are other weights."""
    predictor = small_predictor(seed)
    predictor.meta = dataclasses.replace(predictor.meta, version=version)
    return Runtime(config, lambda _: predictor)


def place(held: Held, prompts: tuple[Prompt, ...] = PROMPTS) -> list[np.ndarray]:
    return [held.predictor.segment_prompt(held.session, prompt, "a").mask for prompt in prompts]


def journal_of(config: AppConfig, image: Path, client: str = CLIENT) -> Path:
    return config.store / "sessions" / session_name(client, str(image)) / FILE


def go_on(held: Held) -> Iterator[np.ndarray]:
    """A next click, undo and redo."""
    extra = Prompt(points=np.array([[16.0, 21, 9], [18, 22, 11]]), labels=np.array([0, 1]), mask=PROMPTS[2].mask)
    yield held.predictor.segment_prompt(held.session, extra, "a").mask
    yield held.predictor.undo(held.session, "a", 3).mask
    yield held.predictor.redo(held.session, "a", 2).mask
    yield held.predictor.undo(held.session, "a").mask
    with pytest.raises(PromptError):
        held.predictor.undo(held.session, "b")


def test_a_session_goes_on_in_a_new_process_bit_for_bit(config: AppConfig, image: Path) -> None:
    with runtime(config).use(image, CLIENT) as held:
        assert held.notes == {}
        masks = place(held)
        held.predictor.undo(held.session, "a", 2)
        held.predictor.redo(held.session, "a")
        held.predictor.redo(held.session, "a")
    apart = runtime(dataclasses.replace(config, journal_days=0))
    with runtime(config).use(image, CLIENT) as held, apart.use(image, CLIENT) as uninterrupted:
        assert held.notes == {"restored": True, "weights_changed": False}
        assert not held.session.states()  # nothing is computed before somebody asks
        assert all(np.array_equal(one, other) for one, other in zip(place(uninterrupted), masks, strict=True))
        for one, other in zip(go_on(held), go_on(uninterrupted), strict=True):
            assert np.array_equal(one, other)
    with runtime(config).use(image, "somebody else") as other:
        assert not other.session.timelines
    assert uninterrupted.notes == {}


def test_other_weights_answer_the_same_prompts_and_say_so(config: AppConfig, image: Path) -> None:
    with runtime(config).use(image, CLIENT) as held:
        place(held, PROMPTS[:1])
    with runtime(config, 1, "1").use(image, CLIENT) as held:
        assert held.notes == {"restored": True, "weights_changed": True}
        mask = held.predictor.segment_prompt(held.session, PROMPTS[0], "a").mask
        place(held, PROMPTS[1:2])
    fresh = small_predictor(1)
    assert np.array_equal(fresh.segment_prompt(fresh.open(held.session.volume), PROMPTS[0]).mask, mask)
    with runtime(config, 1, "1").use(image, CLIENT) as held:
        assert held.notes == {"restored": True, "weights_changed": False}
        assert len(held.session.timelines["a"].steps) == 2


def test_a_line_cut_off_by_a_crash_is_ignored(config: AppConfig, image: Path) -> None:
    with runtime(config).use(image, CLIENT) as held:
        place(held, PROMPTS[:1])
    path = journal_of(config, image)
    path.write_bytes(path.read_bytes() + b'{"object": "a", "at": 1, "prom')
    with runtime(config).use(image, CLIENT) as held:
        assert len(held.session.timelines["a"].steps) == 1
        place(held, PROMPTS[:2])
    with runtime(config).use(image, CLIENT) as held:
        assert len(held.session.timelines["a"].steps) == 2


@pytest.mark.parametrize("harm", ["image", "line", "mask", "bits", "order", "count", "format"])
def test_what_does_not_fit_is_put_aside(config: AppConfig, image: Path, harm: str) -> None:
    with runtime(config).use(image, CLIENT) as held:
        place(held, PROMPTS[2:])
    path = journal_of(config, image)
    lines = path.read_text().splitlines(keepends=True)
    if harm == "image":
        os.utime(image, ns=(0, 1))
    elif harm == "mask":
        next(path.parent.glob("*.npz")).write_bytes(b"PK torn")
    elif harm == "bits":
        mask = next(path.parent.glob("*.npz"))
        content = bytearray(mask.read_bytes())
        with zipfile.ZipFile(mask) as archive:
            first = archive.infolist()[0]
        data = first.header_offset + 30 + len(first.filename)  # the local header may have more, all of it is spoiled
        content[data : data + first.compress_size] = b"\xff" * first.compress_size
        mask.write_bytes(content)
    elif harm == "count":
        path.write_text("".join([*lines, json.dumps({"object": "a", "stand": "x"}) + "\n"]))
    elif harm == "order":
        path.write_text("".join([*lines, json.dumps({"object": "a", "stand": 7}) + "\n"]))
    else:
        path.write_text("junk\n" + lines[1] if harm == "line" else lines[0].replace("session-2", "session-9"))
    with runtime(config).use(image, CLIENT) as held:
        assert held.notes == {}
        assert not held.session.timelines
        place(held, PROMPTS[:1])
    assert path.is_file()
    assert len(list(path.parent.parent.glob(f"{path.parent.name}.aside-*"))) == 1


def test_nobody_inherits_what_a_client_without_an_id_placed(config: AppConfig, image: Path) -> None:
    with runtime(config).use(image, Client.OHIF.value) as held:
        place(held, PROMPTS[:1])
    assert not journal_of(config, image, Client.OHIF.value).exists()
    with runtime(config).use(image, Client.OHIF.value) as held:
        assert not held.session.timelines


def test_a_reset_does_not_read_what_it_removes(config: AppConfig, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with runtime(config).use(image, CLIENT) as held:
        place(held, PROMPTS[:1])
    monkeypatch.setattr(Journal, "_read", lambda journal: pytest.fail("read"))
    with runtime(config).use(image, CLIENT, reset=True) as held:
        assert held.notes == {}
    assert not journal_of(config, image).exists()


def test_reset_begins_anew_and_old_journals_go(config: AppConfig, image: Path) -> None:
    with runtime(config).use(image, CLIENT) as held:
        place(held, PROMPTS[:1])
    running = runtime(config)
    with running.use(image, CLIENT, reset=True) as held:
        assert held.notes == {}
        assert not journal_of(config, image).exists()
        place(held, PROMPTS[1:2])
    assert len(journal_of(config, image).read_text().splitlines()) == 2
    old = time.time() - 15 * 86_400
    os.utime(journal_of(config, image), (old, old))
    with running.use(image, "b"):
        assert journal_of(config, image).exists()  # its session is open
    with runtime(config).use(image, "b"):
        assert not journal_of(config, image).exists()
    with runtime(dataclasses.replace(config, journal_days=0)).use(image, "c") as held:
        place(held, PROMPTS[:1])
    assert not journal_of(config, image, "c").exists()


_SERVER = """
import sys, time
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from app.test_journal import CLIENT, place, runtime
from lib.configs.medvl_sam2 import AppConfig
with runtime(AppConfig(store=Path(sys.argv[1]))).use(Path(sys.argv[2]), CLIENT) as held:
    place(held)
    print("placed", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.e2e
def test_a_session_outlives_kill_9(config: AppConfig, image: Path, repository: Path) -> None:
    paths = [str(repository / folder) for folder in ("model", "apps/medvl_sam2", "tests")]
    command = [sys.executable, "-c", _SERVER, str(config.store), str(image), *paths]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    with server.stdout:
        assert server.stdout.readline() == "placed\n"
        server.send_signal(signal.SIGKILL)
        server.wait()
    apart = runtime(dataclasses.replace(config, journal_days=0))
    with runtime(config).use(image, CLIENT) as held, apart.use(image, CLIENT) as uninterrupted:
        assert held.notes["restored"]
        place(uninterrupted)
        for one, other in zip(go_on(held), go_on(uninterrupted), strict=True):
            assert np.array_equal(one, other)


def many(count: int) -> Prompt:
    """Foreground and background points, the first listed before the second as clients do."""
    points = [[float(n % 30), float(n % 25), float(n % 15)] for n in range(count)]
    labels = [n % 2 for n in range(count)]
    order = np.argsort([-label for label in labels], kind="stable")
    return Prompt(np.array(points)[order], np.array(labels)[order], strokes=(SCRIBBLE,))


def written(folder: Path, prompts: list[Prompt], moves: int = 0) -> tuple[Journal, dict[str, Timeline]]:
    """A journal of an object's prompts, then of undo and redo."""
    journal, timeline = Journal(folder, HEADER), Timeline()
    for n, prompt in enumerate(prompts):
        timeline.place(n, Step.of(prompt, n))
        journal.write(Change("a", n, prompt), {"a": timeline})
    for n in range(moves):
        timeline.position = len(prompts) - n % 2
        journal.write(Change("a", timeline.position), {"a": timeline})
    return journal, {"a": timeline}


HEADER = JournalHeader("1", "0" * 64, "image", 1)


def same(changes: list[Change], prompts: list[Prompt]) -> bool:
    found = [prompt_key(change.prompt) for change in changes if change.prompt is not None]
    return found == [prompt_key(prompt.validated((40, 34, 18))) for prompt in prompts]


def test_a_line_costs_what_was_placed(tmp_path: Path) -> None:
    prompts = [many(n) for n in range(1, 81)]
    written(tmp_path / "a", prompts)
    lines = (tmp_path / "a" / FILE).read_bytes().splitlines()
    assert max(len(line) for line in lines[3:]) < 100
    assert same(Journal(tmp_path / "a", HEADER).changes, prompts)


def test_a_journal_of_many_moves_is_written_anew(tmp_path: Path) -> None:
    masked = click(15, 20, 9, mask=oblique_volume()[1])
    prompts = [many(n) for n in range(1, 6)]
    journal, timelines = written(tmp_path / "a", [masked, *prompts], moves=150)
    lines = (tmp_path / "a" / FILE).read_bytes().splitlines()
    assert len(lines) <= 2 * 7 + SPARE_LINES
    again = Journal(tmp_path / "a", HEADER)
    assert same(again.changes, [masked, *prompts])
    assert again.changes[-1].at == timelines["a"].position
    timelines["a"].place(0, Step.of(prompts[0], 9))  # the mask's step is cut off
    journal.write(Change("a", 0, prompts[0]), timelines)
    for _ in range(SPARE_LINES + 20):
        journal.write(Change("a", 1), timelines)
    assert not list((tmp_path / "a").glob("*.npz"))
    assert same(Journal(tmp_path / "a", HEADER).changes[:1], prompts[:1])


def test_the_first_format_is_read_and_gone_on_with(config: AppConfig, image: Path) -> None:
    with runtime(config).use(image, CLIENT) as held:
        masks = place(held)
    path = journal_of(config, image)
    head, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    old: list[dict[str, object]] = [{**head, "format": "medvl-sam2-session-1"}]
    for line, prompt in zip(lines, PROMPTS, strict=True):
        strokes = [{"kind": s.kind.value, "points": s.points.tolist(), "label": s.label} for s in prompt.strokes]
        whole = {
            "points": prompt.points.tolist(),
            "labels": prompt.labels.tolist(),
            "box": None,
            "mask": line["changed"].get("mask"),
            "text": None,
            "strokes": strokes,
            "accepted": [[plane.axis, plane.index] for plane in prompt.accepted],
            "propagate": False,
        }
        old.append({"object": line["object"], "at": line["at"], "prompt": whole})
    path.write_text("".join(f"{json.dumps(line)}\n" for line in old))
    extra = Prompt(points=np.array([[18.0, 22, 11]]), labels=np.array([1]))
    with runtime(config).use(image, CLIENT) as held:
        assert held.notes["restored"]
        assert np.array_equal(held.predictor.segment_prompt(held.session, PROMPTS[2], "a").mask, masks[2])
        held.predictor.segment_prompt(held.session, extra, "a")
    with runtime(config).use(image, CLIENT) as held:
        assert len(held.session.timelines["a"].steps) == 4


@pytest.mark.parametrize("torn", [False, True])
def test_what_could_not_be_written_is_written_with_the_next_change(
    config: AppConfig, image: Path, monkeypatch: pytest.MonkeyPatch, torn: bool
) -> None:
    with runtime(config).use(image, CLIENT) as held:
        place(held, PROMPTS[:1])
        with monkeypatch.context() as full:
            full.setattr(os, "fsync", _no_space)
            place(held, PROMPTS[1:2])
            if torn:
                with open(journal_of(config, image), "ab") as file:
                    file.write(b'{"object": "a", "at": 1, "chan')
        mask = place(held, PROMPTS[2:])[-1]
    with runtime(config).use(image, CLIENT) as held:
        assert len(held.session.timelines["a"].steps) == 3
        assert np.array_equal(place(held, PROMPTS[2:])[-1], mask)


def _no_space(_: int) -> None:
    raise OSError(28, "No space left on device")
