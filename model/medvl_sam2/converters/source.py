"""Published weights as a stream of named tensors. No pickle is ever executed.

A source is one file (``.safetensors``, or ``.pt``/``.pth``/``.bin`` written by ``torch.save``) or a folder with such a
file, in one piece or in shards with their ``*.index.json``. Names, shapes and types are read first and cost next to
nothing; :meth:`WeightSource.read` then brings one tensor at a time, file by file, so that a model larger than the
memory can be converted. (``torch.save`` files of before 2020 are no archives and are read as a whole.)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from struct import error as StructError
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from medvl_sam2.errors import CheckpointError

TORCH_SUFFIXES = frozenset({".pt", ".pth", ".bin"})
CONTAINERS = ("model", "state_dict")
"""Where trainers keep the weights beside optimizer and epoch."""

_HARMLESS_CLASSES: list[Any] = [argparse.Namespace]
"""Value holders that trainers store beside the weights; rebuilding one runs no code of the file."""
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80\x02"
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer.json"]


@dataclass(frozen=True)
class TensorInfo:
    """Shape of one stored tensor, and whether it holds floating numbers."""

    shape: tuple[int, ...]
    floating: bool = True


class _Shard(Protocol):
    """One open file."""

    def infos(self) -> dict[str, TensorInfo]: ...

    def ignored(self) -> tuple[str, ...]: ...

    def tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class WeightSource:
    """Named tensors of a file or folder.

    ``tensors``: what there is, by name; ``files``: the file of each name; ``ignored``: entries of a training
    checkpoint that are no weights (``optimizer``, ``epoch`` ...).
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    files: Mapping[str, Path]
    ignored: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where files that belong to the weights (``config.json``, ``tokenizer.json``) lie."""
        return self.path if self.path.is_dir() else self.path.parent

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors called ``names``, file by file, on the CPU and in their stored type."""
        wanted: dict[Path, list[str]] = {}
        for name in names:
            wanted.setdefault(self.files[name], []).append(name)
        for path, group in wanted.items():
            with _open(path) as shard:
                for name in group:
                    yield name, _tensor(shard, name, path)


def open_source(path: Path) -> WeightSource:
    """List the tensors of a file or folder.

    Raises:
        CheckpointError: nothing is there, several weights are there, a file is torn, of another format, or needs its
            pickle executed, or a shard index does not fit its shards.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; name a weight file or the folder it lies in")
    if path.is_file():
        return _gather(path, [path])
    index = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.bin.index.json"))
    if len(index) == 1:
        return _sharded(path, index[0])
    weights = sorted(path.glob("*.safetensors")) or [p for p in sorted(path.iterdir()) if p.suffix in TORCH_SUFFIXES]
    if index or len(weights) != 1:
        names = [p.name for p in index or weights]
        raise CheckpointError(
            f"{path} holds {len(names)} weight files or indexes {names[:5]}; name the file to read, not the folder"
        )
    return _gather(path, weights)


def locate(name: str) -> Path:
    """A path that exists, or a hub name: ``owner/model`` (safetensors folder) or ``owner/model/file``.

    Raises :class:`CheckpointError` when neither is there; without a network only the hub's cache is looked into.
    """
    path = Path(name)
    parts = name.split("/")
    mistyped = len(parts) == 2 and path.suffix in {".safetensors", *TORCH_SUFFIXES}
    if path.exists() or len(parts) < 2 or not all(parts) or parts[0] in {".", "..", "~"} or mistyped:
        return path
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository = "/".join(parts[:2])
    try:
        if len(parts) > 2:
            return Path(hf_hub_download(repository, "/".join(parts[2:])))
        return Path(snapshot_download(repository, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name} is no file here, and the model hub cannot give it ({type(error).__name__}: {error}); copy the "
            "weights to this machine and name their path"
        ) from error


# --- inside -----------------------------------------------------------------------------------------------------------


def _gather(path: Path, files: list[Path]) -> WeightSource:
    tensors: dict[str, TensorInfo] = {}
    places: dict[str, Path] = {}
    ignored: list[str] = []
    for file in files:
        with _open(file) as shard:
            infos = shard.infos()
            twice = sorted(set(infos) & set(tensors))
            if twice:
                raise CheckpointError(f"{twice[0]!r} is in {places[twice[0]]} and in {file}; keep one of the files")
            tensors |= infos
            places |= dict.fromkeys(infos, file)
            ignored += shard.ignored()
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; name a file with weights")
    return WeightSource(path, tensors, places, tuple(ignored))


def _sharded(folder: Path, index: Path) -> WeightSource:
    remedy = "download the folder again as a whole"
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(listed.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no shard index ({error!r}); {remedy}") from error
    files = [folder / str(name) for name in names]
    for file in files:
        if file.name not in names or not file.is_file():
            raise CheckpointError(f"{index} names the shard {file}, which is not in its folder; {remedy}")
    source = _gather(folder, files)
    odd = sorted(name for name in {*listed, *source.tensors} if source.files.get(name) != folder / listed.get(name, ""))
    if odd:
        raise CheckpointError(f"{len(odd)} weights are not where {index} says, first {odd[0]!r}; {remedy}")
    return source


@contextmanager
def _open(path: Path) -> Iterator[_Shard]:
    with ExitStack() as stack:
        if path.suffix == ".safetensors":
            try:
                file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                raise _damaged(path, error) from error
            yield _SafetensorsShard(file)
        elif path.suffix in TORCH_SUFFIXES:
            yield _TorchShard(path, _load(path))
        else:
            raise CheckpointError(
                f"{path} is neither .safetensors nor {', '.join(sorted(TORCH_SUFFIXES))}; convert it with the program "
                "that wrote it"
            )


def _tensor(shard: _Shard, name: str, path: Path) -> Tensor:
    try:
        return shard.tensor(name)
    except (SafetensorError, RuntimeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is torn or of another format ({error}); download it again")


class _SafetensorsShard:
    def __init__(self, file: Any) -> None:
        self._file = file

    def infos(self) -> dict[str, TensorInfo]:
        found = {}
        for name in self._file.keys():  # noqa: SIM118 - safe_open is not a mapping
            entry = self._file.get_slice(name)
            found[name] = TensorInfo(tuple(entry.get_shape()), entry.get_dtype().startswith(("F", "BF")))
        return found

    def ignored(self) -> tuple[str, ...]:
        return ()

    def tensor(self, name: str) -> Tensor:
        return self._file.get_tensor(name)


class _TorchShard:
    def __init__(self, path: Path, content: Any) -> None:
        state = content
        if isinstance(content, Mapping):
            state = next((content[key] for key in CONTAINERS if isinstance(content.get(key), Mapping)), content)
        if not isinstance(state, Mapping):
            raise CheckpointError(f"{path} holds {type(state).__name__}, not named tensors; save model.state_dict()")
        strange = [name for name, value in state.items() if not isinstance(value, Tensor) or not isinstance(name, str)]
        if strange:
            raise CheckpointError(
                f"{path} holds {strange[0]!r} of type {type(state[strange[0]]).__name__} among the tensors; save "
                "model.state_dict() alone or under 'model'"
            )
        self._state: Mapping[str, Tensor] = state
        self._ignored = tuple(str(key) for key in content if content is not state and content[key] is not state)

    def infos(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(tuple(t.shape), t.is_floating_point()) for name, t in self._state.items()}

    def ignored(self) -> tuple[str, ...]:
        return self._ignored

    def tensor(self, name: str) -> Tensor:
        return self._state[name]


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(4)
    if not start.startswith((_ZIP, _PICKLE)):
        raise CheckpointError(f"{path} was not written by torch.save; download it again or name another file")
    try:
        with torch.serialization.safe_globals(_HARMLESS_CLASSES):
            return torch.load(path, map_location="cpu", mmap=start == _ZIP, weights_only=True)
    except UnpicklingError as error:
        lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unpickler" in line]
        reason = lines[0].split(". Please")[0] if lines else type(error).__name__
        raise CheckpointError(
            f"{path} is torn, or holds more than tensors and may run code when it is loaded ({reason}); it is refused. "
            "Get it as safetensors, or save model.state_dict() alone where you trust it"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, StructError) as error:
        raise _damaged(path, error) from error
