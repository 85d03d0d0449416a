"""A store of checkpoints that publishes them atomically.

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
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from medvl_sam2.checkpoint import (
    ALIGNMENT_FOLDER,
    CONFIG_FILE,
    META_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    carry_alignment,
    read_json,
    settle,
    verify_checkpoint,
    write_meta,
)
from medvl_sam2.errors import CheckpointError
from medvl_sam2.files import write_json_atomically

POINTER_FILE = "published.json"
SHIPPED_VERSION = 0
"""Version number that stands for the weights shipped with the package."""

_LOCK_TIMEOUT_S = 60.0


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
            carry_alignment(Path(checkpoint) / ALIGNMENT_FOLDER, staging)
            write_meta(staging, dataclasses.replace(meta, version=str(number)))
            verify_checkpoint(staging)
            settle(staging, versions / str(number))
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        _write_pointer(store, _Pointer(number, number, (*pointer.history, pointer.version)))
    return versions / str(number)


def published_version(store: Path) -> int:
    """Number of the served version; :data:`SHIPPED_VERSION` when nothing is published."""
    return _read_pointer(Path(store)).version


def publication_history(store: Path) -> tuple[int, ...]:
    """Numbers of the versions served so far, oldest first, the served one last; a rollback takes its origin out.

    Raises:
        CheckpointError: the pointer is damaged.
    """
    pointer = _read_pointer(Path(store))
    return (*pointer.history, pointer.version)


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
    data = read_json(path, "delete it to serve the shipped weights, or call rollback() with a version number")
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
