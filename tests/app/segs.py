"""DICOM SEGs as other programs write them, made from ours."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.pixel_data_handlers.numpy_handler import pack_bits


def reread(document: Dataset) -> Dataset:
    """What arrives after it was written and read."""
    buffer = BytesIO()
    document.save_as(buffer, write_like_original=False)
    buffer.seek(0)
    return pydicom.dcmread(buffer)


def planes(document: Dataset) -> np.ndarray:
    """All frames (N, rows, columns)."""
    return document.pixel_array.reshape(-1, document.Rows, document.Columns)


def with_frames(document: Dataset, order: Sequence[int], pixels: np.ndarray | None = None) -> Dataset:
    """Only these frames, in this order; ``pixels`` replace what they hold."""
    changed = reread(document)
    frames = planes(document)[list(order)] if pixels is None else pixels
    changed.PerFrameFunctionalGroupsSequence = [document.PerFrameFunctionalGroupsSequence[n] for n in order]
    changed.NumberOfFrames = len(order)
    changed.Rows, changed.Columns = frames.shape[1:]
    changed.PixelData = pack_bits(frames.astype(np.uint8).ravel())
    return reread(changed)


def renumbered(document: Dataset) -> Dataset:
    """Segments numbered alphabetically, as OHIF stores them."""
    changed = reread(document)
    ordered = sorted(changed.SegmentSequence, key=lambda item: str(item.SegmentLabel))
    number_of = {int(item.SegmentNumber): number for number, item in enumerate(ordered, start=1)}
    for item in ordered:
        item.SegmentNumber = number_of[int(item.SegmentNumber)]
    changed.SegmentSequence = ordered
    for frame in changed.PerFrameFunctionalGroupsSequence:
        group = frame.SegmentIdentificationSequence[0]
        group.ReferencedSegmentNumber = number_of[int(group.ReferencedSegmentNumber)]
    return reread(changed)
