"""Checkpoint directories are strict and complete; publishing is atomic, exclusive and reversible."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import torch

from medvl_sam2 import checkpoint as ckpt
from medvl_sam2 import publishing
from medvl_sam2.config import ModelConfig
from medvl_sam2.errors import CheckpointError

META = ckpt.CheckpointMeta(name="toy", version="0", notice="made by a test", metrics={"dice": 0.5})


class Toy(torch.nn.Module):
    """Two layers with tied weights, a buffer of integers and one float layer."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(6, width)
        self.head = torch.nn.Linear(width, 6, bias=False)
        self.head.weight = self.embed.weight
        self.norm = torch.nn.BatchNorm1d(width)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "source_tokenizer.json"
    path.write_text('{"model": {}}', encoding="utf-8")
    return path


def make(directory: Path, tokenizer: Path, fill: float = 0.25, name: str = "toy") -> Path:
    toy = Toy()
    with torch.no_grad():
        toy.embed.weight.fill_(fill)
    meta = ckpt.CheckpointMeta(name=name, version="0", notice="made by a test")
    ckpt.save_checkpoint(directory, toy.state_dict(), ModelConfig.tiny(), tokenizer, meta)
    return directory


def test_round_trip_keeps_values_config_tokenizer_and_meta(tmp_path: Path, tokenizer: Path) -> None:
    toy = Toy()
    stored = ckpt.save_checkpoint(tmp_path / "a", toy.state_dict(), ModelConfig.tiny(), tokenizer, META)
    state, config, tokenizer_path, meta = ckpt.load_checkpoint(tmp_path / "a")
    assert config == ModelConfig.tiny()
    assert tokenizer_path.read_text() == tokenizer.read_text()
    assert meta == stored
    assert meta.metrics == {"dice": 0.5}
    assert len(meta.sha256) == 64
    assert meta.created
    for key, value in toy.state_dict().items():
        assert state[key].dtype == value.dtype
        expected = value.half().float() if value.is_floating_point() else value
        assert torch.equal(state[key], expected)
    other = Toy()
    ckpt.load_into(other, state)
    assert torch.equal(other.head.weight, toy.embed.weight.half().float())


def test_weights_are_fp16_and_tied_weights_are_stored_once(tmp_path: Path, tokenizer: Path) -> None:
    from safetensors import safe_open

    make(tmp_path / "a", tokenizer)
    with safe_open(tmp_path / "a" / ckpt.WEIGHTS_FILE, framework="pt") as file:
        assert len({"embed.weight", "head.weight"} & set(file.keys())) == 1
        assert file.get_tensor("embed.weight").dtype == torch.float16
        assert file.get_tensor("norm.num_batches_tracked").dtype == torch.int64


def test_save_leaves_nothing_behind_when_it_fails(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(CheckpointError, match="'w' is not finite"):
        ckpt.save_checkpoint(
            tmp_path / "out" / "a", {"w": torch.tensor([float("nan")])}, ModelConfig.tiny(), tokenizer, META
        )
    with pytest.raises(CheckpointError, match="fp16"):
        ckpt.save_checkpoint(tmp_path / "out" / "a", {"w": torch.tensor([1e6])}, ModelConfig.tiny(), tokenizer, META)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_save_refuses_to_overwrite_unless_told(tmp_path: Path, tokenizer: Path) -> None:
    make(tmp_path / "a", tokenizer, fill=1.0)
    with pytest.raises(CheckpointError, match="exists already"):
        make(tmp_path / "a", tokenizer)
    state = {"w": torch.full((2,), 3.0)}
    ckpt.save_checkpoint(tmp_path / "a", state, ModelConfig.tiny(), tokenizer, META, overwrite=True)
    assert torch.equal(ckpt.load_checkpoint(tmp_path / "a").state["w"], state["w"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", tokenizer.name]


def test_strict_load_names_missing_unused_and_misshapen_weights(tmp_path: Path, tokenizer: Path) -> None:
    state = ckpt.load_checkpoint(make(tmp_path / "a", tokenizer)).state
    missing = {key: value for key, value in state.items() if key != "norm.weight"}
    with pytest.raises(CheckpointError, match=r"1 weights are missing, first 'norm.weight'"):
        ckpt.load_into(Toy(), missing)
    with pytest.raises(CheckpointError, match=r"1 weights are unused, first 'stray'"):
        ckpt.load_into(Toy(), {**state, "stray": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"shape \(6, 4\), the model wants \(6, 5\)"):
        ckpt.load_into(Toy(5), state)


@pytest.mark.parametrize("name", [ckpt.WEIGHTS_FILE, ckpt.CONFIG_FILE, ckpt.TOKENIZER_FILE, ckpt.META_FILE])
def test_a_missing_file_is_named(tmp_path: Path, tokenizer: Path, name: str) -> None:
    directory = make(tmp_path / "a", tokenizer)
    (directory / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        ckpt.load_checkpoint(directory)


def test_a_flipped_or_truncated_byte_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    directory = make(tmp_path / "a", tokenizer)
    weights = directory / ckpt.WEIGHTS_FILE
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="SHA-256"):
        ckpt.load_checkpoint(directory)
    weights.write_bytes(good[:-7])
    with pytest.raises(CheckpointError, match="SHA-256"):
        ckpt.load_checkpoint(directory)


def test_a_pickle_is_not_executed(tmp_path: Path, tokenizer: Path) -> None:
    directory = make(tmp_path / "a", tokenizer)
    torch.save({"w": torch.zeros(1)}, directory / ckpt.WEIGHTS_FILE)
    meta = json.loads((directory / ckpt.META_FILE).read_text())
    meta["sha256"] = ckpt.file_sha256(directory / ckpt.WEIGHTS_FILE)
    (directory / ckpt.META_FILE).write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="no safetensors file"):
        ckpt.load_checkpoint(directory)


def test_publish_counts_up_and_rollback_goes_back_to_the_shipped_weights(tmp_path: Path, tokenizer: Path) -> None:
    store = tmp_path / "store"
    assert publishing.read_published(store) is None
    assert publishing.published_version(store) == publishing.SHIPPED_VERSION
    first = publishing.publish(store, make(tmp_path / "a", tokenizer, 1.0))
    second = publishing.publish(store, make(tmp_path / "b", tokenizer, 2.0), expected_version=1)
    assert (first.name, second.name) == ("1", "2")
    assert publishing.read_published(store) == second
    assert ckpt.load_checkpoint(second).meta.version == "2"
    assert float(ckpt.load_checkpoint(second).state["embed.weight"][0, 0]) == 2.0
    assert publishing.rollback(store) == first
    assert publishing.rollback(store) is None
    with pytest.raises(CheckpointError, match="none to roll back to"):
        publishing.rollback(store)
    assert publishing.rollback(store, 2) == second
    third = publishing.publish(store, make(tmp_path / "c", tokenizer))
    assert third.name == "3", "a version number is never reused"


def test_publish_refuses_when_the_served_model_changed_meanwhile(tmp_path: Path, tokenizer: Path) -> None:
    store = tmp_path / "store"
    publishing.publish(store, make(tmp_path / "a", tokenizer))
    with pytest.raises(CheckpointError, match="compare again"):
        publishing.publish(store, make(tmp_path / "b", tokenizer), expected_version=publishing.SHIPPED_VERSION)
    assert publishing.published_version(store) == 1


def test_an_interrupted_publish_is_never_visible(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    served = publishing.publish(store, make(tmp_path / "a", tokenizer, 1.0))
    candidate = make(tmp_path / "b", tokenizer, 2.0)

    def stop_half_way(source: Path, target: Path) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:10])
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(publishing.shutil, "copyfile", stop_half_way)
        with pytest.raises(OSError, match="disk full"):
            publishing.publish(store, candidate)
    with monkeypatch.context() as patch:
        patch.setattr(publishing, "_write_pointer", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            publishing.publish(store, candidate)
    assert publishing.read_published(store) == served
    ckpt.load_checkpoint(served)
    assert publishing.publish(store, candidate).name == "3"


def test_damaged_candidate_is_not_published(tmp_path: Path, tokenizer: Path) -> None:
    candidate = make(tmp_path / "a", tokenizer)
    (candidate / ckpt.WEIGHTS_FILE).write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="SHA-256"):
        publishing.publish(tmp_path / "store", candidate)
    assert publishing.read_published(tmp_path / "store") is None


def test_damaged_pointer_or_lost_version_says_what_to_do(tmp_path: Path, tokenizer: Path) -> None:
    store = tmp_path / "store"
    path = publishing.publish(store, make(tmp_path / "a", tokenizer))
    (path / ckpt.META_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"rollback\(\)"):
        publishing.read_published(store)
    (store / publishing.POINTER_FILE).write_text('{"version": ')
    with pytest.raises(CheckpointError, match="serve the shipped weights"):
        publishing.read_published(store)


def _publish_many(store: str, candidate: str, times: int) -> None:
    for _ in range(times):
        publishing.publish(Path(store), Path(candidate))


def test_concurrent_publishers_and_readers_see_only_complete_versions(tmp_path: Path, tokenizer: Path) -> None:
    store = tmp_path / "store"
    candidate = make(tmp_path / "a", tokenizer)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_publish_many, args=(str(store), str(candidate), 5)) for _ in range(3)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        served = publishing.read_published(store)
        if served is not None:
            assert ckpt.load_checkpoint(served).meta.version == served.name
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert publishing.published_version(store) == 15
    assert sorted(int(path.name) for path in (store / "versions").iterdir()) == list(range(1, 16))
