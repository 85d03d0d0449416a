"""The versions of labels as files, whole at every moment.

``labels/version_N/<image>.nii.gz`` is a mask, as MONAI Label lays out the label with tag ``version_N``, and
``labels/version_N/<image>.json`` says what is known of it (:class:`LabelVersion`). Both together are the truth; MONAI
Label's index and the label ``final`` follow from them.

A mask is written under a hidden name and flushed to disk; then its record appears, then the mask by one rename: the
moment from which the version exists. Whatever moment a process is killed at, a mask that can be seen is whole and has
its record. A record without a mask and a hidden file nobody writes to are what was never acknowledged: they go at the
next start. All methods but :func:`stage` want the store's lock held.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lib.label_versions import LabelVersion, version_number, version_tag
from medvl_sam2.errors import DataError
from medvl_sam2.files import atomic_writer, sync_path

logger = logging.getLogger(__name__)

MASKS = (".nii.gz", ".nii", ".nrrd")
"""Extensions of label maps."""
STALE_S = 5.0
"""A hidden file younger than this may belong to a process that has not locked it yet, a placed mask to one that writes
it."""
MAX_WANTED = 10_000
"""Highest number that somebody else may choose, a client or a program that puts a mask under a version's tag."""
_LEFTOVER = re.compile(r"\..*(\.part|\.json\.\w{8})")


class VersionFiles:
    """The versions below ``labels``; what is deleted goes to ``trash``, a folder an image."""

    def __init__(self, labels: Path, trash: Path) -> None:
        self.labels, self.trash = labels, trash

    def numbers(self) -> list[int]:
        """Versions that any image has, lowest first."""
        names = os.listdir(self.labels) if self.labels.is_dir() else []
        return sorted(number for name in names if (number := version_number(name)) is not None)

    def record_path(self, image: str, number: int) -> Path:
        return self.labels / version_tag(number) / f"{image}.json"

    def mask_path(self, record: LabelVersion) -> Path:
        return self.labels / record.tag / f"{record.image}{record.extension}"

    def read(self, image: str, number: int) -> LabelVersion | None:
        """A version; None when there is none, only a record whose mask never came, or a mask with a damaged record."""
        try:
            record = LabelVersion.from_json(self.record_path(image, number).read_bytes())
        except FileNotFoundError:
            return None
        except DataError as error:
            logger.error("%s: %s", self.record_path(image, number), error)
            return None
        return record if self.mask_path(record).is_file() else None

    def versions(self, image: str) -> list[LabelVersion]:
        """All versions of an image, oldest first."""
        return list(self._newest_first(image))[::-1]

    def images(self, number: int) -> set[str]:
        """Images that have a mask of this version, with or without a record."""
        names = [name for name in os.listdir(self.labels / version_tag(number)) if not name.startswith(".")]
        return {name.removesuffix(known) for name in names for known in MASKS if name.endswith(known)}

    def newest(self, image: str, without: int | None = None) -> LabelVersion | None:
        """The highest version that is no draft, ``without`` one that is to go: the one ``final`` is a copy of."""
        newer = self._newest_first(image)
        return next((record for record in newer if not record.draft and record.version != without), None)

    def bare_mask(self, image: str, number: int) -> Path | None:
        """A mask under a version's tag without a readable record: another program put it there."""
        found = next(iter(masks_of(image, self.labels / version_tag(number))), None)
        return None if found is None or self.read(image, number) is not None else found

    def next_number(self, image: str, wanted: int | None = None) -> int:
        """A number above all there are: ``wanted`` where it is one, else above those that were deleted, too.

        Far up ``wanted`` is not followed, and a mask without a record counts for nothing, as all later versions would
        be numbered from there.
        """
        highest = next((number for number in reversed(self.numbers()) if self._taken(image, number)), 0)
        if wanted is not None and highest < wanted <= MAX_WANTED:
            return wanted
        folder = self.trash / image
        names = os.listdir(folder) if folder.is_dir() else []
        deleted = [version_number(name.split("-")[0]) or 0 for name in names]
        return max([highest, *deleted]) + 1

    def put(self, staged: Path, record: LabelVersion) -> Path:
        """Make a staged mask a version; on disk when this returns."""
        target = self.mask_path(record)
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True)
            sync_path(self.labels)
        self.write_record(record, sync_folder=False)  # the same folder is synced next, with both names
        os.replace(staged, target)
        sync_path(target.parent)
        return target

    def write_record(self, record: LabelVersion, sync_folder: bool = True) -> None:
        with atomic_writer(self.record_path(record.image, record.version), sync_folder) as file:
            file.write(record.to_json())

    def discard(self, image: str, tag: str, path: Path) -> Path:
        """Move a label, and its record when it has one, to the trash; return where the mask lies now."""
        folder = self.trash / image
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / f"{tag}-{time.time_ns()}"
        extension = next((e for e in MASKS if path.name.endswith(e)), path.suffix)
        mask = kept.with_name(f"{kept.name}{extension}")
        # The mask goes first: a record that stays behind is cleaned, a mask would be adopted as somebody else's.
        os.replace(path, mask)
        number = version_number(tag)
        record = self.record_path(image, number) if number is not None else None
        if record is not None and record.is_file():
            os.replace(record, kept.with_name(f"{kept.name}.json"))
        sync_path(folder)
        sync_path(path.parent)
        return mask

    def clean(self) -> None:
        """Remove what killed processes left behind, also where MONAI Label's index is written, and empty folders."""
        own = [self.labels / version_tag(number) for number in self.numbers()]
        for folder in [self.trash.parent, self.labels, *own]:
            for entry in list(os.scandir(folder)) if folder.is_dir() else ():
                if not entry.is_file(follow_symlinks=False):
                    continue
                path = Path(entry.path)
                orphan = folder in own and path.suffix == ".json" and not self._has_mask(path)
                if orphan or (_LEFTOVER.fullmatch(entry.name) and _abandoned(path)):
                    logger.info("Removing %s, left by a save that was never acknowledged", path)
                    path.unlink(missing_ok=True)
            if folder in own and not os.listdir(folder):
                folder.rmdir()

    def _newest_first(self, image: str) -> Iterator[LabelVersion]:
        """An image's versions, read one by one as they are asked for."""
        for number in reversed(self.numbers()):
            record = self.read(image, number)
            if record is not None:
                yield record

    def _taken(self, image: str, number: int) -> bool:
        folder = self.labels / version_tag(number)
        masks = MASKS if number <= MAX_WANTED else ()
        return any((folder / f"{image}{extension}").exists() for extension in (".json", *masks))

    def _has_mask(self, record: Path) -> bool:
        return any(record.with_name(f"{record.name.removesuffix('.json')}{extension}").exists() for extension in MASKS)


def masks_of(image: str, folder: Path) -> list[Path]:
    """The masks of an image in a folder, at most one of each extension."""
    return [path for extension in MASKS if (path := folder / f"{image}{extension}").is_file()]


def settles_in(changed: os.stat_result) -> float:
    """Seconds until a mask of another program that ``changed`` then counts as whole; 0 when it does.

    Before, that program may be writing it, and what it writes after the mask was taken over nobody would see.
    """
    return max(0.0, STALE_S - abs(time.time() - changed.st_mtime))


@contextmanager
def stage(source: Path, folder: Path) -> Iterator[Path]:
    """A copy of ``source`` under a hidden name in ``folder``, on disk and locked; removed unless it was renamed."""
    handle, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=folder)
    path = Path(name)
    try:
        with os.fdopen(handle, "wb") as file, open(source, "rb") as content:
            fcntl.flock(file, fcntl.LOCK_EX)
            shutil.copyfileobj(content, file, 1 << 20)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
            yield path
    finally:
        path.unlink(missing_ok=True)


def _abandoned(path: Path) -> bool:
    """Whether no process writes to a hidden file any more."""
    try:
        with open(path, "rb") as file:
            if time.time() - os.fstat(file.fileno()).st_mtime < STALE_S:
                return False
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:
        return False
