"""MONAI Label's datastores, made safe to write to.

What the stock ones do and these do not: accept any bytes as a label, let a tag name a folder outside the store,
overwrite a submitted label without a trace, drop the labels of an image that is sent again, and what
:mod:`lib.indexed_store` says of the index. Labels are checked, copied and flushed to disk before the store's lock is
taken.
"""

from __future__ import annotations

import filecmp
import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fastapi import HTTPException
from monailabel.config import settings
from monailabel.datastore.local import DataModel, LocalDatastore
from monailabel.interfaces.datastore import DefaultLabelTag

from lib.dicom_attempt import Attempt
from lib.label_upload import CheckedLabel, check_label, is_raw
from lib.label_versions import (
    LabelVersion,
    Provenance,
    SavedLabel,
    is_draft,
    named_structures,
    now,
    text_of,
    version_number,
    version_tag,
    whole_review,
)
from lib.result_writing import file_called, http_errors
from lib.text_versions import TextVersion
from lib.version_files import masks_of, stage
from lib.versioned_store import FINAL, VersionedStore
from medvl_sam2.datasets.stored_texts import image_folder
from medvl_sam2.errors import PromptError
from medvl_sam2.files import file_sha256
from medvl_sam2.types import Geometry

logger = logging.getLogger(__name__)

GeometryOf = Callable[[Path], Geometry]

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,127}")
_MAX_PROMPTS = 1_000_000
"""Characters of the prompts kept with a label, as JSON."""
_OWN_FIELDS = ("prompts", "restored_from", "made_from", "note")
"""Sent with a label and kept in the version's record, not in MONAI Label's index."""


class KnownImage(NamedTuple):
    """What the store says of an image and, by tag, of its labels. Not to be changed."""

    info: Mapping[str, Any]
    labels: Mapping[str, Mapping[str, Any]]


class GuardedStore(VersionedStore):
    """Checks before writing, keeps every submitted label as a version, and re-reads the index before changing it."""

    def __init__(self, *args: Any, geometry_of: GeometryOf, **kwargs: Any) -> None:
        self._geometry_of = geometry_of
        self.provenance_of: Callable[[Path, str], Provenance] = lambda image, client: Provenance("", [])
        """What the server knows of a label by this client on this image."""
        super().__init__(*args, **kwargs)

    def may_have(self, image_id: str) -> bool:
        """Whether ``image_id`` is an image; nothing is fetched for it."""
        return bool(self.get_image_uri(image_id))

    def report_notes(self, image_id: str, texts: Sequence[TextVersion]) -> list[Attempt]:
        """What became of each text of an image as DICOM SR; a folder sends nothing."""
        return [Attempt(text.sr or {}) for text in texts]

    # --- labels -----------------------------------------------------------------------------------------------------

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: Any, *more: Any) -> SavedLabel:
        """Store a label after checking that it is one and lies on the image's grid.

        With the tag ``final`` or ``version_N`` it becomes a new version, whatever is there already; ``label_info`` may
        hold ``author``, ``note``, ``source``, ``client_id``, ``model_version``, ``prompts``, ``restored_from`` and
        ``made_from``, and learns the ``version``. With another tag it takes the place of what had the tag.

        Raises:
            HTTPException: 404 unknown image, 400 unsafe tag, 415 not a label map, 422 another grid.
        """
        tag, info = _plain(label_tag), label_info if isinstance(label_info, dict) else {}
        with http_errors(f"Saving the label of {image_id!r}"), ExitStack() as stack:
            _check_name("tag", tag)
            image = self._image_file(image_id)
            versioned = tag == FINAL or version_number(tag) is not None
            copies = 2 if versioned and not is_draft(info) else 1  # one becomes final
            with file_called(f"image {image_id!r}", image):
                geometry = self._geometry_of(image)
            checked, (staged, *copy) = self._staged(image_id, Path(label_filename), geometry, copies, stack)
            if not versioned:
                with self._writing():
                    self._replace_label(image_id, tag, staged, checked.extension, info)
                return SavedLabel(image_id, None)
            record = self._described(image_id, image, checked, tag, info)
            with self._writing():
                self._adopt(image_id, final_changes=not record.draft)
                number = self._files.next_number(image_id, version_number(tag))
                record = replace(record, version=number)
                path = self._files.put(staged, record)
                self._index_version(record, *copy)
                self._update_datastore_file(lock=False)
            info["version"] = number
            logger.info("Label of %s kept as %s by %r", image_id, record.tag, record.author)
            if not record.draft:
                self._publish(record, path)
        return SavedLabel(image_id, record)

    def _staged(
        self, image_id: str, file: Path, geometry: Geometry, copies: int, stack: ExitStack
    ) -> tuple[CheckedLabel, list[Path]]:
        """Check a label, and write copies of it to disk, which are gone when ``stack`` is closed.

        Both at once: the processor unpacks a file while the disk flushes it.
        """
        with ThreadPoolExecutor(1, "check-label") as beside:
            checking = beside.submit(check_label, image_id, file, geometry)
            if is_raw(file):  # it gets a file format first
                file = checking.result().file
                stack.callback(file.unlink, missing_ok=True)
            staged = [stack.enter_context(stage(file, self._files.labels)) for _ in range(copies)]
            return checking.result(), staged

    def _index_version(self, record: LabelVersion, copy: Path | None = None) -> None:
        """Let index and ``final`` follow a version that was added or changed; ``copy`` is a staged one of its mask."""
        labels = self._datastore.objects[record.image].labels
        labels[record.tag] = DataModel(info=record.index_info(), ext=record.extension)
        newest = self._files.newest(record.image)
        own = newest is not None and newest.version == record.version
        if own or self.final_version(record.image) == record.version:
            self._set_final(record.image, newest, copy if own else None)
        else:  # a draft, or older than what final holds
            self._order_tags(record.image)

    def _publish(self, record: LabelVersion, path: Path) -> None:
        added = self._label_stored(record, path)
        if added:
            self.update_label_info(record.image, record.tag, dict(added))

    def _label_stored(self, record: LabelVersion, path: Path) -> Mapping[str, Any]:
        """Called without a lock when a version that is no draft is kept; what it returns joins its info."""
        return {}

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        """Change what is kept with a label. ``final`` means the version it holds; a draft with another status counts.

        The Reviewer module sends the names of ``final`` along with its verdict on any version, so those of a version
        stay as they are.
        """
        tag = _plain(label_tag)
        with self._writing():
            number = version_number(tag) if tag != FINAL else self.final_version(label_id)
            record = None if number is None else self._files.read(label_id, number)
            if record is None:
                super().update_label_info(label_id, tag, info)
                return
            kept = info if tag == FINAL else {key: value for key, value in info.items() if key != "label_info"}
            was_draft = record.draft
            record = record.updated(kept)
            if was_draft and not record.draft:
                record = replace(record, submitted=now())
            if record.draft != was_draft:
                self._adopt(label_id, final_changes=True)
            self._files.write_record(record)
            if record.draft != was_draft:
                self._index_version(record)
            else:
                labels = self._datastore.objects[label_id].labels
                for same in (record.tag, *([FINAL] if self.final_version(label_id) == number else [])):
                    labels[same] = DataModel(info=record.index_info(), ext=record.extension)
            self._update_datastore_file(lock=False)
        if was_draft and not record.draft:
            self._publish(record, self._files.mask_path(record))

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Move a label to the trash. Without ``final`` the image counts as unlabelled, its versions stay.

        When the newest version goes, ``final`` holds the one before.
        """
        tag = _plain(label_tag)
        with http_errors(f"Removing the label of {label_id!r}"), self._writing():
            known = self._datastore.label(label_id, tag) is not None
            if self._adopt(label_id, final_changes=True):
                self._update_datastore_file(lock=False)
            obj = self._datastore.objects.get(label_id)
            label = obj.labels.get(tag) if obj else None
            # A final that was not whole lies in the trash already. A mask far up may have become a version just now.
            if known and label is None and tag == FINAL:
                return
            if obj is None or label is None:
                raise HTTPException(404, f"image {label_id!r} has no label with tag {tag!r}")
            path = Path(self._datastore.label_path(tag)) / self._filename(label_id, label.ext)
            number, newest = version_number(tag), self._files.newest(label_id)
            if number is not None:
                # Before the version goes: a final that is no version's copy would be taken for a new label.
                self._set_final(label_id, self._files.newest(label_id, without=number))
            if tag == FINAL and newest is not None:
                self._files.write_record(replace(newest, withdrawn=True))
                path.unlink(missing_ok=True)
            elif path.is_file():
                logger.info("Label %s of %s lies in %s now", tag, label_id, self._files.discard(label_id, tag, path))
            del obj.labels[tag]
            self._update_datastore_file(lock=False)

    def _described(
        self, image_id: str, image: Path, checked: CheckedLabel, tag: str, info: Mapping[str, Any]
    ) -> LabelVersion:
        """The record of a label that is being saved, still without its number."""
        client, time_ = text_of(info, "client_id"), now()
        known = self.provenance_of(image, client)
        source = "slicer" if client else "inference" if "params" in info else "api"
        prompts = info["prompts"] if isinstance(info.get("prompts"), list) else known.prompts
        if len(json.dumps(prompts, default=str)) > _MAX_PROMPTS:
            raise PromptError(f"prompts have more than {_MAX_PROMPTS} characters; send fewer with a label")
        restored = info.get("restored_from")
        # As the version that is restored: a label without names gets none from the vocabulary.
        stated = info if restored is None else {"label_info": [{"name": ""}], **info}
        kept = {key: value for key, value in info.items() if key not in _OWN_FIELDS}
        kept["segmentationMeta"] = whole_review(info.get("segmentationMeta"), text_of(info, "note"), time_)
        return LabelVersion(
            image=image_id,
            version=0,
            extension=checked.extension,
            checksum=file_sha256(checked.file),
            time=time_,
            author=text_of(info, "author") or client,
            source=text_of(info, "source") or ("reviewer" if tag != FINAL else source),
            client_id=client,
            model_version=text_of(info, "model_version") or known.model_version,
            structures=named_structures(stated, checked.voxels),
            prompts=tuple(prompts),
            restored_from=restored if isinstance(restored, int) else None,
            made_from=_made_from(info.get("made_from")),
            info=kept,
        )

    def _replace_label(self, image_id: str, tag: str, staged: Path, extension: str, info: dict[str, Any]) -> None:
        """Store a label that is no version; what had its tag goes to the trash."""
        obj = self._datastore.objects[image_id]
        old = obj.labels.get(tag)
        folder = Path(self._datastore.label_path(tag))
        folder.mkdir(parents=True, exist_ok=True)
        if old is not None and (path := folder / self._filename(image_id, old.ext)).is_file():
            self._files.discard(image_id, tag, path)
        name = self._filename(image_id, extension)
        os.replace(staged, folder / name)
        obj.labels[tag] = DataModel(info={**info, "ts": int(time.time()), "name": name}, ext=extension)
        self._order_tags(image_id)
        self._update_datastore_file(lock=False)

    # --- images -----------------------------------------------------------------------------------------------------

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Store an image; the same image again changes nothing, another one under a taken id is refused (409)."""
        with http_errors(f"Saving the image {image_id!r}"):
            if image_id:
                _check_name("image id", image_id)
            with self._writing():
                known = self._datastore.objects.get(image_id)
                path = Path(LocalDatastore.get_image_uri(self, image_id)) if known else None
                if path is None or not path.is_file():
                    return super().add_image(image_id, image_filename, image_info)
                if not filecmp.cmp(path, image_filename, shallow=False):
                    raise HTTPException(409, f"image {image_id!r} exists with other content; send it under another id")
                return image_id

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        with self._writing():
            super().update_image_info(image_id, info)

    def remove_image(self, image_id: str) -> None:
        """Delete an image; its labels go to the trash, also those that the index does not know."""
        with self._writing():
            self._adopt(image_id, thorough=True, settled=False)
            obj = self._datastore.objects.get(image_id)
            for tag, label in list(obj.labels.items()) if obj else ():
                path = Path(self._datastore.label_path(tag)) / self._filename(image_id, label.ext)
                if path.is_file():
                    self._files.discard(image_id, tag, path)
                del obj.labels[tag]
            for tag in (FINAL, *map(version_tag, self._files.numbers())):  # what could not be read was not taken over
                for path in masks_of(image_id, Path(self._datastore.label_path(tag))):
                    self._files.discard(image_id, tag, path)
            for kept, name in (
                (image_folder(self.folder, image_id), "texts"),
                (self.folder / ".history" / FINAL / image_id, "history"),
            ):
                if kept.is_dir():  # else another image that gets the id would inherit them
                    trash = self._files.trash / image_id
                    trash.mkdir(parents=True, exist_ok=True)
                    os.replace(kept, trash / f"{name}-{time.time_ns()}")
            super().remove_image(image_id)
            if self._auto_reload:  # MONAI Label leaves this to its watcher, where there is one
                self._reconcile_datastore()

    def json(self) -> dict[str, Any]:
        with self._thread_lock:  # not while another thread changes it
            index: dict[str, Any] = super().json()
            return index

    def known_images(self) -> dict[str, KnownImage]:
        """What is known of every image, by its id; from memory, or by one query for all."""
        with self._thread_lock:
            return {
                image: KnownImage(entry.image.info, {tag: label.info for tag, label in entry.labels.items()})
                for image, entry in self._datastore.objects.items()
            }


class GuardedLocalStore(GuardedStore):
    """A folder of images. Readers wait for the folder's watcher, which rebuilds the index in another thread."""

    def status(self) -> dict[str, Any]:
        with self._thread_lock:
            return super().status()

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        with self._thread_lock:
            return list(super().get_labeled_images(label_tag, labels))

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        with self._thread_lock:
            return list(super().get_unlabeled_images(label_tag, labels))

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        with self._thread_lock:
            return list(super().datalist(full_path))

    def get_image_uri(self, image_id: str) -> str:
        with self._thread_lock:
            return str(super().get_image_uri(image_id))


def open_local_store(folder: str, geometry_of: GeometryOf) -> GuardedLocalStore:
    """A store over a folder, with MONAI Label's settings."""
    return GuardedLocalStore(
        folder,
        geometry_of=geometry_of,
        extensions=settings.MONAI_LABEL_DATASTORE_FILE_EXT,
        auto_reload=settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
        read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
    )


def _check_name(what: str, name: str) -> None:
    if not _SAFE_NAME.fullmatch(name) or ".." in name:
        raise PromptError(f"{what} {name!r} is no plain name; use letters, digits, '.', '_', '-' and blanks")


def _made_from(numbers: Any) -> tuple[int, ...]:
    if numbers is None:
        return ()
    if not isinstance(numbers, list) or not all(type(one) is int and one > 0 for one in numbers):
        raise PromptError(f"made_from {numbers!r} must be a list of numbers of versions, as [1, 2]")
    return tuple(dict.fromkeys(numbers))


def _plain(tag: str) -> str:
    """A tag as text: MONAI Label's own calls give members of an enumeration, whose ``str`` is their Python name."""
    return tag.value if isinstance(tag, DefaultLabelTag) else str(tag)
