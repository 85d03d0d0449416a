"""``GET /medvl/cases``: what there is to annotate, and how far it is."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import requests
from fastapi import APIRouter, HTTPException, Response
from monailabel.interfaces.datastore import DefaultLabelTag
from monailabel.interfaces.utils.app import app_instance
from pydantic import BaseModel, TypeAdapter

from lib.api.access import AsUser
from lib.label_versions import version_number

router = APIRouter(prefix="/medvl/cases", tags=["MedVL"])

_FINAL = DefaultLabelTag.FINAL.value
_SAID = (
    *("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "Modality", "StudyDate"),
    *("SeriesDescription", "SeriesNumber"),
)


class Case(BaseModel):
    """An image and its labels; texts are empty where the image's file, its headers and the DICOM server do not say."""

    image: str
    labelled: bool
    """Somebody submitted a label."""
    versions: int
    """Submitted versions that are kept."""
    tags: list[str]
    labelled_at: datetime | None
    """Of the label that counts (tag ``final``)."""
    PatientID: str
    StudyInstanceUID: str
    SeriesInstanceUID: str
    Modality: str
    StudyDate: str
    SeriesDescription: str
    SeriesNumber: str


_CASES = TypeAdapter(list[Case])


@router.get("", response_model=list[Case], summary="All cases, with what is labelled")
def cases(user: AsUser) -> Response:
    """Read from memory, or with one query to a DICOMweb server; never one query a case."""
    store = app_instance().datastore()
    try:
        known, labelled = store.known_images(), set(store.get_labeled_images())
    except requests.RequestException as error:
        raise HTTPException(502, f"the DICOMweb server does not answer ({type(error).__name__})") from error
    found = [_case(image, one.info, one.labels, labelled) for image, one in known.items()]
    return Response(_CASES.dump_json(found), media_type="application/json")


def _case(image: str, info: Mapping[str, Any], labels: Mapping[str, Mapping[str, Any]], labelled: set[str]) -> Case:
    saved = labels.get(_FINAL, {}).get("ts")
    said = {name: str(info.get(name) or "") for name in _SAID}
    return Case(
        image=image,
        labelled=image in labelled,
        versions=sum(1 for tag in labels if version_number(tag) is not None),
        tags=sorted(labels),
        labelled_at=datetime.fromtimestamp(saved, UTC) if isinstance(saved, int | float) else None,
        **said,
    )
