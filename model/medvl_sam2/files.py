"""Files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as hex, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def package_sha256() -> str:
    """SHA-256 over the source of this package: of what is kept it tells whether other code made it."""
    here = Path(__file__).parent
    sources = [(str(path.relative_to(here)), file_sha256(path)) for path in sorted(here.rglob("*.py"))]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


@contextmanager
def atomic_writer(path: Path, sync_folder: bool = True) -> Iterator[BinaryIO]:
    """A file to write that takes the place of ``path`` when the block ends, on disk before the old content goes.

    After an exception in the block ``path`` is as it was. Without ``sync_folder`` the old content, whole, may come back
    when the machine loses power soon after.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    if sync_folder:
        sync_path(path.parent)


def write_json_atomically(path: Path, data: Any, sync_folder: bool = True) -> None:
    """Replace ``path`` by ``data`` as JSON in one step, as :func:`atomic_writer` does."""
    with atomic_writer(path, sync_folder) as file:
        file.write(f"{json.dumps(data, indent=2)}\n".encode())


def sync_path(path: Path) -> None:
    """Flush a file, or the names in a directory, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
