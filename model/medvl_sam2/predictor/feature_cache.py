"""Encoded slices, shared by everybody who works on an image, within budgets of bytes.

Least recently used slices move down from the device to pinned memory (on CUDA only) and to files, and are dropped
behind the last tier; a slice that is asked for moves up again, bit for bit the same.

Concurrency: all methods may be called from any thread; one lock is held for each call. That an image is gone is noted
without the lock, by whichever thread the collector runs in, and acted on at the next call.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medvl_sam2.geometry import SliceCrop
from medvl_sam2.modeling.slice_segmenter import SliceFeatures

logger = logging.getLogger(__name__)

Key = tuple[int, SliceCrop, int]
"""Identity of a canonical image, window, slice."""


@dataclass(frozen=True)
class CacheConfig:
    """Budgets of the tiers; 0 leaves a tier out."""

    device_megabytes: float = 1024
    pinned_megabytes: float = 2048
    disk_megabytes: float = 0


class FeatureCache:
    """The three tiers; ``bytes`` gives what each holds."""

    def __init__(self, config: CacheConfig | None = None) -> None:
        config = config or CacheConfig()
        self._lock = threading.RLock()
        self._device = _Tier(config.device_megabytes)
        self._pinned = _PinnedTier(config.pinned_megabytes)
        self._disk = _DiskTier(config.disk_megabytes)
        self._images: dict[int, weakref.finalize] = {}
        self._gone: deque[int] = deque()

    @property
    def bytes(self) -> tuple[int, int, int]:
        """Bytes on the device, in pinned memory and in files."""
        return self._device.bytes, self._pinned.bytes, self._disk.bytes

    def get(self, image: np.ndarray, crop: SliceCrop, z: int) -> SliceFeatures | None:
        """Features (1 row) of slice ``z`` of a canonical ``image`` (Z, Y, X) in a window; None when not held."""
        with self._lock:
            key = self._key(image, crop, z)
            for tier in (self._device, self._pinned, self._disk):
                found = tier.take(key)
                if found is not None:
                    self._store(key, found)
                    return found
        return None

    def put(self, image: np.ndarray, crop: SliceCrop, z: int, features: SliceFeatures) -> None:
        """Hold the features (1 row) of a slice."""
        with self._lock:
            self._store(self._key(image, crop, z), features)

    def slices(self, image: np.ndarray, crop: SliceCrop) -> set[int]:
        """Slices of a window that are held."""
        with self._lock:
            self._drop_gone()
            tiers = (self._device, self._pinned, self._disk)
            return {z for tier in tiers for held, window, z in tier.entries if (held, window) == (id(image), crop)}

    def close(self) -> None:
        """Drop everything and remove the files."""
        with self._lock:
            for tier in (self._device, self._pinned, self._disk):
                tier.clear()
            for watched in self._images.values():
                watched.detach()
            self._images.clear()

    def _key(self, image: np.ndarray, crop: SliceCrop, z: int) -> Key:
        """The key of a slice."""
        self._drop_gone()
        if id(image) not in self._images:
            self._images[id(image)] = weakref.finalize(image, self._gone.append, id(image))
            self._images[id(image)].atexit = False
        return id(image), crop, z

    def _drop_gone(self) -> None:
        """Drop slices of images that are gone: their identity may be another's."""
        while self._gone:
            gone = self._gone.popleft()
            self._images.pop(gone, None)
            for tier in (self._device, self._pinned, self._disk):
                for key in [key for key in tier.entries if key[0] == gone]:
                    tier.remove(key)

    def _store(self, key: Key, features: SliceFeatures) -> None:
        down = self._device.put(key, features)
        for tier in (self._pinned, self._disk):
            if tier is self._disk or features.coarse.is_cuda:
                down = [lower for above, entry in down for lower in tier.put(above, entry)]


class _Tier:
    """Features as they are, least recently used first."""

    def __init__(self, megabytes: float) -> None:
        self.budget, self.bytes = int(megabytes * 1e6), 0
        self.entries: OrderedDict[Key, SliceFeatures] = OrderedDict()

    def put(self, key: Key, features: SliceFeatures) -> list[tuple[Key, SliceFeatures]]:
        """Take features in; returns what has to leave."""
        size = _bytes(features)
        if size > self.budget:
            return [(key, features)]
        self.remove(key)
        leaving = []
        while self.bytes + size > self.budget:
            oldest = next(iter(self.entries))
            taken = self.take(oldest)
            if taken is not None:
                leaving.append((oldest, taken))
        self.entries[key] = self.entering(key, features)
        self.bytes += size
        return leaving

    def take(self, key: Key) -> SliceFeatures | None:
        """Features as they were put in, which leave the tier; None where they are not there or were lost."""
        if key not in self.entries:
            return None
        features = self.leaving(key, self.entries[key])
        self.remove(key)
        return features

    def remove(self, key: Key) -> None:
        """Drop an entry, if it is there."""
        entry = self.entries.pop(key, None)
        if entry is not None:
            self.bytes -= _bytes(entry)
            self.dropped(key)

    def clear(self) -> None:
        """Drop everything."""
        for key in list(self.entries):
            self.remove(key)

    def entering(self, key: Key, features: SliceFeatures) -> SliceFeatures:
        """What is held for features put in: rows of a batch by themselves, as they would hold all of it."""
        return _each(features, lambda part: part if part.untyped_storage().nbytes() == part.nbytes else part.clone())

    def leaving(self, key: Key, held: SliceFeatures) -> SliceFeatures | None:
        """The features that were put in, or None where they were lost."""
        return held

    def dropped(self, key: Key) -> None:
        """Clean up after an entry."""


class _PinnedTier(_Tier):
    """Page-locked memory, from which a GPU reads fastest."""

    def entering(self, key: Key, features: SliceFeatures) -> SliceFeatures:
        return _each(features, lambda part: part.cpu().pin_memory())

    def leaving(self, key: Key, held: SliceFeatures) -> SliceFeatures:
        return _each(held, lambda part: part.to(held.position.device))


class _DiskTier(_Tier):
    """Raw files in a temporary folder, mapped into memory while they are read."""

    def __init__(self, megabytes: float) -> None:
        super().__init__(megabytes)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files: dict[Key, Path] = {}
        self._count = 0

    def entering(self, key: Key, features: SliceFeatures) -> SliceFeatures:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="medvl-sam2-slices-")
        self._count += 1
        path = self._files[key] = Path(self._folder.name) / f"{self._count}.raw"
        try:
            path.parent.mkdir(exist_ok=True)
            with open(path, "wb") as file:
                for part in (features.fine, features.middle, features.coarse):
                    part.cpu().contiguous().view(torch.uint8).numpy().tofile(file)
        except OSError:
            logger.warning("Slice %d cannot be put into a file; it is encoded anew when it is wanted", key[2])
        return _each(features, lambda part: torch.empty(part.shape, dtype=part.dtype, device="meta"))

    def leaving(self, key: Key, held: SliceFeatures) -> SliceFeatures | None:
        """What the file has; a clean-up of temporary files may have taken it or a full disk cut it off."""
        try:
            content, start = np.memmap(self._files[key], mode="r"), 0
        except (OSError, ValueError):  # missing, or empty
            return None
        if content.nbytes != _bytes(held):
            return None
        parts = []
        for part in (held.fine, held.middle, held.coarse):
            raw = torch.from_numpy(np.array(content[start : start + part.nbytes]))
            parts.append(raw.view(part.dtype).reshape(part.shape).to(held.position.device))
            start += part.nbytes
        return SliceFeatures(parts[0], parts[1], parts[2], held.position)

    def dropped(self, key: Key) -> None:
        self._files.pop(key).unlink(missing_ok=True)

    def clear(self) -> None:
        super().clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _bytes(features: SliceFeatures) -> int:
    """Bytes of one slice; the position code is the same for all and not counted."""
    return features.fine.nbytes + features.middle.nbytes + features.coarse.nbytes


def _each(features: SliceFeatures, change: Callable[[Tensor], Tensor]) -> SliceFeatures:
    """Features with the parts that differ from slice to slice changed."""
    return replace(features, fine=change(features.fine), middle=change(features.middle), coarse=change(features.coarse))
