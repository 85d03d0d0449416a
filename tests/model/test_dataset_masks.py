"""Sources of masks from small folders in their own layouts: names, splits, and what is missing or broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import dataset_folders as folders
from dataset_folders import (
    assert_holds,
    assert_right_side_right,
    axes_affine,
    by_id,
    found,
    phantom,
    reasons,
    save_json,
    save_nifti,
)
from medvl_sam2.datasets.label_names import label_name, opposite_side
from medvl_sam2.datasets.manifest import Split
from medvl_sam2.datasets.source import hashed_split
from medvl_sam2.datasets.volumes import read_case
from medvl_sam2.errors import DataError, VolumeError
from medvl_sam2.types import Modality


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("right kidney", "kidney_right"),
        ("Left Adrenal Gland", "adrenal_gland_left"),
        ("gall bladder", "gallbladder"),
        ("postcava", "inferior_vena_cava"),
        ("bladder", "urinary_bladder"),
        ("prostate/uterus", "prostate_or_uterus"),
        ("rib left 1", "rib_left_1"),
        ("vertebrae T12", "vertebrae_T12"),
        ("lumbar spine L3", "vertebrae_L3"),
        ("left suprarenal tumor", "adrenal_tumour_left"),
        ("colon cancer primaries", "colon_tumour"),
        ("kidney-left", "kidney_left"),
        ("left atrium", "heart_atrium_left"),
        ("head of femur right", "head_of_femur_right"),
        ("left", "left"),
        ("???", ""),
    ],
)
def test_label_names(text: str, name: str) -> None:
    assert label_name(text) == name
    assert label_name(name) == name


def test_opposite_side() -> None:
    assert opposite_side("rib_left_1") == "rib_right_1"
    assert opposite_side("kidney_right") == "kidney_left"
    assert opposite_side("liver") is None


def test_totalsegmentator(tmp_path: Path) -> None:
    patients = folders.totalsegmentator(tmp_path)
    collection = found("totalsegmentator", tmp_path)
    records = by_id(collection)
    assert [(r.id, r.split) for r in collection.records] == [
        ("totalsegmentator/s0000", Split.TRAIN),
        ("totalsegmentator/s0003", Split.VALIDATION),
        ("totalsegmentator/s0011", Split.TEST),
        ("totalsegmentator/s0021", Split.TRAIN),
    ]
    assert reasons(collection)["s0020"] == "s0020/ct.nii.gz is missing"
    assert reasons(collection)["s0011"] == "1 class files are missing: liver"
    assert [problem.case for problem in collection.problems if problem.skipped] == ["s0020"]
    for name, expected in patients.items():
        assert_holds(read_case(records[f"totalsegmentator/{name}"], tmp_path), expected)
    assert "liver" not in records["totalsegmentator/s0011"].label_names
    with pytest.raises(VolumeError, match="s0021"):
        read_case(records["totalsegmentator/s0021"], tmp_path)


def test_amos(tmp_path: Path) -> None:
    labels = {"0": "background", "1": "right kidney", "2": "left kidney", "3": "liver"}
    save_json(tmp_path / "dataset.json", {"labels": labels, "licence": "CC-BY-SA 4.0"})
    names = ("amos_0001", "amos_0500", "amos_0507")
    expected = {
        name: folders.labelled(tmp_path, f"images{part}/{name}.nii.gz", f"labels{part}/{name}.nii.gz", axes, number)
        for number, (name, part, axes) in enumerate(zip(names, ("Tr", "Va", "Tr"), ("RAS", "LPS", "PSL")))
    }
    save_nifti(tmp_path / "imagesTs/amos_0600.nii.gz", expected[names[0]].array, expected[names[0]].affine)
    save_nifti(tmp_path / "imagesTr/amos_0009.nii.gz", expected[names[0]].array, expected[names[0]].affine)
    collection = found("amos", tmp_path)
    assert [(r.id, r.split, r.modality, bool(r.labels)) for r in collection.records] == [
        ("amos/amos_0001", Split.TRAIN, Modality.CT, True),
        ("amos/amos_0507", Split.TRAIN, Modality.MR, True),
        ("amos/amos_0500", Split.VALIDATION, Modality.CT, True),
        ("amos/amos_0600", Split.TEST, Modality.MR, False),
    ]
    assert reasons(collection) == {"amos_0009": "labelsTr/amos_0009.nii.gz is missing"}
    for name, phantom_ in expected.items():
        assert_holds(read_case(by_id(collection)[f"amos/{name}"], tmp_path), phantom_)


def test_msd(tmp_path: Path) -> None:
    liver, brain = tmp_path / "Task03_Liver", tmp_path / "Task01_BrainTumour"
    whole = folders.labelled(liver, "imagesTr/liver_0.nii.gz", "labelsTr/liver_0.nii.gz", "LAS")
    (liver / "imagesTr/._liver_0.nii.gz").write_bytes(b"mac")
    entries = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in ("._liver_0", "liver_0")]
    entries.append({"image": "./imagesTr/liver_1.nii.gz", "label": "./labelsTr/liver_1.nii.gz"})
    save_json(
        liver / "dataset.json",
        {
            "labels": {"0": "background", "1": "right kidney", "2": "left kidney", "3": "cancer"},
            "modality": {"0": "CT"},
            "training": [*entries, {"image": "./imagesTr/liver_2.nii.gz"}],
            "test": ["./imagesTs/liver_9.nii.gz"],
            "licence": "CC-BY-SA 4.0",
        },
    )
    save_nifti(liver / "imagesTs/liver_9.nii.gz", whole.array, whole.affine)
    sequences = np.stack([whole.array, whole.array + 500], axis=-1)
    save_nifti(brain / "imagesTr/BRATS_001.nii.gz", sequences, whole.affine)
    save_nifti(brain / "labelsTr/BRATS_001.nii.gz", whole.labels, whole.affine)
    save_json(
        brain / "dataset.json",
        {
            "labels": {"0": "background", "1": "edema"},
            "modality": {"0": "FLAIR", "1": "T1w"},
            "training": [{"image": "./imagesTr/BRATS_001.nii.gz", "label": "./labelsTr/BRATS_001.nii.gz"}],
        },
    )
    collection = found("msd", tmp_path)
    records = by_id(collection)
    assert list(records) == [
        "msd/Task01_BrainTumour/BRATS_001/FLAIR",
        "msd/Task01_BrainTumour/BRATS_001/T1w",
        "msd/Task03_Liver/liver_0",
        "msd/Task03_Liver/liver_9",
    ]
    assert set(reasons(collection)) == {"Task03_Liver/liver_1", "Task03_Liver"}
    assert reasons(collection)["Task03_Liver/liver_1"] == "imagesTr/liver_1.nii.gz is missing"
    assert "lacks image or label" in reasons(collection)["Task03_Liver"]
    first = records["msd/Task03_Liver/liver_0"]
    assert first.label_names == ("kidney_right", "kidney_left", "liver_tumour")
    assert (first.modality, first.split, first.patient) == (Modality.CT, hashed_split("msd/liver_0"), "msd/liver_0")
    assert_right_side_right(read_case(first, tmp_path))
    flair, t1 = (read_case(r, tmp_path) for r in collection.records[:2])
    assert np.array_equal(flair.volume.array + 500, t1.volume.array)
    assert flair.record.patient == t1.record.patient
    assert flair.record.modality is Modality.MR
    assert found("msd", liver).records[0].image.path == "imagesTr/liver_0.nii.gz"


def test_btcv(tmp_path: Path) -> None:
    training = tmp_path / "RawData" / "Training"
    case = phantom(axes_affine("LAS", turn=True))
    organs = np.array([0, 2, 3, 6], dtype=np.uint8)[case.labels]  # BTCV: 2 right kidney, 3 left kidney, 6 liver
    save_nifti(training / "img/img0001.nii.gz", case.array, case.affine)
    save_nifti(training / "label/label0001.nii.gz", organs, case.affine)
    save_nifti(training / "img/img0002.nii.gz", case.array, case.affine)
    save_nifti(tmp_path / "RawData/Testing/img/img0061.nii.gz", case.array, case.affine)
    collection = found("btcv", tmp_path)
    assert [r.id for r in collection.records] == ["btcv/img0001", "btcv/img0061"]
    assert reasons(collection) == {"img0002": "label/label0002.nii.gz is missing"}
    assert len(collection.records[0].label_names) == 13
    loaded = read_case(collection.records[0], tmp_path)
    assert_holds(loaded, case)
    assert loaded.labels is not None
    assert loaded.labels.present == ("kidney_right", "kidney_left", "liver")  # ten organs are known to be absent
    assert [r.id for r in found("btcv", tmp_path / "RawData").records] == ["btcv/img0001", "btcv/img0061"]


def test_hashed_split_is_fixed_and_near_its_shares() -> None:
    sides = [hashed_split(f"msd/liver_{n}") for n in range(2000)]
    assert hashed_split("msd/liver_0") is sides[0]
    assert abs(sides.count(Split.TEST) / 2000 - 0.1) < 0.03
    assert abs(sides.count(Split.VALIDATION) / 2000 - 0.1) < 0.03


@pytest.mark.parametrize(
    "source", ["amos", "ct-rate", "m3d-refseg", "m3d-seg", "m3d-vqa", "medmnist", "msd", "totalsegmentator"]
)
def test_a_strange_folder_is_refused(tmp_path: Path, source: str) -> None:
    (tmp_path / "dataset" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="give the"):
        found(source, tmp_path)
    with pytest.raises(DataError, match="no folder"):
        found(source, tmp_path / "absent")


def test_unknown_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="known: amos, btcv"):
        found("imagenet", tmp_path)
