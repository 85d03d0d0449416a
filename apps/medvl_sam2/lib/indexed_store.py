"""MONAI Label's local datastore with an index that survives: written whole, read anew, rebuilt when damaged.

Concurrency. One lock of all threads and processes (:meth:`IndexedStore._writing`) guards whatever is written to the
store; who has it has read the newest index. Readers take no lock: they see whole files, and an index that was current
when their process last wrote or saw it change.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from monailabel.datastore.local import LocalDatastore, LocalDatastoreModel

from medvl_sam2.files import atomic_writer

logger = logging.getLogger(__name__)


class IndexedStore(LocalDatastore):
    """Writes ``datastore_v2.json`` in one step under one lock of all processes.

    MONAI Label writes it in place, from memory that may be older than the file.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._thread_lock = threading.RLock()
        self._process_lock: FileLock | None = None
        self._index_stamp: tuple[int, ...] = ()
        super().__init__(*args, **kwargs)
        if hasattr(self, "_handler"):
            self._handler.on_moved = self._on_moved_event

    @property
    def folder(self) -> Path:
        """Where images and labels lie: the studies, or the cache of a DICOMweb server."""
        return Path(self._datastore_path)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer among all threads and processes, seeing the newest index. Nests.

        Not MONAI Label's own ``.lock``, which does not nest.
        """
        with self._thread_lock:
            if self._process_lock is None:
                self._process_lock = FileLock(str(self.folder / ".medvl.lock"), timeout=60)
            with self._process_lock:
                self._init_from_datastore_file()
                yield

    def refresh(self) -> None:
        with self._writing():
            super().refresh()

    def _init_from_datastore_file(self, throw_exception: bool = False) -> None:
        """Read the index when it changed; one that is damaged is put aside at start and made anew from the files."""
        path = Path(self._datastore_config_path)
        try:
            with open(path, "rb") as file:
                stamp = _stamp(file.fileno())
                if stamp == self._index_stamp:
                    return
                model = LocalDatastoreModel.model_validate_json(file.read())
        except FileNotFoundError:
            return
        except ValueError as error:
            logger.error("The index %s is damaged: %s", path, error)
            if throw_exception:
                path.rename(path.with_name(f"{path.name}.damaged-{time.time_ns()}"))
            return
        model.base_path = self._datastore_path
        self._datastore, self._index_stamp = model, stamp

    def _update_datastore_file(self, lock: bool = True) -> None:
        """Write the index whole or not at all; an older one that came back would be brought up to date at start."""
        with atomic_writer(Path(self._datastore_config_path), sync_folder=False) as file:
            file.write(self._datastore.model_dump_json(exclude={"base_path"}, indent=2, fallback=str).encode())
            file.flush()
            self._index_stamp = _stamp(file.fileno())

    def _on_modify_event(self, event: Any) -> None:
        with self._thread_lock:
            super()._on_modify_event(event)

    def _on_moved_event(self, event: Any) -> None:
        """Files renamed into place: an index another process wrote, or an image."""
        if event.dest_path == self._datastore_config_path:
            with self._thread_lock:
                self._init_from_datastore_file()
        elif Path(event.dest_path).parent == Path(self._datastore.image_path()):
            self.refresh()


def _stamp(handle: int) -> tuple[int, ...]:
    """What tells one state of a file from the next: every write makes another file."""
    stat = os.fstat(handle)
    return stat.st_mtime_ns, stat.st_ino, stat.st_size
