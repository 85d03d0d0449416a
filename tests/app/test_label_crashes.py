"""A server killed at any moment of a save: what it acknowledged is there, whole, and nothing torn ever is.

The parent holds a store that was opened before; every trial forks, and the child saves labels one after another and
acknowledges each over a pipe until it is killed: after a random time, or before a certain line of the code that writes,
as random times rarely meet the short moments between two steps. Then the store is opened anew, as after a restart.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from tqdm import tqdm

from app.conftest import AFFINE, SHAPE, Running
from lib import version_files
from lib.datastore import GuardedLocalStore, open_local_store
from medvl_sam2.volume_io import read_mask

AHEAD = 6
"""Saves a child may get through before it waits to be killed."""
LET = 3
"""So many saves end, one fewer or none, before a kill is due."""
WINDOW = 4.0
"""A kill falls into this many times a save's duration after the next one begins; a child saves slower than we do."""


@dataclass
class Tally:
    """What the trials came to."""

    trials: int = 0
    acknowledged: int = 0
    mid_save: int = 0
    """Trials whose child was killed with a save begun and not acknowledged."""
    unacknowledged_kept: int = 0
    lost: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)


class Lines:
    """A trace function that calls ``act`` before the ``last``-th line executed in the code that writes."""

    FILES = frozenset(
        {"version_files.py", "versioned_store.py", "indexed_store.py", "datastore.py", "files.py", "shutil.py"}
    )

    def __init__(self, last: int, act: Callable[[], None], files: frozenset[str] = FILES) -> None:
        self.last, self.act, self.files, self.count = last, act, files, 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Lines | None:
        if os.path.basename(frame.f_code.co_filename) not in self.files:
            return None
        if event == "line":
            self.count += 1
            if self.count == self.last:
                self.act()
        return self


class Trials:
    """Labels of two images in one store; whose content says who saved it."""

    def __init__(self, running: Running, folder: Path, seed: int) -> None:
        self.studies, self.geometry_of = running.studies, running.app.runtime.geometry
        self.folder, self.random = folder, random.Random(seed)
        self.known: dict[tuple[str, int], str] = {}
        """Checksum of everything acknowledged, by image and version."""
        self.tally = Tally()
        self.save_s = 0.0

    def open(self) -> GuardedLocalStore:
        return open_local_store(str(self.studies), self.geometry_of)

    def label(self, number: int) -> Path:
        """A label that no other trial has, in one of the formats clients send."""
        rng = np.random.default_rng(number)
        mask = rng.integers(0, 3, SHAPE).astype(np.uint8)
        path = self.folder / ("label.nii.gz" if number % 3 else "label.bin")
        if path.suffix == ".bin":
            path.write_bytes(mask.tobytes(order="F"))
        else:
            nib.save(nib.Nifti1Image(mask, AFFINE), path)
        return path

    def run(self, store: GuardedLocalStore, line: int | None = None) -> GuardedLocalStore:
        """One kill, before the ``line``-th one executed or at a random time; returns the store after the restart."""
        number = self.tally.trials = self.tally.trials + 1
        file, image = self.label(number), self.random.choice(("case_a", "case_b"))
        if number % 20 == 1:  # other programs on this machine come and go
            self.save_s = self.duration(store, file, image)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(reader)
                store._process_lock = None  # filelock wants one made in this process
                if line is not None:
                    sys.settrace(Lines(line, lambda: os.kill(os.getpid(), signal.SIGKILL)))
                for turn in range(AHEAD):
                    info: dict[str, Any] = {"author": f"trial {number}", "label_info": [], "note": str(turn)}
                    os.write(writer, b'{"begun": 1}\n')
                    store.save_label(image, str(file), "final", info)
                    os.write(
                        writer, json.dumps([info["version"], _checksum(store, image, info["version"])]).encode() + b"\n"
                    )
                signal.pause()
            finally:
                os._exit(1)
        os.close(writer)
        with os.fdopen(reader, "rb", buffering=0) as pipe:
            heard = b""
            if line is None:
                wanted = self.random.randrange(LET)
                while heard.count(b"begun") <= wanted and (more := pipe.read(4096)):
                    heard += more
                time.sleep(self.random.uniform(0, WINDOW * self.save_s))
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            heard += pipe.readall()
        told = [json.loads(line) for line in heard.splitlines()]
        saved = [line for line in told if isinstance(line, list)]
        self.tally.acknowledged += len(saved)
        self.tally.mid_save += len(told) > 2 * len(saved)
        self.known |= {(image, version): checksum for version, checksum in saved}
        reopened = self.open()
        self.check(reopened, image)
        return reopened

    def duration(self, store: GuardedLocalStore, file: Path, image: str) -> float:
        """Seconds a save takes: the median of three."""
        seconds = []
        for _ in range(3):
            info: dict[str, Any] = {"author": "clock", "label_info": []}
            began = time.perf_counter()
            store.save_label(image, str(file), "final", info)
            seconds.append(time.perf_counter() - began)
            self.known[image, info["version"]] = _checksum(store, image, info["version"])
        return sorted(seconds)[1]

    def check(self, store: GuardedLocalStore, image: str) -> None:
        where = f"trial {self.tally.trials}, {image}"
        versions = {record.version: record for record in store.versions(image)}
        for (owner, number), checksum in self.known.items():
            if owner == image and (number not in versions or versions[number].checksum != checksum):
                self.tally.lost.append(f"{where}: version {number}")
        for number, record in versions.items():
            if (image, number) in self.known and number != max(versions):
                continue  # was looked at in the trial that made it
            path = self.studies / "labels" / record.tag / f"{image}{record.extension}"
            if hashlib.sha256(path.read_bytes()).hexdigest() != record.checksum or read_mask(path)[0].shape != SHAPE:
                self.tally.torn.append(f"{where}: {path.name} of {record.tag}")
            if record.source == "found":
                self.tally.torn.append(f"{where}: {record.tag} without its record")
            if (image, number) not in self.known:
                self.tally.unacknowledged_kept += 1
                self.known[image, number] = record.checksum  # once it was seen it stays
        index = json.loads((self.studies / "datastore_v2.json").read_text())["objects"]
        tags = {tag for tag in index[image]["labels"] if tag != "final"}
        if tags != {record.tag for record in versions.values()}:
            self.tally.lost.append(f"{where}: the index has {sorted(tags)}")
        if versions:
            newest = versions[max(versions)]
            final = Path(store.get_label_uri(image, "final"))
            if hashlib.sha256(final.read_bytes()).hexdigest() != newest.checksum:
                self.tally.torn.append(f"{where}: final is not {newest.tag}")
        self.tally.leftovers += [str(p) for p in self.studies.rglob(".*.part")]
        self.tally.leftovers += [str(p) for p in self.studies.rglob(".*.json.*")]

    def tidy(self, store: GuardedLocalStore) -> None:
        """Delete all but the newest versions, so that later trials do not pay for earlier ones."""
        for image in ("case_a", "case_b"):
            for record in store.versions(image)[:-1]:
                store.remove_label(image, record.tag)
                del self.known[image, record.version]
        shutil.rmtree(self.studies / ".trash", ignore_errors=True)


def _checksum(store: GuardedLocalStore, image: str, number: int) -> str:
    return store._files.read(image, number).checksum


def kill_at_lines(running: Running, folder: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> Tally:
    """Kills before at most ``most`` lines, evenly; a save executes more of them with every version there is."""
    monkeypatch.setattr(version_files, "STALE_S", 0.0)
    work = Trials(running, folder, seed=0)
    store = work.open()
    lines = Lines(0, lambda: None)
    sys.settrace(lines)
    store.save_label("case_a", str(work.label(2)), "final", {"label_info": []})
    sys.settrace(None)
    stops = np.unique(np.linspace(1, 4 * lines.count, most).astype(int))
    for stop in tqdm(stops, unit="kill"):
        store = work.run(store, line=int(stop))
        if work.tally.trials % 3 == 0:
            work.tidy(store)
    print(f"{lines.count} lines a save; {work.tally}")
    return work.tally


def kill_saves(running: Running, folder: Path, monkeypatch: pytest.MonkeyPatch, trials: int, seed: int) -> Tally:
    monkeypatch.setattr(version_files, "STALE_S", 0.0)  # nobody else writes here
    work = Trials(running, folder, seed)
    store = work.open()
    for number in tqdm(range(1, trials + 1), unit="kill"):
        store = work.run(store)
        if number % 10 == 0:
            work.tidy(store)
    tally = work.tally
    print(
        f"{tally.trials} kills, {tally.mid_save} amid a save; {tally.acknowledged} saves acknowledged, "
        f"{len(tally.lost)} lost, {len(tally.torn)} torn files, {tally.unacknowledged_kept} kept unacknowledged"
    )
    return tally


@pytest.mark.slow
def test_forty_kills_lose_nothing(running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tally = kill_saves(running, tmp_path, monkeypatch, trials=40, seed=1)
    assert (tally.lost, tally.torn, tally.leftovers) == ([], [], [])
    assert tally.acknowledged > 20
    assert tally.mid_save > 10


@pytest.mark.slow
def test_kills_between_the_steps_of_a_save_lose_nothing(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tally = kill_at_lines(running, tmp_path, monkeypatch, most=60)
    assert (tally.lost, tally.torn, tally.leftovers) == ([], [], [])
    assert tally.acknowledged > 0
    assert tally.unacknowledged_kept > 5


@pytest.mark.hours
@pytest.mark.timeout(1500)
def test_kills_before_every_line_of_a_save_lose_nothing(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tally = kill_at_lines(running, tmp_path, monkeypatch, most=10_000)
    assert (tally.lost, tally.torn, tally.leftovers) == ([], [], [])


@pytest.mark.hours
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", range(2, 6))
def test_a_thousand_kills_lose_nothing(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Four times 250, each in a store of its own."""
    tally = kill_saves(running, tmp_path, monkeypatch, trials=250, seed=seed)
    assert (tally.lost, tally.torn, tally.leftovers) == ([], [], [])
    assert tally.acknowledged > 125
    assert tally.mid_save > 75
