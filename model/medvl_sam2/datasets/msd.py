"""Medical Segmentation Decathlon (Antonelli et al. 2022): ten tasks, each a folder with a ``dataset.json``.

``TaskNN_Name/{imagesTr,labelsTr,imagesTs}``. Images of tasks 01 and 05 hold several sequences in a fourth axis: one
record each. ``._*`` files are leftovers of the archive.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medvl_sam2.datasets.manifest import CaseRecord, ImageFile, LabelFile, Split
from medvl_sam2.datasets.source import (
    NO_LICENCE,
    Finding,
    Problem,
    hashed_split,
    missing,
    named_values,
    read_object,
    relative,
    stem,
    text_fields,
)
from medvl_sam2.errors import DataError
from medvl_sam2.types import Modality

_TASK = re.compile(r"Task\d\d_\w+")
_NAMES = {  # what a name that is short within its task means outside it
    "Task01": {
        "edema": "brain_tumour_edema",
        "non_enhancing_tumour": "brain_tumour_non_enhancing",
        "enhancing_tumour": "brain_tumour_enhancing",
    },
    "Task03": {"tumour": "liver_tumour"},
    "Task04": {"anterior": "hippocampus_anterior", "posterior": "hippocampus_posterior"},
    "Task05": {"pz": "prostate_peripheral_zone", "tz": "prostate_transition_zone"},
    "Task06": {"tumour": "lung_tumour"},
    "Task07": {"tumour": "pancreas_tumour"},
    "Task08": {"vessel": "hepatic_vessel", "tumour": "liver_tumour"},
}


def patient(case: str) -> str:
    """The patient of a decathlon case such as ``liver_12``, also where M3D-Seg uses the case."""
    return f"msd/{case}"


def read(root: Path) -> Iterator[Finding]:
    """All tasks below ``root``, or the one task ``root`` is; labelled cases split by a hash of the patient."""
    tasks = [root] if _TASK.fullmatch(root.name) else sorted(p for p in root.iterdir() if _TASK.fullmatch(p.name))
    if not tasks:
        raise DataError(f"{root} holds no TaskNN_Name folder; give the folder the tasks were unpacked into")
    for task in tasks:
        yield from _read_task(task, root)


def _read_task(task: Path, root: Path) -> Iterator[Finding]:
    table = read_object(task / "dataset.json", "labels", "modality", "training")
    short = _NAMES.get(task.name.split("_")[0], {})
    names = {value: short.get(name, name) for value, name in named_values(table["labels"]).items()}
    entries: list[tuple[Any, tuple[str, ...]]] = [(entry, ("image", "label")) for entry in table["training"]]
    entries += [({"image": name}, ("image",)) for name in table.get("test", ())]
    for entry, keys in entries:
        try:
            files = [task / name for name in text_fields(entry, *keys)]
        except DataError as error:
            yield Problem(task.name, str(error))
            continue
        if any(path.name.startswith("._") for path in files):
            continue
        reason = missing(*files)
        if reason is not None:
            yield Problem(f"{task.name}/{stem(files[0])}", reason)
            continue
        yield from _records(root, task, table, files, names)


def _records(
    root: Path, task: Path, table: Mapping[str, Any], files: list[Path], names: Mapping[int, str]
) -> Iterator[CaseRecord]:
    """One record a sequence; ``files``: the image, and its labels where it has some."""
    case = stem(files[0])
    sequences = [str(table["modality"][key]) for key in sorted(table["modality"], key=int)]
    for index, sequence in enumerate(sequences):
        many = len(sequences) > 1
        yield CaseRecord(
            id=f"msd/{task.name}/{case}" + (f"/{sequence}" if many else ""),
            source="msd",
            patient=patient(case),
            split=hashed_split(patient(case)) if len(files) > 1 else Split.TEST,
            modality=Modality.CT if sequence.upper() == "CT" else Modality.MR,
            licence=str(table.get("licence") or NO_LICENCE),
            image=ImageFile(relative(files[0], root), index=index if many else None),
            labels=tuple(LabelFile(relative(path, root), names) for path in files[1:]),
        )
