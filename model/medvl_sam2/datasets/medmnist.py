"""MedMNIST v2, its six 3D sets (Yang et al. 2023, CC-BY-4.0): one small volume and one class a sample.

``<flag>mnist3d.npz`` or ``<flag>mnist3d_64.npz`` with ``{train,val,test}_images`` (N, D, D, D) uint8 and
``{train,val,test}_labels`` (N, 1). Neither patients nor the orientation are stated: every sample counts as a patient of
its own (the sides are those of the set, which are by patient) and the axes are assumed.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medvl_sam2.datasets.label_names import label_name
from medvl_sam2.datasets.manifest import CaseRecord, Grid, ImageFile, Question, Split
from medvl_sam2.datasets.source import Finding, Problem, first_file, relative
from medvl_sam2.types import Modality
from medvl_sam2.vocabulary import spoken

_SPLITS = {"train": Split.TRAIN, "val": Split.VALIDATION, "test": Split.TEST}


@dataclass(frozen=True)
class _Task:
    """``edge_mm``: edge of the cube a volume shows, None where every sample has its own."""

    question: str
    kind: str
    classes: tuple[str, ...]
    edge_mm: float | None = None


_ORGANS = (
    "liver",
    "kidney-right",
    "kidney-left",
    "femur-right",
    "femur-left",
    "bladder",
    "heart",
    "lung-right",
    "lung-left",
    "spleen",
    "pancreas",
)
TASKS = {
    "organmnist3d": _Task(
        "Which organ is shown?", "organ", tuple(spoken(label_name(name)).replace("_", " ") for name in _ORGANS)
    ),
    "nodulemnist3d": _Task("Is the nodule benign or malignant?", "abnormality", ("benign", "malignant"), 28.0),
    "adrenalmnist3d": _Task(
        "Is the adrenal gland normal or does it show hyperplasia?", "abnormality", ("normal", "hyperplasia"), 64.0
    ),
    "fracturemnist3d": _Task(
        "Which type of rib fracture is shown?",
        "abnormality",
        ("buckle rib fracture", "nondisplaced rib fracture", "displaced rib fracture"),
        64.0,
    ),
    "vesselmnist3d": _Task("Is a healthy vessel or an aneurysm shown?", "abnormality", ("healthy vessel", "aneurysm")),
    "synapsemnist3d": _Task(
        "Is the synapse inhibitory or excitatory?", "abnormality", ("inhibitory synapse", "excitatory synapse")
    ),
}


def read(root: Path) -> Iterator[Finding]:
    """Samples of all sets found; sizes 28 and 64 of one sample are one patient."""
    first_file(root, "*mnist3d*.npz")
    for path in sorted(root.glob("*mnist3d*.npz")):
        flag = path.stem.removesuffix("_64")
        if flag not in TASKS:
            yield Problem(path.name, f"unknown set {flag!r}; known: {', '.join(TASKS)}")
            continue
        try:
            yield from _read_set(root, path, flag)
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            yield Problem(path.name, f"cannot be read ({error}); download it again")


def _read_set(root: Path, path: Path, flag: str) -> Iterator[Finding]:
    task = TASKS[flag]
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        labels = {name: np.asarray(arrays[f"{name}_labels"]).reshape(-1) for name in _SPLITS}
        lacking = [f"{name}_images" for name in _SPLITS if f"{name}_images" not in arrays.files]
    if lacking:
        raise KeyError(lacking[0])
    size = 64 if path.stem.endswith("_64") else 28
    edge = None if task.edge_mm is None else task.edge_mm / size
    grid = Grid("SAR", None if edge is None else (edge, edge, edge), assumed=True)
    for name, split in _SPLITS.items():
        for index, label in enumerate(labels[name].tolist()):
            sample = f"{name}/{index}"
            if not 0 <= label < len(task.classes):
                yield Problem(f"{path.name}/{sample}", f"label {label} is none of 0 to {len(task.classes) - 1}")
                continue
            yield CaseRecord(
                id=f"medmnist/{path.stem}/{sample}",
                source="medmnist",
                patient=f"medmnist/{flag}/{sample}",
                split=split,
                modality=Modality.OTHER,
                licence="CC-BY-4.0",
                image=ImageFile(relative(path, root), f"{name}_images", index, grid),
                questions=(Question(task.question, task.classes[int(label)], task.kind, task.classes),),
            )
