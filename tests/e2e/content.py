"""What the browser tests compare: masks, and what the DICOM server holds."""

from __future__ import annotations

import numpy as np
import pydicom

from e2e.conftest import Study
from medvl_sam2.vocabulary import CLASSES
from orthanc import Orthanc


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / max(1, a.sum() + b.sum()))


def organ(study: Study, name: str) -> np.ndarray:
    return study.organs == CLASSES.index(name) + 1


def middle(mask: np.ndarray) -> np.ndarray:
    """A voxel of the mask near its centre."""
    voxels = np.argwhere(mask)
    return voxels[np.square(voxels - voxels.mean(0)).sum(1).argmin()]


def newest(orthanc: Orthanc, modality: str) -> pydicom.Dataset:
    """The last stored object of a modality."""
    found = [item for series in orthanc.series(modality) for item in orthanc.instances(series)]
    return max(found, key=lambda item: (item.ContentDate, item.ContentTime))


def segments(seg: pydicom.Dataset, shape: tuple[int, ...], origin_z: float, spacing_z: float) -> dict[str, np.ndarray]:
    """Masks (I, J, K) of a DICOM SEG by label; the series' slices rise with k from ``origin_z``."""
    names = {int(item.SegmentNumber): str(item.SegmentLabel) for item in seg.SegmentSequence}
    masks = {name: np.zeros(shape, bool) for name in names.values()}
    for frame, pixels in zip(seg.PerFrameFunctionalGroupsSequence, seg.pixel_array, strict=True):
        name = names[int(frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber)]
        z = float(frame.PlanePositionSequence[0].ImagePositionPatient[2])
        masks[name][:, :, round((z - origin_z) / spacing_z)] |= pixels.T > 0
    return masks


def texts(item: pydicom.Dataset) -> str:
    """All texts of a structured report's content tree."""
    own = str(getattr(item, "TextValue", ""))
    return "\n".join([own, *(texts(child) for child in getattr(item, "ContentSequence", []))])
