"""Label maps as DICOM SEG: one object a submit, one named and coded segment a structure.

Only frames that hold something are written, in binary; each refers to the image slice it lies on, which is how OHIF
places it. Reading SEGs, ours and others', is :mod:`lib.dicom_seg_reading`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from highdicom.content import AlgorithmIdentificationSequence
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
from highdicom.sr import CodedConcept
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from lib.dicom_codes import structure_code, structure_name
from lib.dicom_objects import (
    MANUFACTURER,
    MODEL_NAME,
    SERIAL_NUMBER,
    dated,
    long_string,
    object_uid,
    person_name,
    stamped,
)
from medvl_sam2.errors import DataError, GeometryError

_SERIES_NUMBER = 900
_MAX_DESCRIPTION = 1024


@dataclass(frozen=True)
class LabelOrigin:
    """Who made a label, how and when. ``model_version``: the model that proposed it, None for a label made by hand.

    ``made``, with a time zone: a label with it becomes an object with the same UIDs and times whenever it is built.
    """

    author: str
    model_version: str | None = None
    version: int | None = None
    note: str = ""
    made: datetime | None = None


def build_segmentation(
    headers: Sequence[Dataset], labels: np.ndarray, names: Mapping[int, str], origin: LabelOrigin
) -> Dataset:
    """A DICOM SEG of a label map.

    ``headers``: the image slices in stacking order (:func:`lib.dicom_objects.source_headers`). ``labels`` (I, J, K)
    whole numbers on their grid: column, row, slice. ``names``: what each value in use means; a value that is in
    ``names`` and in no voxel gets no segment, so names never move to other values.

    Raises:
        DataError: no voxel is labelled, or a value has no name.
        GeometryError: the labels are not on the slices' grid.
    """
    expected = (int(headers[0].Columns), int(headers[0].Rows), len(headers))
    if tuple(labels.shape) != expected:
        raise GeometryError(f"labels of shape {labels.shape} are not on the series' grid {expected}")
    used = [int(value) for value in np.unique(labels) if value]
    if not used:
        raise DataError("the label is empty, and a DICOM SEG needs a segment with at least one voxel")
    unnamed = [value for value in used if not names.get(value, "").strip()]
    if unnamed:
        raise DataError(f"mask value {unnamed[0]} has no name; submit the label with named segments")
    numbers = np.zeros(max(used) + 1, np.uint16)
    numbers[used] = np.arange(1, len(used) + 1)
    series = str(headers[0].SeriesInstanceUID)
    described = [_describe(number, names[value], series, origin) for number, value in enumerate(used, start=1)]
    try:
        return stamped(dated(_segmentation(headers, numbers[labels], described, origin), origin.made))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"the images' headers do not allow a DICOM SEG ({reason}); export the series again") from error


def _segmentation(
    headers: Sequence[Dataset], numbered: np.ndarray, described: Sequence[SegmentDescription], origin: LabelOrigin
) -> Segmentation:
    series_uid, instance_uid = (
        object_uid(kind, str(headers[0].SeriesInstanceUID), origin.version, origin.made, origin.author)
        for kind in ("series", "instance")
    )
    return Segmentation(
        source_images=headers,
        pixel_array=np.ascontiguousarray(numbered.transpose(2, 1, 0)),
        segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=described,
        series_instance_uid=series_uid,
        series_number=_SERIES_NUMBER,
        sop_instance_uid=instance_uid,
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=MODEL_NAME,
        software_versions=origin.model_version or "none",
        device_serial_number=SERIAL_NUMBER,
        content_label="SEGMENTATION",
        content_description=_description(origin),
        content_creator_name=person_name(origin.author),
        series_description=_description(origin, with_note=False),
        omit_empty_frames=True,
    )


def _describe(number: int, name: str, series: str, origin: LabelOrigin) -> SegmentDescription:
    code = structure_code(name)
    kind = CodedConcept.from_code(code.kind)
    if code.side is not None:
        kind.SegmentedPropertyTypeModifierCodeSequence = [CodedConcept.from_code(code.side)]
    algorithm = None
    if origin.model_version:
        algorithm = AlgorithmIdentificationSequence(
            name=MANUFACTURER, family=codes.DCM.ArtificialIntelligence, version=long_string(origin.model_version)
        )
    item = SegmentDescription(
        segment_number=number,
        segment_label=long_string(name),
        segmented_property_category=code.category,
        segmented_property_type=kind,
        algorithm_type=SegmentAlgorithmTypeValues.SEMIAUTOMATIC if algorithm else SegmentAlgorithmTypeValues.MANUAL,
        algorithm_identification=algorithm,
        # The same structure of the same series keeps its identity from version to version.
        tracking_uid=generate_uid(entropy_srcs=[series, structure_name(name)]),
        tracking_id=structure_name(name),
    )
    item.SegmentDescription = " ".join(name.split())[:_MAX_DESCRIPTION]
    return item


def _description(origin: LabelOrigin, with_note: bool = True) -> str:
    version = f" version {origin.version}" if origin.version is not None else ""
    note = f": {origin.note}" if origin.note and with_note else ""
    return long_string(f"{MANUFACTURER} labels{version} by {origin.author}{note}")
