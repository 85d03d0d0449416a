"""A datastore that keeps every label as a version; ``final`` is a copy of the newest one that is no draft.

The versions on disk (:mod:`lib.version_files`) are the truth. ``final`` and the index, which MONAI Label, its clients
and the training read, follow from them: in the same step, or at the next start when a process was killed between.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from monailabel.datastore.local import DataModel
from monailabel.interfaces.datastore import DefaultLabelTag

from lib.indexed_store import IndexedStore
from lib.label_versions import (
    ADOPTED,
    LabelVersion,
    named_structures,
    names_in,
    stated_names,
    text_of,
    version_number,
    version_tag,
    whole_review,
)
from lib.request_parsing import UnknownImageError
from lib.result_writing import http_errors
from lib.version_files import MASKS, MAX_WANTED, VersionFiles, masks_of, settles_in, stage
from medvl_sam2.errors import VolumeError
from medvl_sam2.files import file_sha256
from medvl_sam2.volume_io import count_labels

logger = logging.getLogger(__name__)

FINAL = DefaultLabelTag.FINAL.value


class VersionedStore(IndexedStore):
    """Lists versions, and brings what else is in the store into line with them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._unsettled: set[str] = set()
        """Images with masks that another program may be writing; a timer runs while there are any."""
        super().__init__(*args, **kwargs)

    @property
    def _files(self) -> VersionFiles:
        return VersionFiles(Path(self._datastore.label_path(None)), self.folder / ".trash")

    def versions(self, image_id: str) -> list[LabelVersion]:
        """All versions of an image's label, oldest first; labels from before there were versions are made some.

        Raises:
            HTTPException: 404 unknown image.
        """
        with http_errors(f"Versions of {image_id!r}"):
            self._image_file(image_id)
            with self._writing():
                if self._adopt(image_id, thorough=True):
                    self._update_datastore_file(lock=False)
                return self._files.versions(image_id)

    def version(self, image_id: str, number: int) -> tuple[LabelVersion, Path]:
        """One version and its mask.

        Raises:
            HTTPException: 404 unknown image or version.
        """
        with http_errors(f"Version {number} of {image_id!r}"):
            self._image_file(image_id)
            found = self._files.read(image_id, number)
        if found is None:  # nobody may have looked at this image since there are versions
            found = next((record for record in self.versions(image_id) if record.version == number), None)
        if found is None:
            raise HTTPException(404, f"image {image_id!r} has no version {number}; GET /medvl/labels lists them")
        return found, self.mask_of(found)

    def mask_of(self, record: LabelVersion) -> Path:
        """Where a version's mask lies."""
        return self._files.mask_path(record)

    def final_version(self, image_id: str) -> int | None:
        """The version that ``final`` holds; None when there is no final label."""
        label = self._datastore.label(image_id, FINAL)
        number = label.info.get("version") if label else None
        return int(number) if number else None

    def status(self) -> dict[str, Any]:
        """Counts as before there were versions."""
        status: dict[str, Any] = super().status()
        status["label_tags"] = {t: n for t, n in status["label_tags"].items() if version_number(t) is None}
        return status

    def _reconcile_datastore(self) -> None:
        """Bring index, versions and files together: at start, and when files came or went."""
        with self._writing():
            super()._reconcile_datastore()
            self._files.clean()
            versions = [(image, number) for number in self._files.numbers() for image in self._files.images(number)]
            behind = {image for image, number in versions if self._unknown(image, number)}
            # A process may have been killed between what lay in final and the label that took its place.
            behind |= {image for image, _ in versions if self._datastore.label(image, FINAL) is None}
            if True in {self._adopt(image) for image in behind}:
                self._update_datastore_file(lock=False)

    def _set_final(self, image_id: str, newest: LabelVersion | None, copy: Path | None = None) -> None:
        """Let index and ``final`` follow the versions; ``newest`` is the highest of them that is no draft.

        ``copy``: a staged file with its content, which becomes ``final``; without one it is made here.
        """
        obj = self._datastore.objects[image_id]
        folder = Path(self._datastore.label_path(FINAL))
        if newest is not None:
            obj.labels[newest.tag] = DataModel(info=newest.index_info(), ext=newest.extension)
        if newest is None or newest.withdrawn:
            obj.labels.pop(FINAL, None)
            for extension in MASKS:
                (folder / f"{image_id}{extension}").unlink(missing_ok=True)
            self._order_tags(image_id)
            return
        source, target = self._files.mask_path(newest), folder / f"{image_id}{newest.extension}"
        # A copy, not a link: whoever writes into final in place must not reach the version.
        with nullcontext(copy) if copy is not None else stage(source, self._files.labels) as staged:
            stat = source.stat()
            os.utime(staged, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            os.replace(staged, target)
        for extension in MASKS:
            if extension != newest.extension:
                (folder / f"{image_id}{extension}").unlink(missing_ok=True)
        obj.labels[FINAL] = DataModel(info=newest.index_info(), ext=newest.extension)
        self._order_tags(image_id)

    def _order_tags(self, image_id: str) -> None:
        """Versions last, in their order: the Reviewer module counts on from the last tag."""
        labels = self._datastore.objects[image_id].labels
        ordered = sorted(labels.items(), key=lambda item: version_number(item[0]) or 0)
        labels.clear()
        labels.update(ordered)

    def _adopt(self, image_id: str, thorough: bool = False, settled: bool = True, final_changes: bool = False) -> bool:
        """Make versions of labels that are none yet, and let ``final`` follow; tell whether anything changed.

        These are copies earlier releases kept in ``.history``, files other programs put under a version's tag or into
        ``labels/final``, and versions whose saving was cut off between the version and ``final``. ``thorough``: every
        record is read, so that damaged ones are made anew. ``settled``: what may still be written to stays as it is
        until it settles (:meth:`_look_again`); with ``final_changes`` not what lies in ``labels/final``, as the caller
        is about to replace it: what is not sure to be whole there goes to the trash.
        """
        obj = self._datastore.objects.get(image_id)
        if obj is None:
            return False
        changed = self._adopt_history(image_id)
        changed |= self._adopt_placed(image_id, thorough, settled)
        strays = self._strays(image_id)
        foreign, displaced = self._foreign_finals(image_id, strays), final_changes or not settled
        wait = 0.0 if displaced else max((settles_in(strays[path]) for path in foreign), default=0.0)
        # One that cannot be read stays where it is, too, until a label takes its place.
        stays = not displaced and (wait > 0 or None in foreign.values())
        if wait:
            self._look_again(image_id, wait)
        elif foreign and not stays:
            self._adopt_finals(image_id, foreign, displaced)
            changed = True
        for number in self._files.numbers():
            record = self._files.read(image_id, number) if self._unknown(image_id, number) else None
            if record is not None:
                obj.labels[record.tag] = DataModel(info=record.index_info(), ext=record.extension)
                changed = True
        if stays:
            return changed
        newest = self._files.newest(image_id)
        if newest is not None and (changed or strays or (self.final_version(image_id) or 0) != newest.version):
            changed |= bool(strays) or not newest.withdrawn or FINAL in obj.labels
            self._set_final(image_id, newest)
        elif newest is None and strays:  # of a draft, as earlier releases made them
            changed = True
            self._set_final(image_id, None)
        return changed

    def _adopt_history(self, image_id: str) -> bool:
        """Make versions of the copies earlier releases kept; tell whether there were any."""
        history, changed = self.folder / ".history" / FINAL / image_id, False
        for path in sorted(history.iterdir()) if history.is_dir() else ():
            if not path.name.split(".")[0].isdigit() or not path.name.endswith(MASKS):
                continue
            saved = int(path.name.split(".")[0]) / 1e9
            self._take_over(image_id, path, self._files.next_number(image_id), {}, "history", saved)
            path.unlink()
            changed = True
        return changed

    def _adopt_placed(self, image_id: str, thorough: bool, settled: bool) -> bool:
        """Make versions of masks under a version's tag that have no record; tell whether there were any."""
        labels, changed = self._datastore.objects[image_id].labels, False
        for number in [n for n in self._files.numbers() if thorough or self._unknown(image_id, n)]:
            path = self._files.bare_mask(image_id, number)
            if path is None:
                continue
            with _unless_gone(path):
                stat = path.stat()
                if settled and (wait := settles_in(stat)):
                    self._look_again(image_id, wait)
                    continue
                checksum = _checksum_of(path)
                if checksum is None:
                    continue
                label = labels.get(version_tag(number))
                info = label.info if label else {}
                if number <= MAX_WANTED:
                    self._take_over(image_id, path, number, info, "found", stat.st_mtime)
                else:
                    self._adopt_far_up(image_id, path, number, info, checksum)
                    labels.pop(version_tag(number), None)
                changed = True
        return changed

    def _adopt_far_up(self, image_id: str, path: Path, number: int, info: Mapping[str, Any], checksum: str) -> None:
        """Make the next version of a mask placed far up, and move its file to the trash.

        No version is made of the label as it is, nor of a mask that a label overtook, submitted here or stored on the
        DICOM server while it waited: the next number would make it the newest. Other masks found here overtake none.
        """
        newest, stat = self._files.newest(image_id), path.stat()
        versions = reversed(self._files.versions(image_id))
        sent = next((version for version in versions if not version.draft and version.source not in ADOPTED), None)
        # An older version, in turn, was put back on purpose.
        known = newest is not None and not newest.withdrawn and newest.checksum == checksum
        counts_from = datetime.fromisoformat(sent.submitted or sent.time).timestamp() if sent is not None else 0.0
        overtaken = stat.st_ctime < counts_from  # when it was put there; copies may keep the time of their content
        if not known and not overtaken:
            self._take_over(image_id, path, self._files.next_number(image_id), info, "found", stat.st_mtime)
        kept = self._files.discard(image_id, f"placed_{number}", path)
        if not known and overtaken:
            logger.warning("%s was placed before the newest label of %s; it lies in %s", path, image_id, kept)

    def _adopt_finals(self, image_id: str, foreign: Mapping[Path, str | None], displaced: bool) -> None:
        """Make versions of what other programs put into ``labels/final``; ``foreign`` has their checksums.

        ``displaced``: another label takes their place now, and one that is not sure to be whole becomes no version.
        """
        label = self._datastore.label(image_id, FINAL)
        for path, checksum in foreign.items():
            with _unless_gone(path):
                stat = path.stat()
                whole = not displaced or (
                    checksum is not None and not settles_in(stat) and _voxels_of(path) is not None
                )
                if whole:
                    known = label is not None and path.name == self._filename(image_id, label.ext)
                    info = label.info if label is not None and known else {}
                    versions = reversed(self._files.versions(image_id))
                    old = next((version for version in versions if version.checksum == checksum), None)
                    if old is not None:
                        info = stated_names(old)
                    number = self._files.next_number(image_id)
                    self._take_over(image_id, path, number, info, "found", stat.st_mtime, old)
                if not whole or settles_in(path.stat()):  # what its writer adds lands in the trash, not in a lost file
                    kept = self._files.discard(image_id, FINAL, path)
                    logger.warning(
                        "%s may not have been whole when its place was taken; what was written lies in %s", path, kept
                    )

    def _foreign_finals(self, image_id: str, strays: dict[Path, os.stat_result]) -> dict[Path, str | None]:
        """Those of the ``strays`` that another program put there, oldest first, with their checksums.

        ``strays`` get the state after that was taken: a program may begin to write meanwhile.
        Their content is no version's, or that of an older one, which somebody put back; it has no checksum where this
        process may not read it. The store's own copy of an older one, left where a save was cut off, has the time of
        its mask as well.
        """
        versions = self._files.versions(image_id) if strays else []
        newest = self._files.newest(image_id) if strays else None
        found: dict[Path, str | None] = {}
        for path, stat in sorted(strays.items(), key=lambda stray: stray[1].st_mtime):
            with _unless_gone(path):
                checksum = _checksum_of(path)
                strays[path] = path.stat()
                same = [version for version in versions if version.checksum == checksum]
                if any(version.draft or (version == newest and not version.withdrawn) for version in same):
                    continue
                times = {self._files.mask_path(version).stat().st_mtime_ns: version for version in same}
                if stat.st_mtime_ns not in times:
                    found[path] = checksum
                    continue
                logger.warning(
                    "%s is %s with the time of its mask, as a save that was cut off leaves it: it is no newer label. "
                    "POST /medvl/labels/restore makes an older version the label again, and so does a copy with a new "
                    "time",
                    path,
                    times[stat.st_mtime_ns].tag,
                )
        return found

    def _strays(self, image_id: str) -> dict[Path, os.stat_result]:
        """Masks in ``labels/final`` that are not the copy of the newest version, by size and time, which come along."""
        finals, newest = masks_of(image_id, Path(self._datastore.label_path(FINAL))), self._files.newest(image_id)
        copied = None if newest is None else self._files.mask_path(newest).stat()
        strays = {}
        for path in finals:
            with suppress(FileNotFoundError):  # its program took it away again
                stat = path.stat()
                if copied is None or (stat.st_size, stat.st_mtime_ns) != (copied.st_size, copied.st_mtime_ns):
                    strays[path] = stat
        return strays

    def _look_again(self, image_id: str, wait: float) -> None:
        """Adopt the masks of an image in ``wait`` seconds, without a request. The store's lock is held."""
        if not self._unsettled:
            timer = threading.Timer(wait, self._adopt_settled)
            timer.daemon = True
            timer.start()
        self._unsettled.add(image_id)

    def _adopt_settled(self) -> None:
        with self._thread_lock:
            images, self._unsettled = self._unsettled, set()
        for image in sorted(images):
            try:
                with self._writing():  # nobody has to wait for all of them
                    if self._adopt(image, thorough=True):
                        self._update_datastore_file(lock=False)
            except Exception:  # the others do not wait for it
                logger.warning("Masks of %s wait until its versions are next listed", image, exc_info=True)

    def _unknown(self, image_id: str, number: int) -> bool:
        """Whether the index lacks a version, or its record was written after the index."""
        label = self._datastore.label(image_id, version_tag(number))
        if label is None or "checksum" not in label.info:
            return True
        try:
            written = self._files.record_path(image_id, number).stat().st_mtime_ns
        except FileNotFoundError:
            return True
        return not self._index_stamp or written > self._index_stamp[0]

    def _take_over(
        self,
        image_id: str,
        path: Path,
        number: int,
        info: Mapping[str, Any],
        source: str,
        saved: float,
        restored: LabelVersion | None = None,
    ) -> LabelVersion:
        """Make a version of a mask that lies in the store; what is not known of it stays empty.

        ``info``: what is kept with the label under its name. Where that is our record of another mask, which this one
        replaced, only the names of structures hold for it: nobody made, approved or published this one. ``restored``:
        the version whose content it has.
        """
        extension = next(known for known in MASKS if path.name.endswith(known))
        time_ = datetime.fromtimestamp(saved, UTC).isoformat(timespec="milliseconds")
        # Kept also when it cannot be read: it may be all that is left of somebody's work.
        voxels = _voxels_of(path) or {}
        with stage(path, self._files.labels) as staged:
            checksum = file_sha256(staged)  # of what is kept, whatever is written to the mask meanwhile
            if info.get("checksum", checksum) != checksum:
                info = names_in(info)
            client = text_of(info, "client_id")
            record = LabelVersion(
                image=image_id,
                version=number,
                extension=extension,
                checksum=checksum,
                time=time_,
                author=text_of(info, "author") or client,
                source=source,
                client_id=client,
                model_version=text_of(info, "model_version"),
                # Without names none are guessed from the vocabulary.
                structures=named_structures({"label_info": [{"name": ""}], **info}, voxels),
                restored_from=restored.version if restored is not None else None,
                info={**info, "segmentationMeta": whole_review(info.get("segmentationMeta"), "", time_)},
            )
            self._files.put(staged, record)
        return record

    def _image_file(self, image_id: str) -> Path:
        image = self.get_image_uri(image_id)
        if not image:
            raise UnknownImageError(f"image {image_id!r} is not in the datastore")
        return Path(image)


@contextmanager
def _unless_gone(path: Path) -> Iterator[None]:
    """Leave the block when another program takes its file away again."""
    try:
        yield
    except FileNotFoundError:
        if path.exists():
            raise


def _checksum_of(path: Path) -> str | None:
    """SHA-256 of a file; None, and a warning, for one that this process may not or cannot read.

    Raises:
        FileNotFoundError: it is gone.
    """
    try:
        return file_sha256(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        logger.warning("%s cannot be read, and becomes no version: %s", path, error)
        return None


def _voxels_of(mask: Path) -> Mapping[int, int] | None:
    """Voxels of every value but 0; None, and a warning, for a mask that cannot be read."""
    try:
        return count_labels(mask)[0]
    except VolumeError as error:
        logger.warning("%s cannot be read: %s", mask, error)
        return None
