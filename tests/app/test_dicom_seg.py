"""Label maps to DICOM SEG and back: exact in space, by name, whoever wrote the object."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from app.phantom import ORDERS, Phantom, phantom, write
from app.segs import planes, renumbered, reread, with_frames
from lib.dicom_codes import segment_name, structure_code, structure_name
from lib.dicom_objects import source_headers
from lib.dicom_seg import LabelOrigin, build_segmentation
from lib.dicom_seg_reading import read_segmentation
from medvl_sam2.dicom_io import read_dicom_grid
from medvl_sam2.errors import DataError, GeometryError
from medvl_sam2.types import Geometry
from medvl_sam2.vocabulary import CLASSES
from medvl_sam2.volume_io import read_mask, read_volume, write_mask
from volume_files import itk_affine

NAMES = {2: "kidney_right", 5: "liver", 17: "lesion", 40: "Zyste über der Niere"}
ORIGIN = LabelOrigin("reader1", "demo-4", 3, "second look")


def made(folder: Path, one: Phantom | None = None) -> tuple[Dataset, Phantom, Geometry]:
    """A SEG of the phantom on the slices as stacked, read back from its bytes."""
    shown = (one or phantom()).displayed()
    _, headers, grid = write(folder, shown)
    return reread(build_segmentation(headers, shown.labels, NAMES, ORIGIN)), shown, grid


@pytest.mark.parametrize(("axes", "flips"), ORDERS)
def test_phantom_in_48_orders_reaches_training_voxel_by_voxel(
    tmp_path: Path, axes: tuple[int, ...], flips: tuple[int, ...]
) -> None:
    for oblique in (False, True):
        truth = phantom(oblique)
        stored = truth.stored(axes, flips)
        folder = tmp_path / str(oblique)
        _, headers, grid = write(folder, stored)
        image = read_volume(folder)
        assert np.array_equal(truth.at(image.geometry, image.array), truth.image)
        # OHIF sends the voxels of the volume on display, first axis fastest, without a header.
        sent = stored.displayed().labels.tobytes(order="F")
        mask = np.frombuffer(sent, np.uint8).reshape(image.geometry.shape, order="F")
        seg = reread(build_segmentation(headers, mask, NAMES, ORIGIN))
        order = np.random.default_rng(1).permutation(int(seg.NumberOfFrames)).tolist()
        back = read_segmentation(with_frames(renumbered(seg), order), grid)
        assert back.warnings == ()
        write_mask(tmp_path / "training.nii.gz", back.mask, grid)
        labels, label_grid = read_mask(tmp_path / "training.nii.gz")
        assert np.array_equal(truth.at(label_grid, labels), truth.labels)


def test_segments_are_named_coded_and_tracked(tmp_path: Path) -> None:
    seg, _, _ = made(tmp_path / "s")
    assert [str(item.SegmentLabel) for item in seg.SegmentSequence] == ["kidney_right", "liver", "lesion"]
    kidney, _, lesion = seg.SegmentSequence
    assert kidney.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning == "Anatomical Structure"
    kind = kidney.SegmentedPropertyTypeCodeSequence[0]
    assert (kind.CodeValue, kind.CodingSchemeDesignator) == ("64033007", "SCT")
    assert kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Right"
    assert lesion.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Lesion"
    assert {item.SegmentAlgorithmType for item in seg.SegmentSequence} == {"SEMIAUTOMATIC"}
    assert kidney.SegmentationAlgorithmIdentificationSequence[0].AlgorithmVersion == "demo-4"
    assert seg.ContentDescription == "MedVL-SAM2 labels version 3 by reader1: second look"
    assert str(seg.ContentCreatorName) == "reader1^"
    again, _, _ = made(tmp_path / "s")
    assert again.SegmentSequence[0].TrackingID == kidney.TrackingID == "kidney_right"
    assert seg.SegmentationType == "BINARY"
    assert all(frame.any() for frame in planes(seg))


def test_tracking_stays_with_the_structure_of_a_series(tmp_path: Path) -> None:
    _, headers, _ = write(tmp_path / "s", phantom())
    labels = phantom().labels
    both = [build_segmentation(headers, part, NAMES, ORIGIN) for part in (labels, np.where(labels == 5, 5, 0))]
    liver = [next(item for item in seg.SegmentSequence if item.SegmentLabel == "liver") for seg in both]
    assert liver[0].TrackingUID == liver[1].TrackingUID != both[0].SegmentSequence[0].TrackingUID
    assert [item.SegmentNumber for item in liver] == [2, 1]


def test_label_by_hand_is_manual_and_keeps_a_long_name(tmp_path: Path) -> None:
    _, headers, grid = write(tmp_path / "s", phantom())
    name = "hypodense lesion in segment VI of the liver, next to the right hepatic vein\\portal branch"
    labels = np.where(phantom().labels == 5, 40, 0)
    seg = reread(build_segmentation(headers, labels, {40: name}, LabelOrigin("Doe^Jane")))
    item = seg.SegmentSequence[0]
    assert item.SegmentAlgorithmType == "MANUAL"
    assert len(item.SegmentLabel) == 64
    assert item.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Tissue"
    assert str(seg.ContentCreatorName) == "Doe^Jane"
    assert read_segmentation(seg, grid).names == {18: name}


def test_absent_labels_do_not_shift_names(tmp_path: Path) -> None:
    _, headers, grid = write(tmp_path / "s", phantom())
    labels = np.where(phantom().labels == 17, 40, 0)
    seg = reread(build_segmentation(headers, labels, NAMES, ORIGIN))
    back = read_segmentation(seg, grid)
    assert back.names == {18: "Zyste über der Niere"}
    assert np.array_equal(back.mask == 18, labels == 40)


def test_highdicom_reads_the_same_voxels(tmp_path: Path) -> None:
    seg, shown, _ = made(tmp_path / "s")
    seg.save_as(tmp_path / "seg.dcm")
    reader = highdicom.seg.segread(tmp_path / "seg.dcm")
    uids = [item.ReferencedSOPInstanceUID for item in reader.ReferencedSeriesSequence[0].ReferencedInstanceSequence]
    frames = reader.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    for number, value in enumerate((2, 5, 17)):
        assert np.array_equal(frames[..., number].transpose(2, 1, 0), shown.labels == value)


def test_dcmqi_reads_the_same_voxels(tmp_path: Path) -> None:
    program = shutil.which("segimage2itkimage", path=str(Path(sys.executable).parent)) or shutil.which(
        "segimage2itkimage"
    )
    if program is None:
        pytest.skip("segimage2itkimage is not installed; install dcmqi")
    seg, shown, _ = made(tmp_path / "s")
    seg.save_as(tmp_path / "seg.dcm")
    (tmp_path / "out").mkdir()
    command = [program, "--inputDICOM", str(tmp_path / "seg.dcm"), "--outputDirectory", str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    for number, value in enumerate((2, 5, 17), start=1):
        image = sitk.ReadImage(str(tmp_path / "out" / f"{number}.nrrd"))
        array = sitk.GetArrayFromImage(image).T
        on = Geometry(array.shape, itk_affine(image)).voxel_to_world(np.argwhere(array))
        voxels = shown.geometry.world_to_voxel(on)
        np.testing.assert_allclose(voxels, np.rint(voxels), atol=1e-2)
        assert {tuple(v) for v in np.rint(voxels).astype(int)} == {tuple(v) for v in np.argwhere(shown.labels == value)}


@pytest.mark.parametrize("name", CLASSES)
def test_vocabulary_is_coded_and_found_again_by_code(name: str) -> None:
    code = structure_code(name)
    assert code.kind == getattr(codes.SCT, str(code.kind.meaning).title().replace(" ", ""))
    segment, kind, side = Dataset(), Dataset(), Dataset()
    kind.CodeValue, kind.CodingSchemeDesignator = code.kind.value, code.kind.scheme_designator
    if code.side:
        assert code.side.meaning.lower() in name
        side.CodeValue, side.CodingSchemeDesignator = code.side.value, code.side.scheme_designator
        kind.SegmentedPropertyTypeModifierCodeSequence = [side]
    segment.SegmentNumber, segment.SegmentLabel, segment.SegmentedPropertyTypeCodeSequence = 3, "Segment 3", [kind]
    assert segment_name(segment) == name


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("Right kidney", "kidney_right"),
        ("kidney right", "kidney_right"),
        ("LIVER ", "liver"),
        ("vertebrae L3", "vertebrae"),
        ("lung_upper_lobe_left", "lung_left"),
        ("Liver segment VI", "Liver segment VI"),
        ("Kidney", "Kidney"),
    ],
)
def test_names_of_other_programs(label: str, name: str) -> None:
    assert structure_name(label) == name


def test_unknown_names_follow_the_vocabulary_and_equal_ones_are_one(tmp_path: Path) -> None:
    seg, shown, grid = made(tmp_path / "s")
    for item, label in zip(seg.SegmentSequence, ("zebra", "Apple", "zebra"), strict=True):
        item.SegmentLabel = item.SegmentDescription = label
    back = read_segmentation(seg, grid)
    assert back.names == {18: "Apple", 19: "zebra"}
    assert np.array_equal(back.mask == 19, np.isin(shown.labels, (2, 17)))


def test_overlap_keeps_the_higher_segment_and_says_so(tmp_path: Path) -> None:
    seg, shown, grid = made(tmp_path / "s")
    liver = [n for n, f in enumerate(seg.PerFrameFunctionalGroupsSequence) if _segment(f) == 2]
    other = with_frames(seg, [*range(int(seg.NumberOfFrames)), liver[0]])
    other.PerFrameFunctionalGroupsSequence[-1].SegmentIdentificationSequence[0].ReferencedSegmentNumber = 3
    back = read_segmentation(reread(other), grid)
    covered = int(planes(seg)[liver[0]].sum())
    assert back.warnings == (f"segments overlap in {covered} voxels; the one with the higher number was kept there",)
    assert (back.mask == 17).sum() == covered + (shown.labels == 17).sum()


def _segment(frame: Dataset) -> int:
    return int(frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber)


def test_part_of_the_volume_and_part_of_a_slice(tmp_path: Path) -> None:
    seg, shown, grid = made(tmp_path / "s")
    rows, columns = slice(1, 9), slice(1, 6)
    cut = with_frames(seg, range(int(seg.NumberOfFrames)), planes(seg)[:, rows, columns])
    shift = np.linalg.inv(np.diag([-1.0, -1, 1])) @ shown.affine[:3, :3] @ [columns.start, rows.start, 0]
    for frame in cut.PerFrameFunctionalGroupsSequence:
        position = frame.PlanePositionSequence[0]
        position.ImagePositionPatient = (np.array(position.ImagePositionPatient, float) + shift).round(6).tolist()
    expected = np.zeros_like(shown.labels)
    expected[columns, rows] = shown.labels[columns, rows]
    assert np.array_equal(read_segmentation(reread(cut), grid).mask, expected)


def test_another_grid_is_resampled_with_a_warning(tmp_path: Path) -> None:
    seg, shown, _ = made(tmp_path / "s", phantom(oblique=False))
    fine = Geometry((14, 18, 5), shown.affine @ _halved())
    back = read_segmentation(seg, fine)
    assert back.warnings == ("the segmentation lies on another grid and was resampled to the image's",)
    assert np.array_equal(back.mask, shown.labels.repeat(2, axis=0).repeat(2, axis=1))


def _halved() -> np.ndarray:
    matrix = np.diag([0.5, 0.5, 1.0, 1.0])
    matrix[:2, 3] = -0.25
    return matrix


def test_another_place_is_refused(tmp_path: Path) -> None:
    seg, _, grid = made(tmp_path / "s")
    away = grid.affine.copy()
    away[:3, 3] += 500
    with pytest.raises(GeometryError, match="no voxel inside the image"):
        read_segmentation(seg, Geometry(grid.shape, away))


def test_objects_that_are_no_readable_segmentation(tmp_path: Path) -> None:
    seg, _, grid = made(tmp_path / "s")
    labelmap = reread(seg)
    labelmap.SegmentationType = "LABELMAP"
    with pytest.raises(DataError, match="LABELMAP cannot be read"):
        read_segmentation(labelmap, grid)
    image = Dataset()
    image.Modality = "CT"
    with pytest.raises(DataError, match="no DICOM SEG"):
        read_segmentation(image, grid)
    placeless = reread(seg)
    del placeless.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence
    with pytest.raises(GeometryError, match="frame 2 has no PlanePositionSequence"):
        read_segmentation(placeless, grid)
    undescribed = reread(seg)
    del undescribed.SegmentSequence[2]
    with pytest.raises(DataError, match="segment 3, which is not described"):
        read_segmentation(undescribed, grid)


@pytest.mark.parametrize(
    ("labels", "names", "reason"),
    [
        (np.zeros((7, 9, 5), np.uint8), NAMES, "label is empty"),
        (phantom().labels, {2: "kidney_right", 5: " "}, "mask value 5 has no name"),
        (phantom().labels[:, :, 1:], NAMES, r"not on the series' grid \(7, 9, 5\)"),
    ],
)
def test_labels_that_make_no_segmentation(
    tmp_path: Path, labels: np.ndarray, names: dict[int, str], reason: str
) -> None:
    _, headers, _ = write(tmp_path / "s", phantom())
    with pytest.raises((DataError, GeometryError), match=reason):
        build_segmentation(headers, labels, names, ORIGIN)


@pytest.mark.parametrize("tag", ["FrameOfReferenceUID", "StudyInstanceUID", "SOPInstanceUID"])
def test_series_without_identifiers_is_explained(tmp_path: Path, tag: str) -> None:
    series, _, _ = write(tmp_path / "s", phantom())
    header = pydicom.dcmread(series.files[2])
    delattr(header, tag)
    header.save_as(series.files[2])
    with pytest.raises(DataError, match=f"has no {tag}"):
        source_headers(series.files)


def test_several_frames_of_reference_are_explained(tmp_path: Path) -> None:
    series, _, _ = write(tmp_path / "s", phantom())
    header = pydicom.dcmread(series.files[2])
    header.FrameOfReferenceUID = pydicom.uid.generate_uid()
    header.save_as(series.files[2])
    with pytest.raises(DataError, match="2 values of FrameOfReferenceUID"):
        source_headers(series.files)


def test_headers_without_patient_data_will_do(tmp_path: Path) -> None:
    bare = dict.fromkeys(("PatientID", "PatientName", "PatientBirthDate", "StudyID", "AccessionNumber", "StudyTime"))
    _, headers, grid = write(tmp_path / "s", phantom(), **bare)
    seg = reread(build_segmentation(headers, phantom().labels, NAMES, ORIGIN))
    assert np.array_equal(read_segmentation(seg, grid).mask, phantom().labels)
    assert seg.PatientID == ""


@pytest.mark.shared_data
def test_segmentations_of_dcmqi(shared_data: Path) -> None:
    folder = shared_data / "dcmqi_ct3_dicomseg"
    grid = read_dicom_grid(sorted((folder / "dicom").iterdir()), folder).geometry
    liver = read_segmentation(pydicom.dcmread(folder / "liver_seg.dcm"), grid)
    assert liver.names == {5: "liver"}
    truth, _ = read_mask(folder / "liver_seg.nrrd", like=grid)
    assert np.array_equal(liver.mask > 0, truth > 0)
    assert truth.any()
