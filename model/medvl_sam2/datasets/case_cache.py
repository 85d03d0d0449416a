"""Cases once read, kept on disk within a budget of bytes.

Concurrency: any number of processes may share a folder. Files are written and removed only under the folder's lock, one
process at a time, so the budget holds at every moment; they are read without it. A file that is being read may be
removed meanwhile (the open file stays whole); a torn one counts as absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import zipfile
from pathlib import Path

import numpy as np
from filelock import FileLock

from medvl_sam2.datasets.json_records import to_plain
from medvl_sam2.datasets.label_layers import LabelLayers
from medvl_sam2.datasets.manifest import CaseRecord
from medvl_sam2.datasets.volumes import LoadedCase, read_case
from medvl_sam2.errors import ConfigError, DataError
from medvl_sam2.types import Geometry, Volume

logger = logging.getLogger(__name__)

_FORMAT = 1
_TEMPORARY = ".writing"
_TORN = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile)


class CaseCache:
    """Reads cases through a folder of at most ``max_bytes``; those not used for longest go first."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Make the folder.

        Raises :class:`ConfigError` for a budget that holds nothing, :class:`DataError` for an impossible folder.
        """
        if max_bytes < 1:
            raise ConfigError(
                f"cache budget {max_bytes} must be a positive number of bytes; leave the cache out instead"
            )
        self.folder, self.max_bytes = Path(folder), max_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cache folder {folder} cannot be made ({error}); name another one") from error

    def read(self, record: CaseRecord, root: Path) -> LoadedCase:
        """The case, from the cache where its files are unchanged since. Raises as :func:`read_case`."""
        path = self.folder / f"{_key(record, root)}.npz"
        case = _load(path, record, root)
        if case is None:
            case = read_case(record, root)
            try:
                self._store(path, case)
            except OSError as error:
                logger.warning("cache %s cannot be written (%s); going on without it", self.folder, error)
        return case

    def _store(self, path: Path, case: LoadedCase) -> None:
        arrays = {
            "image": case.volume.array,
            "affine": case.volume.geometry.affine,
            "sides_known": np.array(case.sides_known),
        }
        if case.labels is not None:
            arrays |= {"maps": case.labels.maps, "present": np.array(case.labels.present, dtype=np.str_)}
        size = sum(array.nbytes + 1024 for array in arrays.values())  # the zip's own headers need less
        if size > self.max_bytes:
            return
        with FileLock(self.folder / ".lock"):
            self._make_room(size)
            temporary = path.with_name(path.name + _TEMPORARY)
            with temporary.open("wb") as file:
                np.savez(file, **arrays)
            os.replace(temporary, path)

    def _make_room(self, size: int) -> None:
        """Remove what a killed writer left, then the longest unused files, until ``size`` more bytes fit."""
        for stale in self.folder.glob(f"*{_TEMPORARY}"):
            stale.unlink()
        files = [(path.stat(), path) for path in self.folder.glob("*.npz")]
        total = sum(stat.st_size for stat, _ in files)
        for stat, path in sorted(files, key=lambda item: item[0].st_mtime_ns):
            if total + size <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= stat.st_size


def _load(path: Path, record: CaseRecord, root: Path) -> LoadedCase | None:
    try:
        with contextlib.suppress(OSError):  # a cache that may only be read: EACCES, EPERM or EROFS
            os.utime(path)  # when it was last used
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        geometry = Geometry(arrays["image"].shape, arrays["affine"])
        volume = Volume(arrays["image"], geometry, record.modality, Path(root) / record.image.path)
        labels = None
        if record.labels:
            labels = LabelLayers(arrays["maps"], record.label_names, tuple(arrays["present"].tolist()))
        return LoadedCase(record, volume, labels, bool(arrays["sides_known"]))
    except _TORN:  # absent, or torn: then the next store replaces it, under the lock
        return None


def _key(record: CaseRecord, root: Path) -> str:
    """Digest of what the record says of files, and of the size and time of every one of them."""
    paths = [Path(root) / path for path in (record.image.path, *(file.path for file in record.labels))]
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path]) if file.exists()]
    parts = [
        _FORMAT,
        record.modality,
        to_plain(record.image),
        [to_plain(file) for file in record.labels],
        [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]
