"""Small folders in the exact layout of the public data sets, with a patient who has a left and a right.

The phantom is drawn in world space (RAS+ mm), so the same patient can be stored on any grid. Non-cubic, anisotropic.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import sparse

from medvl_sam2.datasets.manifest import CaseRecord
from medvl_sam2.datasets.registry import Collection, collected, findings
from medvl_sam2.datasets.volumes import LoadedCase
from volume_files import turned

SHAPE = (14, 18, 10)
SPACING = (3.0, 2.5, 5.0)
NAMES = ("kidney_right", "kidney_left", "liver")
HU = (-1000, 20, 60, 80, 100)  # air, body, then the organs
_CENTER = np.array([21.0, 22.0, 24.0])
# Place relative to the centre (RAS+: x to the right, y to the front, z up), radius in mm. The liver is on the right.
_ORGANS = (((11.0, -8.0, -4.0), 7.0), ((-11.0, -8.0, 3.0), 6.0), ((8.0, 9.0, 6.0), 8.0))


@dataclass(frozen=True)
class Phantom:
    """``array`` (I, J, K) int16 HU, ``labels`` uint8 (value n: ``NAMES[n - 1]``), ``affine`` to RAS+ mm."""

    array: np.ndarray
    labels: np.ndarray
    affine: np.ndarray


def axes_affine(axes: str, spacing: tuple[float, float, float] = SPACING, turn: bool = False) -> np.ndarray:
    """Grid around the phantom whose stored axes grow to ``axes``; with ``turn`` oblique."""
    columns = np.zeros((3, 3))
    for column, axis in enumerate(axes):
        world = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}[axis]
        columns[world, column] = spacing[column] * (1 if axis in "RAS" else -1)
    columns = turned() @ columns if turn else columns
    affine = np.eye(4)
    affine[:3, :3] = columns
    affine[:3, 3] = _CENTER - columns @ (np.array(SHAPE) - 1) / 2
    return affine


def phantom(affine: np.ndarray, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> Phantom:
    """The patient on a grid; a little even noise makes every voxel its own."""
    ijk = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    world = ijk @ affine[:3, :3].T + affine[:3, 3] - _CENTER
    labels = np.zeros(shape, dtype=np.uint8)
    for value, (place, radius) in enumerate(_ORGANS, start=1):
        labels[np.linalg.norm(world - place, axis=-1) < radius] = value
    tissue = np.where(np.linalg.norm(world, axis=-1) < 26, 1, 0)
    hu = np.array(HU)[np.where(labels > 0, labels + 1, tissue)]
    noise = 2 * np.random.default_rng(seed).integers(-4, 5, shape)
    return Phantom((hu + noise).astype(np.int16), labels, affine)


def save_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def save_array(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
    return path


def save_table(path: Path, rows: list[dict[str, object]], delimiter: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter=delimiter, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def save_json(path: Path, data: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def broken_gzip(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x1f\x8b not a volume")
    return path


def totalsegmentator(root: Path, cases: tuple[str, ...] = ("s0000", "s0003", "s0011")) -> dict[str, Phantom]:
    """Whole cases on an oblique grid, one without image, one whose image is torn, one without a class."""
    rows = [{"image_id": c, "age": 60, "split": s} for c, s in zip(cases, ("train", "val", "test"), strict=True)]
    patients = {}
    for number, case in enumerate(cases):
        patients[case] = image = phantom(axes_affine("RAS", turn=True), number)
        save_nifti(root / case / "ct.nii.gz", image.array, image.affine)
        for value, name in enumerate(NAMES, start=1):
            mask = (image.labels == value).astype(np.uint8)
            save_nifti(root / case / "segmentations" / f"{name}.nii.gz", mask, image.affine)
    (root / cases[2] / "segmentations" / "liver.nii.gz").unlink()
    for case, torn in (("s0020", False), ("s0021", True)):
        rows.append({"image_id": case, "age": 50, "split": "train"})
        save_nifti(root / case / "segmentations" / "liver.nii.gz", image.labels, image.affine)
        if torn:
            broken_gzip(root / case / "ct.nii.gz")
    save_table(root / "meta.csv", rows, ";")
    return patients


def ct_rate(
    root: Path, names: dict[str, str], orientation: dict[str, str], part: str = "train", table: str = "train"
) -> dict[str, Phantom]:
    """Volumes and reports as CT-RATE stores them: no header, slope and intercept only in the table."""
    base = root / "dataset"
    reports, metadata, patients = [], [], {}
    for number, (name, findings_) in enumerate(names.items()):
        axes = "RAS" if orientation.get(name, "").startswith("[-1") else "LPS"
        patients[name] = case = phantom(axes_affine(axes), number)
        study = name.rsplit("_", 1)[0]
        path = base / part / study.rsplit("_", 1)[0] / study / name
        save_nifti(path, ((case.array + 8192) // 2).astype(np.int16), None)
        reports.append({"VolumeName": name, "Findings_EN": findings_, "Impressions_EN": "Not given."})
        row = {"VolumeName": name, "RescaleSlope": "2", "RescaleIntercept": "-8192.0", "XYSpacing": "[3.0, 2.5]"}
        metadata.append({**row, "ZSpacing": "5.0", "ImageOrientationPatient": orientation.get(name, "")})
    save_table(base / f"radiology_text_reports/{table}_reports.csv", reports)
    save_table(base / f"metadata/{table}_metadata.csv", metadata)
    labels = [{"VolumeName": name, "Cardiomegaly": "1", "Lung nodule": "0"} for name in names]
    save_table(base / f"multi_abnormality_labels/{part}_predicted_labels.csv", labels)
    return patients


def labelled(root: Path, image: str, label: str, axes: str, seed: int = 0, turn: bool = True) -> Phantom:
    """A NIfTI image and its label map."""
    case = phantom(axes_affine(axes, turn=turn), seed)
    save_nifti(root / image, case.array, case.affine)
    save_nifti(root / label, case.labels, case.affine)
    return case


def m3d_seg_case(folder: Path, case: Phantom, classes: int = len(NAMES)) -> None:
    """``image.npy`` normalised by its foreground, and the sparse masks whose shape stands in their name."""
    save_array(folder / "image.npy", (case.array[None] - 40.0) / 30.0)
    masks = np.stack([case.labels == value for value in range(1, classes + 1)]).astype(np.int32)
    sparse.save_npz(folder / f"mask_{masks.shape}", sparse.csr_matrix(masks.reshape(classes, -1)))


def found(source: str, root: Path) -> Collection:
    return collected(findings(source, root))


def by_id(collection: Collection) -> dict[str, CaseRecord]:
    return {record.id: record for record in collection.records}


def reasons(collection: Collection) -> dict[str, str]:
    return {problem.case: problem.reason for problem in collection.problems}


def assert_right_side_right(case: LoadedCase) -> None:
    """The right kidney and the liver lie to the patient's right (RAS+ x grows to the right)."""
    assert case.labels is not None
    x = {
        name: case.volume.geometry.voxel_to_world(np.argwhere(case.labels.mask(name)))[:, 0].mean()
        for name in case.labels.present
    }
    assert x["kidney_right"] > x["kidney_left"] + 6
    assert x.get("liver", np.inf) > x["kidney_left"] + 6


def assert_holds(case: LoadedCase, expected: Phantom) -> None:
    """Voxels, grid and masks are those that were stored."""
    assert case.labels is not None
    assert np.array_equal(case.volume.array, expected.array)
    assert np.allclose(case.volume.geometry.affine, expected.affine, atol=1e-4)
    for value, name in enumerate(NAMES, start=1):
        if name in case.labels.names:
            assert np.array_equal(case.labels.mask(name), expected.labels == value)
    assert_right_side_right(case)
