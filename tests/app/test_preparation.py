"""Work ahead gives way to requests and changes no result."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from app.conftest import Running, write_phantom
from app.fakes import FakePredictor
from lib.configs.medvl_sam2 import AppConfig
from lib.preparation import MOST_WAITING, Preparation
from lib.runtime import PREPARED, Runtime
from lib.turns import Turns
from medvl_sam2.errors import ConfigError
from medvl_sam2.types import Prompt
from small_model import oblique_volume, small_predictor


def test_a_request_waits_for_one_step_at_most(tmp_path: Path) -> None:
    turns, done, asked = Turns(), [], threading.Event()

    def steps(_: Path) -> Iterator[None]:
        for n in range(3):
            if n == 1:
                asked.set()
                time.sleep(0.3)  # a request comes while this step runs
            done.append(f"step {n}")
            yield

    work = Preparation(turns, steps)
    work.ask(tmp_path)
    assert asked.wait(5)
    with turns.foreground():
        done.append("request")
        time.sleep(0.1)
        with turns.foreground():  # the same request may take it again
            assert done == ["step 0", "step 1", "request"]
    assert work.idle(5)
    assert done == ["step 0", "step 1", "request", "step 2"]
    work.stop()
    work.ask(tmp_path)
    assert done[-1] == "step 2"


def test_steps_wait_while_requests_follow_one_another_and_the_newest_image_comes_first(tmp_path: Path) -> None:
    turns, done = Turns(), []

    def steps(image: Path) -> Iterator[None]:
        done.append(image.name)
        if image.name == "2":
            raise OSError("gone")
        if image.name == "3":
            raise ValueError("a defect")
        yield

    work = Preparation(turns, steps)
    with turns.foreground():
        work.ask(tmp_path / "0")
        while work._images:  # until it is taken up: else it would be any of those that came meanwhile
            time.sleep(0.001)
        for n in range(1, 6):
            work.ask(tmp_path / str(n))
        assert not work.idle(0.2)
        assert not done
    assert work.idle(5)
    assert len(done) == MOST_WAITING + 1
    assert done == ["0", "5", "4", "3", "2"]
    work.stop()


def test_no_thread_without_work() -> None:
    before = threading.active_count()
    work = Preparation(Turns(), lambda _: iter(()))
    assert threading.active_count() == before
    work.stop()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    volume, _ = oblique_volume()
    path = tmp_path / "case.nii.gz"
    nib.save(nib.Nifti1Image(volume.array, volume.geometry.affine), path)
    return path


def test_results_are_the_same_with_and_without(tmp_path: Path, image: Path) -> None:
    config = AppConfig(store=tmp_path / "store", journal_days=0)
    ahead, plain = small_predictor(), small_predictor()
    prepared, usual = (
        Runtime(config, lambda _: ahead),
        Runtime(dataclasses.replace(config, prepare=False), lambda _: plain),
    )
    prepared.expect(image)
    assert prepared._preparation is not None
    assert prepared._preparation.idle(60)
    looks = []
    look = ahead.model.look
    ahead.model.look = lambda *args: looks.append(1) or look(*args)  # type: ignore[method-assign]
    prompt = Prompt(points=np.array([[15.0, 20, 9]]), labels=np.array([1]))
    with prepared.use(image, "a") as one, usual.use(image, "a") as other:
        assert np.array_equal(
            one.predictor.segment_prompt(one.session, prompt).mask,
            other.predictor.segment_prompt(other.session, prompt).mask,
        )
    assert not looks  # it was taken ahead
    prepared.close()
    usual.close()


def test_few_images_are_kept_and_a_bad_one_harms_nobody(tmp_path: Path) -> None:
    predictor = FakePredictor()
    runtime = Runtime(AppConfig(store=tmp_path / "store"), lambda _: predictor)  # type: ignore[arg-type, return-value]
    junk = tmp_path / "junk.nii.gz"
    junk.write_bytes(b"junk")
    images = [write_phantom(tmp_path / f"{n}.nii.gz", 100 + n) for n in range(PREPARED + 1)]
    for path in (junk, tmp_path / "missing.nii.gz", *images):
        runtime.expect(path)
        assert runtime._preparation is not None
        assert runtime._preparation.idle(10)
    assert predictor.prepared == images
    assert len(runtime._ahead) == PREPARED
    runtime.close()


def test_the_next_sample_is_prepared(start: Callable[..., Running]) -> None:
    running = start()
    sample = running.client.post("/activelearning/first", json={}).json()
    assert running.app.runtime._preparation.idle(10)
    assert [path.name.split(".")[0] for path in running.predictors[0].prepared] == [sample["id"]]


def test_it_can_be_turned_off(start: Callable[..., Running]) -> None:
    running = start(prepare="false")
    running.client.post("/activelearning/first", json={})
    assert running.slicer("medvl_interactive", foreground=[[1, 2, 3]]).status_code == 200
    assert running.predictors[0].prepared == []
    with pytest.raises(ConfigError, match="true or false"):
        AppConfig.from_conf(running.store, {"prepare": "maybe"})
