"""One predictor, loaded late, exchanged when other weights are published; sessions within bounds."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest

from app.conftest import write_phantom
from app.fakes import FakePredictor
from lib.configs.medvl_sam2 import AppConfig
from lib.runtime import Runtime
from medvl_sam2.errors import CheckpointError, VolumeError
from medvl_sam2.files import write_json_atomically


class Loads:
    """Counts loads; refuses versions named in ``broken``."""

    def __init__(self) -> None:
        self.paths: list[Path | None] = []
        self.broken: set[str] = set()

    def __call__(self, path: Path | None) -> FakePredictor:
        if path is not None and path.name in self.broken:
            raise CheckpointError(f"{path} is torn")
        self.paths.append(path)
        return FakePredictor.load(path)


def publish(store: Path, version: int) -> None:
    """What a finished training leaves, as far as the runtime looks."""
    folder = store / "versions" / str(version)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").write_text("{}")
    write_json_atomically(store / "published.json", {"version": version, "last": version, "history": []})


@pytest.fixture
def loads() -> Loads:
    return Loads()


@pytest.fixture
def config(tmp_path: Path) -> AppConfig:
    return AppConfig(store=tmp_path / "store")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return write_phantom(tmp_path / "image.nii.gz")


def test_nothing_is_loaded_before_it_is_used(config: AppConfig, loads: Loads, image: Path) -> None:
    runtime = Runtime(config, loads)
    assert loads.paths == []
    with runtime.use(image, "a"), runtime.use(image, "b"):
        pass
    assert loads.paths == [None]


def test_published_weights_are_served_without_a_restart(config: AppConfig, loads: Loads, image: Path) -> None:
    runtime = Runtime(config, loads)
    with runtime.use(image, "a") as before:
        pass
    assert runtime.served_version() == "shipped"
    publish(config.store, 1)
    with runtime.use(image, "a") as after:
        assert after.predictor.meta.version == "1"
    assert runtime.served_version() == "1"
    assert after.session is not before.session
    publish(config.store, 2)
    with runtime.use(image, "a") as latest:
        assert latest.predictor.meta.version == "2"
    with runtime.use(image, "a") as again:
        assert again.session is latest.session
    assert len(loads.paths) == 3


def test_torn_weights_leave_the_version_before_in_use(config: AppConfig, loads: Loads, image: Path) -> None:
    runtime = Runtime(config, loads)
    with runtime.use(image, "a"):
        pass
    loads.broken.add("1")
    publish(config.store, 1)
    for _ in range(2):
        with runtime.use(image, "a") as held:
            assert held.predictor.meta.version == "shipped-1"
    (config.store / "published.json").write_text("{")
    with runtime.use(image, "a") as held:
        assert held.predictor.meta.version == "shipped-1"
    publish(config.store, 2)
    with runtime.use(image, "a") as held:
        assert held.predictor.meta.version == "2"


def test_first_load_of_torn_weights_says_so(config: AppConfig, loads: Loads, image: Path) -> None:
    loads.broken.add("1")
    publish(config.store, 1)
    with pytest.raises(CheckpointError, match="torn"), Runtime(config, loads).use(image, "a"):
        pass


def test_sessions_belong_to_annotator_and_image(config: AppConfig, loads: Loads, image: Path, tmp_path: Path) -> None:
    runtime = Runtime(config, loads)
    other = write_phantom(tmp_path / "other.nii.gz", 300)
    held = []
    for path, client in ((image, "a"), (image, "b"), (other, "a"), (image, "a")):
        with runtime.use(path, client) as lent:
            held.append(lent.session)
    assert held[3] is held[0]
    assert len({id(session) for session in held}) == 3
    assert held[0].volume is held[1].volume  # read once


def test_reset_forgets_the_prompts(config: AppConfig, loads: Loads, image: Path) -> None:
    runtime = Runtime(config, loads)
    with runtime.use(image, "a") as held:
        held.session.objects["liver"] = object()
    with runtime.use(image, "a", reset=True) as held:
        assert held.session.objects == {}


def test_image_sent_again_under_its_name_is_another_image(config: AppConfig, loads: Loads, image: Path) -> None:
    runtime = Runtime(config, loads)
    with runtime.use(image, "a") as before:
        pass
    first = runtime.geometry(image)
    write_phantom(image, 300, (4, 5, 6))
    with runtime.use(image, "a") as after:
        assert after.session is not before.session
        assert after.session.volume.array.shape == (4, 5, 6)
    assert runtime.geometry(image).shape == (4, 5, 6) != first.shape


@pytest.mark.parametrize("limit", [{"max_sessions": 2}, {"session_megabytes": 1}])
def test_oldest_session_goes_first(
    config: AppConfig, loads: Loads, image: Path, limit: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.fakes.FakeSession.own_bytes", property(lambda session: 400_000))
    runtime = Runtime(dataclasses.replace(config, **limit), loads)
    sessions = {}
    for client in ("a", "b", "a", "c"):
        with runtime.use(image, client) as held:
            sessions[client] = held.session
    assert runtime.session_count() == 2
    with runtime.use(image, "a") as held:
        assert held.session is sessions["a"]
    with runtime.use(image, "b") as held:
        assert held.session is not sessions["b"]


def test_one_session_may_be_larger_than_the_limit(
    config: AppConfig, loads: Loads, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.fakes.FakeSession.own_bytes", property(lambda session: 10**9))
    runtime = Runtime(dataclasses.replace(config, session_megabytes=1), loads)
    with runtime.use(image, "a") as first:
        pass
    with runtime.use(image, "a") as again:
        assert again.session is first.session


def test_unreadable_image_leaves_no_session(config: AppConfig, loads: Loads, tmp_path: Path) -> None:
    runtime = Runtime(config, loads)
    junk = tmp_path / "junk.nii.gz"
    junk.write_bytes(b"junk")
    with pytest.raises(VolumeError), runtime.use(junk, "a"):
        pass
    assert runtime.session_count() == 0


def test_one_caller_at_a_time(config: AppConfig, loads: Loads, image: Path) -> None:
    runtime = Runtime(config, loads)
    order: list[str] = []
    entered = threading.Event()

    def second() -> None:
        entered.set()
        with runtime.use(image, "b"):
            order.append("second")

    with runtime.use(image, "a"):
        thread = threading.Thread(target=second)
        thread.start()
        entered.wait()
        thread.join(timeout=0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
