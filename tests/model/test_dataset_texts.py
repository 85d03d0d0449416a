"""CT-RATE, the M3D sets and MedMNIST from small folders in their own layouts, with what is missing or broken."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

import dataset_folders as folders
from dataset_folders import (
    NAMES,
    SHAPE,
    assert_right_side_right,
    axes_affine,
    by_id,
    ct_rate,
    found,
    phantom,
    reasons,
    save_array,
    save_json,
    save_nifti,
    save_table,
)
from medvl_sam2.datasets import btcv
from medvl_sam2.datasets.manifest import Grid, Question, Reference, Split
from medvl_sam2.datasets.source import Problem, hashed_split, settled
from medvl_sam2.datasets.volumes import read_case
from medvl_sam2.errors import VolumeError
from medvl_sam2.types import Modality

SUPINE, PRONE = "[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]", "[-1.0, 0.0, 0.0, 0.0, -1.0, 0.0]"


def test_ct_rate(tmp_path: Path) -> None:
    names = {
        "train_1_a_1.nii.gz": "Heart is large.",
        "train_1_b_1.nii.gz": "Trachea is open.",
        "train_2_a_1.nii.gz": "Not given.",
        "train_3_a_1.nii.gz": "Nothing found.",
        "train_4_a_1.nii.gz": "A brain.",
        "train_1267_a_4.nii.gz": "Lungs clear.",
    }
    patients = ct_rate(tmp_path, names, {"train_1_a_1.nii.gz": SUPINE, "train_1_b_1.nii.gz": PRONE})
    base = tmp_path / "dataset"
    (base / "train/train_3/train_3_a/train_3_a_1.nii.gz").unlink()
    (base / "metadata/no_chest_train.txt").write_text("dataset/train/train_4/train_4_a/train_4_a_1.nii.gz\n")
    save_nifti(base / "train/train_9/train_9_a/train_9_a_1.nii.gz", patients["train_1_a_1.nii.gz"].array, None)
    collection = found("ct-rate", tmp_path)
    assert {r.id: r.patient for r in collection.records} == {
        "ct_rate/train_1_a_1": "ct_rate/train_1",
        "ct_rate/train_1_b_1": "ct_rate/train_1",
    }
    assert reasons(collection) == {
        "train_2_a_1.nii.gz": "its report says 'Not given.'",
        "train_3_a_1.nii.gz": "train_3_a/train_3_a_1.nii.gz is missing",
        "train_4_a_1.nii.gz": "listed by the data set as no chest CT",
        "train_1267_a_4.nii.gz": "known to be broken: its slice spacing was never recorded",
        "train_9_a_1.nii.gz": "no row in train_reports.csv",
    }
    first = collection.records[0]
    assert first.report == "Heart is large."
    assert first.questions[0] == Question("Is there cardiomegaly?", "Yes", "abnormality", ("Yes", "No"))
    assert first.questions[1].answer == "No"
    for record in collection.records:
        expected = patients[Path(record.image.path).name]
        case = read_case(record, tmp_path)
        assert np.array_equal(case.volume.array, expected.array)  # HU, not what is stored
        assert np.allclose(case.volume.geometry.affine[:3, :3], expected.affine[:3, :3])
        assert case.sides_known


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("ZSpacing", "", "value '' in the metadata table is no number"),
        ("RescaleSlope", "nan", "value 'nan' in the metadata table is no number"),
        ("RescaleSlope", "0", "must be a finite slope"),
        ("XYSpacing", "[3.0]", "no list of 2 numbers"),
        ("XYSpacing", "__import__('os')", "no list of 2 numbers"),
        ("ImageOrientationPatient", "[0, 0, 0, 0, 0, 0]", "names no three axes"),
    ],
)
def test_ct_rate_names_a_bad_table_value(tmp_path: Path, column: str, value: str, reason: str) -> None:
    ct_rate(tmp_path, {"train_1_a_1.nii.gz": "Fine.", "train_2_a_1.nii.gz": "Fine."}, {})
    table = tmp_path / "dataset/metadata/train_metadata.csv"
    row = {"RescaleSlope": "1", "RescaleIntercept": "0", "XYSpacing": "[3.0, 2.5]", "ZSpacing": "5"}
    rows = [{"VolumeName": f"train_{n}_a_1.nii.gz", **row, "ImageOrientationPatient": SUPINE} for n in (1, 2)]
    rows[0][column] = value
    save_table(table, rows)
    collection = found("ct-rate", tmp_path)
    assert [r.id for r in collection.records] == ["ct_rate/train_2_a_1"]
    assert reason in reasons(collection)["train_1_a_1.nii.gz"]


def test_ct_rate_fixed_release_has_true_headers(tmp_path: Path) -> None:
    case = phantom(axes_affine("LPS", turn=True))
    base = tmp_path / "dataset"
    save_nifti(base / "valid_fixed/valid_1/valid_1_a/valid_1_a_1.nii.gz", case.array, case.affine)
    row = {"VolumeName": "valid_1_a_1.nii.gz", "Findings_EN": "Clear.", "Impressions_EN": "Normal."}
    save_table(base / "radiology_text_reports/validation_reports.csv", [row])
    (record,) = found("ct-rate", tmp_path).records
    assert (record.split, record.report) == (Split.VALIDATION, "Clear. Normal.")
    assert np.array_equal(read_case(record, tmp_path).volume.array, case.array)


def test_m3d_cap_prepared(tmp_path: Path) -> None:
    base = tmp_path / "M3D_Cap_npy"
    volume = np.random.default_rng(0).random((1, 4, 6, 5), dtype=np.float32)
    data: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": [], "test100": []}
    for side, series in (("train", "Axial_lung"), ("validation", "Coronal_bone"), ("test", "Sagittal_C")):
        folder = base / "ct_case" / side
        save_array(folder / f"{series}.npy", volume)
        (folder / "text.txt").write_text(f"A finding of {side}.")
        image = f"M3D_Cap_npy/ct_case/{side}/{series}.npy"
        data[side].append({"image": image, "text": f"M3D_Cap_npy/ct_case/{side}/text.txt"})
    data["train"] += [{"image": "M3D_Cap_npy/ct_case/gone/Axial.npy", "text": "x"}, {"image": "no text"}]
    save_json(base / "M3D_Cap.json", data)
    collection = found("m3d-cap", tmp_path)
    assert [(r.split, r.report, r.modality, r.image.grid) for r in collection.records] == [
        (Split.TRAIN, "A finding of train.", Modality.OTHER, Grid("IPL", assumed=True)),
        (Split.VALIDATION, "A finding of validation.", Modality.OTHER, Grid("PIL", assumed=True)),
        (Split.TEST, "A finding of test.", Modality.OTHER, Grid("LIP", assumed=True)),
    ]
    assert reasons(collection)["ct_case/gone/Axial.npy"] == "gone/Axial.npy is missing"
    assert "lacks image or text" in reasons(collection)["M3D_Cap.json"]
    case = read_case(collection.records[0], tmp_path)
    assert np.array_equal(case.volume.array, volume[0])
    assert nib.aff2axcodes(case.volume.geometry.affine) == ("I", "P", "L")
    assert not case.sides_known


def test_m3d_cap_of_med3dvlm_is_the_same_volume(tmp_path: Path) -> None:
    """Its ``.nii.gz`` come from ``sitk.GetImageFromArray`` of (slice, row, column): the axes are reversed."""
    volume = np.random.default_rng(0).random((4, 6, 5), dtype=np.float32)
    folder = tmp_path / "ct_quizze" / "000006"
    folder.mkdir(parents=True)
    sitk.WriteImage(sitk.GetImageFromArray(volume), str(folder / "Axial_lung.nii.gz"))
    (folder / "text.txt").write_text("One finding.")
    entry = {"image": "ct_quizze/000006/Axial_lung.npy", "text": "ct_quizze/000006/text.txt"}
    save_json(tmp_path / "M3D_Cap.json", {"train": [entry], "validation": [], "test": []})
    (record,) = found("m3d-cap", tmp_path).records
    case = read_case(record, tmp_path)
    assert np.array_equal(case.volume.array.transpose(2, 1, 0), volume)
    assert nib.aff2axcodes(case.volume.geometry.affine) == ("L", "P", "I")


def test_m3d_cap_raw_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "M3D_Cap" / "ct_case" / "000012"
    slices = np.random.default_rng(0).integers(0, 256, (11, 6, 5), dtype=np.uint8)
    series = folder / "Axial_non_contrast"
    series.mkdir(parents=True)
    for number, array in enumerate(slices):
        colour = np.stack([array] * 3, axis=-1) if number == 3 else array
        sitk.WriteImage(sitk.GetImageFromArray(colour, isVector=number == 3), str(series / f"{number}.png"))
    (folder / "text.txt").write_text("title: a case\nstudy_findings:\nA cyst  in the\nleft kidney.\n")
    odd = folder / "Scout"
    odd.mkdir()
    for number, shape in enumerate(((6, 5), (7, 5))):
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros(shape, np.uint8)), str(odd / f"{number}.png"))
    (tmp_path / "M3D_Cap/ct_case/000013/Axial").mkdir(parents=True)
    collection = found("m3d-cap", tmp_path)
    record, scout = collection.records
    assert (record.report, record.patient) == ("A cyst in the left kidney.", "m3d_cap/ct_case/000012")
    assert record.split == hashed_split(record.patient)
    assert reasons(collection) == {"ct_case/000013/Axial": "000013/text.txt is missing"}
    assert np.allclose(read_case(record, tmp_path).volume.array, slices, atol=0.01)  # 10 follows 9, not 1
    with pytest.raises(VolumeError, match="several sizes"):
        read_case(scout, tmp_path)


def test_m3d_cap_report_falls_back_to_discussion_and_whole_text(tmp_path: Path) -> None:
    texts = {"1": "discussion: Old fracture.\nstudy_findings: -", "2": "Just a note.", "3": " \n"}
    for number, text in texts.items():
        (tmp_path / "ct_case" / number / "Axial").mkdir(parents=True)
        (tmp_path / "ct_case" / number / "text.txt").write_text(text)
    collection = found("m3d-cap", tmp_path)
    assert [r.report for r in collection.records] == ["Old fracture.", "Just a note."]
    assert reasons(collection) == {"ct_case/3/Axial": "text.txt holds no report"}


def test_m3d_vqa(tmp_path: Path) -> None:
    image = "M3D_Cap_npy/ct_case/000001/Axial_lung.npy"
    save_array(tmp_path / image, np.random.default_rng(0).random((1, 4, 6, 5), dtype=np.float32))
    choices = {"Choice A": "Axial", "Choice B": "Coronal", "Choice C": "Sagittal", "Choice D": "Oblique"}
    good = {"Image Path": image, "Question Type": 1, "Question": "Which plane?", **choices, "Answer": "Axial"}
    rows = [
        {**good, "Answer Choice": "A"},
        {**good, "Answer Choice": "B"},
        {**good, "Answer Choice": "A", "Question Type": 9},
        {**good, "Answer Choice": "A", "Image Path": "M3D_Cap_npy/ct_case/000002/Axial.npy"},
    ]
    save_table(tmp_path / "M3D-VQA/M3D_VQA_train.csv", rows)
    yes_no = [{"Image Path": image, "Question": "Is it CT?", "Answer": answer} for answer in ("yes", "Perhaps")]
    save_table(tmp_path / "M3D-VQA/M3D_VQA_yn_train.csv", yes_no)
    collection = found("m3d-vqa", tmp_path)
    (record,) = collection.records
    assert record.questions == (
        Question("Which plane?", "Axial", "plane", tuple(choices.values())),
        Question("Is it CT?", "Yes", "yes_no", ("Yes", "No")),
    )
    assert record.patient == "m3d_cap/ct_case/000001"
    problems = reasons(collection)
    assert "is not choice 'B'" in problems["M3D_VQA_train.csv:3"]
    assert "question type '9'" in problems["M3D_VQA_train.csv:4"]
    assert "neither yes nor no" in problems["M3D_VQA_yn_train.csv:3"]
    assert problems["M3D_Cap_npy/ct_case/000002/Axial.npy"] == "000002/Axial.npy is missing"
    assert read_case(record, tmp_path).volume.array.shape == (4, 6, 5)


M3D_LABELS = {"0": "background", "1": "right kidney", "2": "left kidney", "3": "liver"}


def _m3d_seg(root: Path, code: str, cases: list[str], labels: dict[str, str] = M3D_LABELS) -> None:
    entries = [{"image": f"{code}/{c}/image.npy", "label": f"{code}/{c}/mask_{(3, *SHAPE)}.npz"} for c in cases]
    save_json(root / code / f"{code}.json", {"labels": labels, "train": entries[:-1], "test": entries[-1:]})


def test_m3d_seg_sides_decide_what_the_arrays_lost(tmp_path: Path) -> None:
    """The same patient stored right to left and left to right: the kidneys say which is which."""
    cases = {name: phantom(axes_affine(axes)) for name, axes in (("right", "RAS"), ("left", "LAS"))}
    _m3d_seg(tmp_path, "0003", [*cases, "gone"])
    for name, case in cases.items():
        folders.m3d_seg_case(tmp_path / "0003" / name, case)
    collection = found("m3d-seg", tmp_path)
    assert reasons(collection) == {"0003/gone": "gone/image.npy is missing"}
    for record in collection.records:
        case, expected = read_case(record, tmp_path), cases[record.id.rsplit("/", 1)[-1]]
        assert case.labels is not None
        assert np.allclose(case.volume.array, (expected.array - 40.0) / 30.0, atol=1e-5)
        for value, name in enumerate(NAMES, start=1):
            assert np.array_equal(case.labels.mask(name), expected.labels == value)
        assert_right_side_right(case)
        assert case.sides_known
        assert record.modality is Modality.OTHER  # z-scores are no Hounsfield units


def test_m3d_seg_names_patients_and_axes(tmp_path: Path) -> None:
    labels = {"1": "lumbar spine L1", "2": "lumbar spine L1", "3": "lumbar spine L3"}
    case = phantom(axes_affine("RAS"))
    for code, names in (("0014", labels), ("0020", {**M3D_LABELS, "3": "tumour"}), ("0011", M3D_LABELS)):
        _m3d_seg(tmp_path, code, ["s0001", "s0002"], names)
        folders.m3d_seg_case(tmp_path / code / "s0001", case)
        folders.m3d_seg_case(tmp_path / code / "s0002", case)
    records = by_id(found("m3d-seg", tmp_path))
    assert records["m3d_seg/0014/s0001"].label_names == ("vertebrae_L1", "vertebrae_L2", "vertebrae_L3")
    assert records["m3d_seg/0020/s0001"].label_names[-1] == "liver_tumour"
    assert records["m3d_seg/0020/s0001"].patient == "msd/s0001"
    assert records["m3d_seg/0011/s0001"].patient == "totalsegmentator/s0001"
    assert [records[f"m3d_seg/0011/s000{n}"].split for n in (1, 2)] == [Split.TRAIN, Split.TEST]
    stack = phantom(axes_affine("SAR"), shape=(10, 14, 14))  # KiTS: slices first, as their squares show
    folders.m3d_seg_case(tmp_path / "0006" / "case_1", stack)
    entry = {"image": "0006/case_1/image.npy", "label": f"0006/case_1/mask_{(3, 10, 14, 14)}.npz"}
    broken = {"image": "0006/case_2/image.npy", "label": "0006/case_2/mask.npz"}
    four = {**M3D_LABELS, "4": "spleen"}
    save_json(tmp_path / "0006/0006.json", {"labels": M3D_LABELS, "train": [entry, broken, "text"], "test": []})
    alone = found("m3d-seg", tmp_path / "0006")
    assert [r.image.path for r in alone.records] == ["case_1/image.npy"]
    collection = found("m3d-seg", tmp_path)
    assert by_id(collection)["m3d_seg/0006/case_1"].image.grid == Grid("SAR", assumed=True)
    assert "its shape is unknown" in reasons(collection)["0006/case_2"]
    assert "lacks image or label" in reasons(collection)["0006/text"]
    elsewhere = {"image": "0014/s0001/image.npy", "label": f"0014/s0001/mask_{(3, *SHAPE)}.npz"}
    save_json(tmp_path / "0006/0006.json", {"labels": M3D_LABELS, "train": [elsewhere], "test": []})
    assert "lies outside" in reasons(found("m3d-seg", tmp_path / "0006"))["0006/s0001"]
    save_json(tmp_path / "0006/0006.json", {"labels": four, "train": [entry], "test": []})
    assert reasons(found("m3d-seg", tmp_path)) == {"0006/case_1": "its mask has 3 classes, 0006.json names 4"}


def _refseg_row(case: str, number: int, **change: object) -> dict[str, object]:
    row = {"Image": f"M3D_RefSeg/{case}/ct.nii.gz", "Mask": f"M3D_RefSeg/{case}/mask.nii.gz", "Mask_ID": number}
    return {**row, "Question_Type": 0, "Question": f"Where is it, {number}?", "Answer": "It is <SEG>.", **change}


def test_m3d_refseg_raw_and_prepared_agree_in_space(tmp_path: Path) -> None:
    """M3D prepares (z, x, y): the same world box must come out of the NIfTI file and of the array."""
    raw, prepared = tmp_path / "raw", tmp_path / "prepared"
    case = folders.labelled(raw, "s0001/ct.nii.gz", "s0001/mask.nii.gz", "RAS", turn=False)
    save_array(prepared / "s0001/ct.npy", case.array.transpose(2, 0, 1)[None].astype(np.float64))
    save_array(prepared / "s0001/mask.npy", case.labels.transpose(2, 0, 1)[None].astype(np.float64))
    loaded = []
    for root in (raw, prepared):
        rows = [
            _refseg_row("s0001", 2),
            _refseg_row("s0001", 3, Question_Type=1),
            _refseg_row("s0001", 1, Answer="No."),
        ]
        save_table(root / "M3D_RefSeg_train.csv", rows)
        save_table(root / "M3D_RefSeg_test.csv", [_refseg_row("s0002", 1)])
        collection = found("m3d-refseg", root)
        assert "has no [SEG]" in reasons(collection)["M3D_RefSeg_train.csv:4"]
        assert reasons(collection)["s0002"] == "s0002/ct.nii.gz is missing"
        (record,) = collection.records
        assert record.patient == "totalsegmentator/s0001"
        assert record.references[0] == Reference("Where is it, 2?", ("region_2",), "It is [SEG].", "description")
        assert record.references[1].kind == "reasoning"
        loaded.append(read_case(record, root))
    boxes = []
    for item in loaded:
        assert item.labels is not None
        unit = item.volume.geometry.affine[:3, :3] / item.volume.geometry.spacing
        points = np.argwhere(item.labels.mask("region_2")) @ unit.T  # in voxels along R, A, S
        boxes.append(points - (np.array(item.volume.array.shape) - 1) / 2 @ unit.T)
    assert np.allclose(boxes[0].mean(axis=0), boxes[1].mean(axis=0))
    assert (loaded[0].sides_known, loaded[1].sides_known) == (True, False)
    assert np.array_equal(loaded[0].volume.array.transpose(2, 0, 1), loaded[1].volume.array)


def test_medmnist(tmp_path: Path) -> None:
    arrays = {}
    for side, count in (("train", 3), ("val", 1), ("test", 2)):
        arrays[f"{side}_images"] = np.random.default_rng(count).integers(0, 255, (count, 5, 6, 7), dtype=np.uint8)
        arrays[f"{side}_labels"] = np.arange(count, dtype=np.uint8)[:, None]
    arrays["train_labels"][2] = 11
    np.savez(tmp_path / "organmnist3d.npz", **arrays)
    np.savez(tmp_path / "nodulemnist3d_64.npz", **{k: v for k, v in arrays.items() if k != "test_images"})
    (tmp_path / "vesselmnist3d.npz").write_bytes(b"PK torn")
    collection = found("medmnist", tmp_path)
    assert [(r.id, r.split) for r in collection.records] == [
        ("medmnist/organmnist3d/train/0", Split.TRAIN),
        ("medmnist/organmnist3d/train/1", Split.TRAIN),
        ("medmnist/organmnist3d/val/0", Split.VALIDATION),
        ("medmnist/organmnist3d/test/0", Split.TEST),
        ("medmnist/organmnist3d/test/1", Split.TEST),
    ]
    assert "label 11" in reasons(collection)["organmnist3d.npz/train/2"]
    assert "test_images" in reasons(collection)["nodulemnist3d_64.npz"]
    assert "cannot be read" in reasons(collection)["vesselmnist3d.npz"]
    second = collection.records[1]
    assert second.questions[0].answer == "right kidney"
    assert "urinary bladder" in second.questions[0].choices
    assert np.array_equal(read_case(second, tmp_path).volume.array, arrays["train_images"][1])
    gone = dataclasses.replace(second, image=dataclasses.replace(second.image, index=7))
    with pytest.raises(VolumeError, match="organmnist3d"):
        read_case(gone, tmp_path)


def test_a_patient_stands_on_one_side_over_all_sources(tmp_path: Path) -> None:
    folders.totalsegmentator(tmp_path / "ts")
    folders.labelled(tmp_path / "ref", "s0011/ct.nii.gz", "s0011/mask.nii.gz", "RAS")
    save_table(tmp_path / "ref/M3D_RefSeg_train.csv", [_refseg_row("s0011", 1)])
    save_table(tmp_path / "ref/M3D_RefSeg_test.csv", [_refseg_row("s0099", 1)])
    sources = [found("totalsegmentator", tmp_path / "ts"), found("m3d-refseg", tmp_path / "ref")]
    records, moved = settled([record for source in sources for record in source.records])
    assert [r.split for r in records if r.patient == "totalsegmentator/s0011"] == [Split.TEST, Split.TEST]
    assert moved == [Problem("m3d_refseg/train/s0011", "patient also in test: moved there from train", skipped=False)]
    # A case that its source tests with and a standing manifest trains on is said in other words.
    written = [dataclasses.replace(r, split=Split.TRAIN) for r in records if r.patient == "totalsegmentator/s0011"]
    again, moved = settled(records, written)
    assert {r.split for r in again if r.patient == "totalsegmentator/s0011"} == {Split.TRAIN}
    assert [problem.reason for problem in moved] == [
        "patient stands in train of a given manifest: moved there, away from test of its source"
    ] * 2


def test_patients_of_btcv_are_the_same_in_m3d_seg(tmp_path: Path) -> None:
    assert {btcv.patient(name) for name in ("img0007", "0007", "case_00007")} == {"btcv/img0007"}
    case = phantom(axes_affine("RAS"))
    folder = tmp_path / "M3D_Seg" / "0007"
    folders.m3d_seg_case(folder / "img0007", case)
    mask = next((folder / "img0007").glob("*.npz")).name
    names = dict(zip(map(str, range(1, len(NAMES) + 1)), NAMES, strict=True))
    entry = {"image": "0007/img0007/image.npy", "label": f"0007/img0007/{mask}"}
    save_json(folder / "0007.json", {"labels": {"0": "background", **names}, "train": [entry], "test": []})
    (record,) = found("m3d-seg", tmp_path / "M3D_Seg").records
    assert record.patient == "btcv/img0007"
