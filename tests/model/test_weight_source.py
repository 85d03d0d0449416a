"""Published files are read as named tensors, and nothing in them is ever executed."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor

from medvl_sam2.converters.source import TensorInfo, WeightSource, locate, open_source
from medvl_sam2.errors import CheckpointError

STATE = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "a.bias": torch.ones(3, dtype=torch.bfloat16),
    "count": torch.tensor(7),
}


def save_torch(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def save_shards(folder: Path) -> Path:
    folder.mkdir()
    save_file({"a.weight": STATE["a.weight"]}, folder / "model-00001-of-00002.safetensors")
    save_file({name: STATE[name] for name in ("a.bias", "count")}, folder / "model-00002-of-00002.safetensors")
    places = {"a.weight": "model-00001-of-00002.safetensors"}
    places |= dict.fromkeys(("a.bias", "count"), "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def all_of(source: WeightSource) -> dict[str, Tensor]:
    return dict(source.read(list(source.tensors)))


def assert_is_state(source: WeightSource) -> None:
    assert source.tensors == {
        "a.weight": TensorInfo((2, 3)),
        "a.bias": TensorInfo((3,)),
        "count": TensorInfo((), floating=False),
    }
    read = all_of(source)
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in STATE.items())


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin"])
@pytest.mark.parametrize("container", [None, "model", "state_dict"])
def test_torch_file(tmp_path: Path, suffix: str, container: str | None) -> None:
    content = {container: STATE, "epoch": 3, "optimizer": {"state": {}}} if container else STATE
    source = open_source(save_torch(tmp_path / f"w.{suffix}", content))
    assert_is_state(source)
    assert source.ignored == (("epoch", "optimizer") if container else ())


def test_torch_file_of_before_2020(tmp_path: Path) -> None:
    assert_is_state(open_source(save_torch(tmp_path / "w.pt", STATE, _use_new_zipfile_serialization=False)))


def test_training_arguments_beside_the_weights_are_read_over(tmp_path: Path) -> None:
    path = save_torch(tmp_path / "w.pth", {"model": STATE, "args": argparse.Namespace(lr=1e-4)})
    assert open_source(path).ignored == ("args",)


def test_safetensors_file_folder_and_shards(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    save_file(STATE, folder / "model.safetensors")
    assert_is_state(open_source(folder / "model.safetensors"))
    assert_is_state(open_source(folder))
    assert_is_state(open_source(save_shards(tmp_path / "many")))


def test_safetensors_win_over_torch_files_in_a_folder(tmp_path: Path) -> None:
    save_torch(tmp_path / "vision_tower.bin", {"x": torch.zeros(1)})
    save_file(STATE, tmp_path / "model.safetensors")
    assert_is_state(open_source(tmp_path))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of mapped files on this system")
def test_torch_tensors_stay_on_disk_until_read(tmp_path: Path) -> None:
    path = save_torch(tmp_path / "w.pt", {"model": {"a": torch.zeros(8), "b": torch.ones(8)}})
    ((_, tensor),) = open_source(path).read(["b"])
    assert torch.equal(tensor, torch.ones(8))
    assert str(path) in Path("/proc/self/maps").read_text()


class _Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("new_format", [True, False])
def test_malicious_pickle_is_refused_and_not_run(tmp_path: Path, new_format: bool) -> None:
    proof = tmp_path / "executed"
    content = {"model": STATE, "extra": _Evil(proof)}
    path = save_torch(tmp_path / "w.pt", content, _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match=r"w\.pt .* may run code .*posix\.mkdir.* it is refused"):
        open_source(path)
    assert not proof.exists()
    function, arguments = _Evil(proof).__reduce__()
    function(*arguments)  # what unpickling would have done
    assert proof.is_dir()


@pytest.mark.parametrize("suffix", ["pt", "bin", "safetensors"])
@pytest.mark.parametrize("keep", [0, 3, 30, 60, 300, -200])
def test_truncated_file(tmp_path: Path, suffix: str, keep: int) -> None:
    path = tmp_path / f"w.{suffix}"
    large = {"a": torch.randn(50, 40)}
    if suffix != "safetensors":
        save_torch(path, large, _use_new_zipfile_serialization=suffix == "pt")
    else:
        save_file(large, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"w\.{suffix} (is torn|was not written by torch\.save)"):
        open_source(path)


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    folder = save_shards(tmp_path / "many")
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is torn"):
        open_source(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda places: places | {"b": "model-00001-of-00002.safetensors"}, "1 weights are not where .* first 'b'"),
        (lambda places: {k: v for k, v in places.items() if k != "count"}, "1 weights are not where .* first 'count'"),
        (lambda places: places | {"a.bias": "../secret.safetensors"}, "names the shard"),
        (lambda places: places | {"a.bias": "model-00003.safetensors"}, "names the shard"),
        (lambda _: ["a"], "is no shard index"),
    ],
)
def test_shard_index_must_fit(tmp_path: Path, change: Any, message: str) -> None:
    folder = save_shards(tmp_path / "many")
    save_file(STATE, tmp_path / "secret.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": change(json.loads(index.read_text())["weight_map"])}))
    with pytest.raises(CheckpointError, match=message):
        open_source(folder)


def test_what_is_no_weight_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.pkl").write_bytes(b"\x80\x04.")
    (tmp_path / "w.bin").write_bytes(b"version https://git-lfs")
    save_torch(tmp_path / "list.pt", [torch.zeros(1)])
    save_torch(tmp_path / "mixed.pt", {"a": torch.zeros(1), "note": "hello"})
    save_torch(tmp_path / "empty.pt", {})
    messages = {
        "w.pkl": "neither .safetensors nor",
        "w.bin": "not written by torch.save",
        "list.pt": "holds list, not named tensors",
        "mixed.pt": "holds 'note' of type str",
        "empty.pt": "holds no tensors",
        "absent.pt": "does not exist",
        ".": r"holds \d weight files .* name the file",
    }
    for name, message in messages.items():
        with pytest.raises(CheckpointError, match=message):
            open_source(tmp_path / name)


def test_hub_name_without_a_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("cannot reach the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    for name in ("owner/model-2.5", "owner/model/file.pt"):
        with pytest.raises(CheckpointError, match="copy the weights to this machine"):
            locate(name)
    for name in ("weights/missing.pt", "./weights/x", "/absent/place/x", "alone"):
        assert locate(name) == Path(name)
    assert locate(str(tmp_path)) == tmp_path


def test_hub_cache_is_used_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save_file(STATE, snapshot / "model.safetensors")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_is_state(open_source(locate("owner/model")))
    assert locate("owner/model/model.safetensors").name == "model.safetensors"
