"""Checkpoint directories, and a store that publishes them atomically.

A checkpoint is a directory of four files: ``model.safetensors`` (floating parameters as fp16), ``config.json``,
``tokenizer.json`` and ``meta.json`` (provenance and the SHA-256 of the weights). Nothing is ever unpickled.

A checkpoint may carry a folder ``alignment``: the image-text model of the alignment stage, in the same four files.

A store is a directory::

    store/versions/<n>/     immutable checkpoint directories, n = 1, 2, ...
    store/published.json    which version is served; 0 means the weights shipped with the package
    store/publish.lock      held by whoever publishes or rolls back

Concurrency: writers take ``publish.lock``; readers take no lock. A version directory is complete and on disk before
it gets its final name, and the pointer is replaced in one step after that, so a reader sees the old or the new model,
never a torn one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from medvl_sam2.config import ModelConfig
from medvl_sam2.errors import CheckpointError, ConfigError
from medvl_sam2.files import file_sha256, sync_path, write_json_atomically

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
META_FILE = "meta.json"
POINTER_FILE = "published.json"
ALIGNMENT_FOLDER = "alignment"
SHIPPED_VERSION = 0
"""Version number that stands for the weights shipped with the package."""

_FP16_MAX = torch.finfo(torch.float16).max
_LOCK_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class CheckpointMeta:
    """Where weights come from. ``version`` is ``"<n>"`` once published; ``parent`` the version they grew from."""

    name: str
    version: str
    notice: str
    """Plain words on what the weights were trained on; shown with every text answer."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    parent: str | None = None
    created: str = ""
    """UTC, ISO 8601; filled in when saved."""
    sha256: str = ""
    """Of ``model.safetensors``; filled in when saved."""


class Checkpoint(NamedTuple):
    """What :func:`load_checkpoint` returns: fp32 CPU ``state`` by parameter name, and all that belongs to it."""

    state: dict[str, torch.Tensor]
    config: ModelConfig
    tokenizer_path: Path
    meta: CheckpointMeta


def shipped_checkpoint(name: str = "demo") -> Path:
    """Directory of the weights shipped with the package; :class:`CheckpointError` when they are not there."""
    path = Path(__file__).parent / "weights" / name
    if not (path / WEIGHTS_FILE).is_file():
        raise CheckpointError(f"the package ships no weights named {name!r}; reinstall it, or train a checkpoint first")
    return path


def save_checkpoint(
    directory: Path,
    model_state: Mapping[str, torch.Tensor],
    config: ModelConfig,
    tokenizer_path: Path,
    meta: CheckpointMeta,
    overwrite: bool = False,
    alignment: Path | None = None,
) -> CheckpointMeta:
    """Write a checkpoint directory that appears complete or not at all; return the meta as stored.

    Floating tensors are stored as fp16, others as they are; tensors that share memory (tied weights) are stored once.
    ``alignment``: checkpoint folder of an image-text model to carry along, where there is one.

    Raises:
        CheckpointError: ``directory`` exists and ``overwrite`` is off, the tokenizer is missing, or a weight is not
            finite or too large for fp16.
    """
    directory = Path(directory)
    if directory.exists() and not overwrite:
        raise CheckpointError(f"{directory} exists already; choose another directory or pass overwrite=True")
    if not Path(tokenizer_path).is_file():
        raise CheckpointError(f"tokenizer {tokenizer_path} is not a file; give the tokenizer.json the model uses")
    tensors, tied = _storable(model_state)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        save_file(tensors, staging / WEIGHTS_FILE, metadata={"format": "pt", "tied": json.dumps(tied)})
        (staging / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
        shutil.copyfile(tokenizer_path, staging / TOKENIZER_FILE)
        stored = dataclasses.replace(
            meta,
            created=meta.created or datetime.now(UTC).isoformat(timespec="seconds"),
            sha256=file_sha256(staging / WEIGHTS_FILE),
        )
        _write_meta(staging, stored)
        _carry_alignment(alignment, staging)
        _settle(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return stored


def read_meta(directory: Path) -> CheckpointMeta:
    """Read ``meta.json`` alone (cheap); :class:`CheckpointError` when missing or malformed."""
    path = Path(directory) / META_FILE
    data = _read_json(path, "restore the checkpoint directory from a copy, or train again")
    known = {f.name for f in dataclasses.fields(CheckpointMeta)}
    missing = {"name", "version", "notice", "sha256"} - set(data)
    unknown = set(data) - known
    if missing or unknown:
        wrong = f"lacks {sorted(missing)[0]!r}" if missing else f"has the unknown field {sorted(unknown)[0]!r}"
        raise CheckpointError(f"{path} {wrong}; it was written by another release: use that one or save again")
    return CheckpointMeta(**data)


def verify_checkpoint(directory: Path) -> CheckpointMeta:
    """Check that all four files are there and that the weights have the recorded SHA-256; return the meta."""
    directory = Path(directory)
    for name in (WEIGHTS_FILE, CONFIG_FILE, TOKENIZER_FILE, META_FILE):
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory} lacks {name}; a checkpoint is a directory with all four files")
    meta = read_meta(directory)
    actual = file_sha256(directory / WEIGHTS_FILE)
    if actual != meta.sha256:
        raise CheckpointError(
            f"{directory / WEIGHTS_FILE} has SHA-256 {actual[:12]}..., meta.json says {meta.sha256[:12]}...: "
            "the file is damaged or was replaced; copy the directory again as a whole"
        )
    return meta


def load_checkpoint(directory: Path) -> Checkpoint:
    """Read and verify a checkpoint directory. Floating tensors come back as fp32 on the CPU.

    Raises:
        CheckpointError: a file is missing, torn, damaged, or not of this format.
    """
    directory = Path(directory)
    meta = verify_checkpoint(directory)
    try:
        config = ModelConfig.from_json((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (ConfigError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{directory / CONFIG_FILE} does not fit this release: {error}") from error
    state: dict[str, torch.Tensor] = {}
    try:
        with safe_open(directory / WEIGHTS_FILE, framework="pt", device="cpu") as file:
            tied: dict[str, str] = json.loads((file.metadata() or {}).get("tied", "{}"))
            for key in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                tensor = file.get_tensor(key)
                state[key] = tensor.float() if tensor.is_floating_point() else tensor
        for alias, source in tied.items():
            state[alias] = state[source]
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{directory / WEIGHTS_FILE} is no safetensors file of this project: {error}") from error
    return Checkpoint(state, config, directory / TOKENIZER_FILE, meta)


def load_into(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copy ``state`` into ``module``; every key and shape must match.

    Raises:
        CheckpointError: names the first missing and the first unused key, or the first shape that differs.
    """
    own = module.state_dict()
    missing = sorted(set(own) - set(state))
    unused = sorted(set(state) - set(own))
    if missing or unused:
        parts = []
        if missing:
            parts.append(f"{len(missing)} weights are missing, first {missing[0]!r}")
        if unused:
            parts.append(f"{len(unused)} weights are unused, first {unused[0]!r}")
        raise CheckpointError(
            f"checkpoint does not fit the model: {'; '.join(parts)}. Build the model from the config.json beside the "
            "weights, or convert the checkpoint"
        )
    for key in sorted(own):
        if own[key].shape != state[key].shape:
            raise CheckpointError(
                f"weight {key!r} has shape {tuple(state[key].shape)}, the model wants {tuple(own[key].shape)}; "
                "build the model from the config.json beside the weights"
            )
    module.load_state_dict(dict(state), strict=True)


# --- store -----------------------------------------------------------------------------------------------------------


def publish(store: Path, checkpoint: Path, *, expected_version: int | None = None) -> Path:
    """Copy ``checkpoint`` into ``store`` as its next version and serve it; return the version's directory.

    ``expected_version``: refuse when another version is served by now, because then the comparison that justified
    this publication was made against a model nobody uses any more. None skips that check.

    Raises:
        CheckpointError: the checkpoint is damaged, the served version changed, or another writer holds the lock.
    """
    store = Path(store)
    with _writer_lock(store):
        pointer = _read_pointer(store)
        if expected_version is not None and pointer.version != expected_version:
            raise CheckpointError(
                f"version {pointer.version} is served by now, but this checkpoint was compared with version "
                f"{expected_version}; compare again before publishing"
            )
        meta = verify_checkpoint(checkpoint)
        versions = store / "versions"
        versions.mkdir(exist_ok=True)
        number = max([pointer.last, *_version_numbers(versions)]) + 1
        staging = Path(tempfile.mkdtemp(prefix=".publish.", dir=versions))
        try:
            for name in (WEIGHTS_FILE, CONFIG_FILE, TOKENIZER_FILE):
                shutil.copyfile(Path(checkpoint) / name, staging / name)
            _carry_alignment(Path(checkpoint) / ALIGNMENT_FOLDER, staging)
            _write_meta(staging, dataclasses.replace(meta, version=str(number)))
            verify_checkpoint(staging)
            _settle(staging, versions / str(number))
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        _write_pointer(store, _Pointer(number, number, (*pointer.history, pointer.version)))
    return versions / str(number)


def published_version(store: Path) -> int:
    """Number of the served version; :data:`SHIPPED_VERSION` when nothing is published."""
    return _read_pointer(Path(store)).version


def read_published(store: Path) -> Path | None:
    """Directory of the served version, or None when the shipped weights are served.

    Raises:
        CheckpointError: the pointer is damaged or points at a version that is gone.
    """
    version = published_version(store)
    if version == SHIPPED_VERSION:
        return None
    path = Path(store) / "versions" / str(version)
    if not (path / META_FILE).is_file():
        raise CheckpointError(f"published version {version} is missing from {path}; restore it or call rollback()")
    return path


def rollback(store: Path, version: int | None = None) -> Path | None:
    """Serve an earlier version again (default: the one served before); return its directory, None for the shipped one.

    Versions stay on disk, so a rollback can itself be undone by naming the newer version.

    Raises:
        CheckpointError: there is nothing to go back to, or ``version`` is not in the store.
    """
    store = Path(store)
    with _writer_lock(store):
        pointer = _read_pointer(store)
        if version is None and not pointer.history:
            raise CheckpointError(f"version {pointer.version} is the first one served; there is none to roll back to")
        target = pointer.history[-1] if version is None else version
        if target != SHIPPED_VERSION:
            verify_checkpoint(store / "versions" / str(target))
        history = pointer.history[:-1] if version is None else (*pointer.history, pointer.version)
        _write_pointer(store, _Pointer(target, pointer.last, history))
    return read_published(store)


# --- inside -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pointer:
    version: int = SHIPPED_VERSION
    last: int = 0
    """Highest number ever given out: a number is never reused, even when its directory was deleted."""
    history: tuple[int, ...] = ()


def _read_pointer(store: Path) -> _Pointer:
    path = store / POINTER_FILE
    if not path.exists():
        return _Pointer()
    data = _read_json(path, "delete it to serve the shipped weights, or call rollback() with a version number")
    try:
        return _Pointer(int(data["version"]), int(data["last"]), tuple(int(n) for n in data["history"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no published pointer ({error!r}); delete it to serve the shipped weights"
        ) from error


def _write_pointer(store: Path, pointer: _Pointer) -> None:
    write_json_atomically(store / POINTER_FILE, dataclasses.asdict(pointer))


def _version_numbers(versions: Path) -> list[int]:
    return [int(path.name) for path in versions.iterdir() if path.name.isdigit()]


class _writer_lock:
    """Exclusive writer of a store; waits up to a minute."""

    def __init__(self, store: Path) -> None:
        store.mkdir(parents=True, exist_ok=True)
        self._store = store
        self._lock = FileLock(store / "publish.lock", timeout=_LOCK_TIMEOUT_S)

    def __enter__(self) -> None:
        try:
            self._lock.acquire()
        except Timeout as error:
            raise CheckpointError(
                f"another process has been publishing to {self._store} for {_LOCK_TIMEOUT_S:.0f} s; "
                "try again when it ends"
            ) from error

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _storable(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors to write, and alias -> stored name for those that are views of the same memory."""
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for key in sorted(state):
        tensor = state[key].detach()
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            tied[key] = seen[place]
            continue
        seen[place] = key
        if tensor.is_floating_point():
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"weight {key!r} is not finite; training diverged: lower the learning rate")
            if tensor.numel() and float(tensor.abs().max()) > _FP16_MAX:
                raise CheckpointError(f"weight {key!r} exceeds {_FP16_MAX:.0f} and does not fit fp16; rescale it")
            tensor = tensor.to(torch.float16)
        tensors[key] = tensor.cpu().contiguous().clone()
    return tensors, tied


def _carry_alignment(folder: Path | None, staging: Path) -> None:
    if folder is not None and folder.is_dir():
        verify_checkpoint(folder)
        shutil.copytree(folder, staging / ALIGNMENT_FOLDER)


def _write_meta(directory: Path, meta: CheckpointMeta) -> None:
    data = dataclasses.asdict(meta)
    data["metrics"] = dict(meta.metrics)
    (directory / META_FILE).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _settle(staging: Path, final: Path) -> None:
    """Flush ``staging`` to disk and give it its final name; an existing directory of that name is replaced."""
    os.chmod(staging, 0o755)
    for path in staging.rglob("*"):
        sync_path(path)
    sync_path(staging)
    if final.exists():
        # A non-empty directory cannot be replaced in one step: move it aside, and back again should the rename fail.
        aside = Path(tempfile.mkdtemp(prefix=f".{final.name}.old.", dir=final.parent)) / final.name
        os.rename(final, aside)
        try:
            os.rename(staging, final)
        except OSError:
            os.rename(aside, final)
            raise
        finally:
            shutil.rmtree(aside.parent, ignore_errors=True)
    else:
        os.rename(staging, final)
    sync_path(final.parent)


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {remedy}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {type(data).__name__}, not a JSON object; {remedy}")
    return data
