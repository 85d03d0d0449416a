"""Files to volumes and masks to files: the same grid for every reader, or a reason."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from medvl_sam2.errors import VolumeError
from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.types import Geometry, Modality
from medvl_sam2.volume_io import (
    Stated,
    count_labels,
    label_counts,
    read_geometry,
    read_labels,
    read_mask,
    read_volume,
    write_mask,
)
from volume_files import SHAPE, hounsfield, itk_affine, turned


def affine(axes: str = "LPS", oblique: bool = True) -> np.ndarray:
    """Spacing (0.7, 1.1, 5) mm, stored axes to ``axes`` and then turned."""
    columns = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    out = np.eye(4)
    out[:3, :3] = np.array([columns[c] for c in axes], dtype=float).T * (0.7, 1.1, 5.0)
    if oblique:
        out[:3, :3] = turned() @ out[:3, :3]
    out[:3, 3] = (-31.0, 12.5, 400.25)
    return out


def save_nifti(path: Path, array: np.ndarray, matrix: np.ndarray | None = None) -> Path:
    image = nib.Nifti1Image(array, affine() if matrix is None else matrix)
    image.set_qform(image.affine, code=1)
    nib.save(image, path)
    return path


# NIfTI, NRRD, MetaImage


@pytest.mark.parametrize("oblique", [False, True], ids=["straight", "oblique"])
@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "ASL"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_grid_and_voxels_are_those_itk_sees(tmp_path: Path, suffix: str, axes: str, oblique: bool) -> None:
    source = save_nifti(tmp_path / "image.nii.gz", hounsfield(), affine(axes, oblique))
    image = sitk.ReadImage(str(source))
    path = tmp_path / f"copy{suffix}"
    sitk.WriteImage(image, str(path))
    volume = read_volume(path)
    assert volume.modality is Modality.CT
    assert volume.source == path
    assert np.array_equal(volume.array, hounsfield())
    np.testing.assert_allclose(volume.geometry.affine, affine(axes, oblique), atol=1e-3)
    np.testing.assert_allclose(volume.geometry.affine, itk_affine(image), atol=1e-3)


@pytest.mark.parametrize("oblique", [False, True], ids=["straight", "oblique"])
@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR"])
@pytest.mark.parametrize("suffix", [".nrrd", ".nii.gz", ".nii"])
def test_written_mask_lies_on_the_source_grid_for_itk(tmp_path: Path, suffix: str, axes: str, oblique: bool) -> None:
    source = save_nifti(tmp_path / "image.nii.gz", hounsfield(), affine(axes, oblique))
    volume = read_volume(source)
    mask = np.random.default_rng(3).integers(0, 7, SHAPE)
    path = tmp_path / f"mask{suffix}"
    write_mask(path, mask, volume.geometry)

    image, seen = sitk.ReadImage(str(source)), sitk.ReadImage(str(path))
    assert seen.GetPixelID() == sitk.sitkUInt8
    assert seen.GetSize() == image.GetSize()
    np.testing.assert_allclose(itk_affine(seen), itk_affine(image), atol=1e-3)
    assert np.array_equal(sitk.GetArrayFromImage(seen).T, mask)
    back, geometry = read_mask(path)
    assert back.dtype == np.uint16
    assert np.array_equal(back, mask)
    assert geometry.matches(volume.geometry)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["image.nii.gz", path.name])


def test_nrrd_is_what_ohif_takes(tmp_path: Path) -> None:
    path = tmp_path / "mask.nrrd"
    write_mask(path, np.ones(SHAPE, dtype=bool), Geometry(SHAPE, affine()))
    header = path.read_bytes().split(b"\n\n")[0].decode()
    assert "type: unsigned char" in header
    assert "space: left-posterior-superior" in header
    assert "encoding: gzip" in header
    assert f"sizes: {SHAPE[0]} {SHAPE[1]} {SHAPE[2]}" in header


def test_values_survive_exactly_or_as_float32(tmp_path: Path) -> None:
    whole = read_volume(save_nifti(tmp_path / "a.nii", hounsfield().astype(np.float64)))
    assert whole.array.dtype == np.int16
    broken = read_volume(save_nifti(tmp_path / "b.nii", hounsfield() + 0.5))
    assert broken.array.dtype == np.float32
    assert np.array_equal(broken.array, hounsfield() + np.float32(0.5))
    large = read_volume(save_nifti(tmp_path / "c.nii", hounsfield().astype(np.int32) + 40_000))
    assert large.array.dtype == np.float32
    image = nib.Nifti1Image(hounsfield(), affine())
    image.header.set_slope_inter(2, -1000)
    nib.save(image, tmp_path / "d.nii")
    assert np.array_equal(read_volume(tmp_path / "d.nii").array, np.asarray(nib.load(tmp_path / "d.nii").dataobj))


def test_modality_argument_wins_and_decides_what_replaces_nan(tmp_path: Path) -> None:
    array = hounsfield().astype(np.float32)
    array[0, 0, 0] = np.nan
    path = save_nifti(tmp_path / "a.nii.gz", array)
    assert read_volume(path).array[0, 0, 0] == -1024
    forced = read_volume(path, Modality.MR)
    assert forced.modality is Modality.MR
    assert forced.array[0, 0, 0] == 0


def test_trailing_single_axes_and_two_dimensions_are_taken(tmp_path: Path) -> None:
    assert read_volume(save_nifti(tmp_path / "a.nii", hounsfield((*SHAPE, 1)))).array.shape == SHAPE
    assert read_volume(save_nifti(tmp_path / "b.nii", hounsfield((6, 9)))).array.shape == (6, 9, 1)


def sheared() -> np.ndarray:
    matrix = np.diag([1.0, 1.0, 2.0, 1.0])
    matrix[0, 2] = 2 * np.tan(np.radians(5))
    return matrix


def test_a_hair_of_shear_is_rounding_not_tilt(tmp_path: Path) -> None:
    matrix = affine()
    matrix[:3, 0] += matrix[:3, 1] * 0.001
    np.testing.assert_allclose(
        read_volume(save_nifti(tmp_path / "a.nii", hounsfield(), matrix)).geometry.affine, matrix
    )


@pytest.mark.parametrize(
    ("array", "matrix", "reason"),
    [
        (hounsfield((4, 4, 4, 3)), None, "4D"),
        (hounsfield((4, 4, 4, 1, 3)), None, "5D"),
        (np.ones((4, 4, 4), dtype=np.complex64), None, "complex"),
        (np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]), None, "colour"),
        (np.full((4, 4, 4), 7, dtype=np.int16), None, "empty: every voxel is 7"),
        (np.full((4, 4, 4), np.nan, dtype=np.float32), None, "no finite voxel"),
        (hounsfield(), sheared(), r"sheared grid \(axes 5.0 degrees"),
    ],
    ids=["4D", "5D", "complex", "rgb", "constant", "nan", "shear"],
)
def test_nifti_that_is_no_grey_volume(
    tmp_path: Path, array: np.ndarray, matrix: np.ndarray | None, reason: str
) -> None:
    image = nib.Nifti1Image(array, affine() if matrix is None else matrix)
    nib.save(image, tmp_path / "a.nii.gz")
    with pytest.raises(VolumeError, match=reason) as caught:
        read_volume(tmp_path / "a.nii.gz")
    assert "a.nii.gz" in str(caught.value)


def test_unplaceable_and_broken_files(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(hounsfield(), None), tmp_path / "codes0.nii")
    nib.save(nib.AnalyzeImage(hounsfield(), np.eye(4)), tmp_path / "old.img")
    whole = save_nifti(tmp_path / "whole.nii.gz", hounsfield()).read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    plain = save_nifti(tmp_path / "whole.nii", hounsfield()).read_bytes()
    (tmp_path / "cut.nii").write_bytes(plain[:-50])
    (tmp_path / "text.nii").write_text("no image")
    (tmp_path / "text.nrrd").write_text("no image")
    (tmp_path / "nospace.nrrd").write_bytes(
        b"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 2 2\nencoding: raw\n\n" + bytes(range(8))
    )
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.zip").write_text("no archive")
    (tmp_path / "text.dcm").write_text("no dicom")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((3, 4, 5, 3), np.uint8), isVector=True), str(tmp_path / "rgb.nrrd"))
    reasons = {
        "missing.nii": "does not exist",
        "codes0.nii": "no orientation",
        "old.img": "Analyze",
        "cut.nii.gz": "not a readable NIfTI",
        "cut.nii": "not a readable NIfTI",
        "text.nii": "not a readable NIfTI",
        "text.nrrd": "not a readable image",
        "nospace.nrrd": "no space",
        "rgb.nrrd": "vector",
        "image.png": "no kind that can be read",
        "empty": "no DICOM image",
        "text.zip": "zip archive",
        "text.dcm": "no DICOM image",
    }
    for name, reason in reasons.items():
        with pytest.raises(VolumeError, match=reason) as caught:
            read_volume(tmp_path / name)
        assert name in str(caught.value)


# Masks


def test_mask_is_placed_by_affine_not_by_index(tmp_path: Path) -> None:
    mask = np.zeros(SHAPE, dtype=np.uint8)
    mask[1:3, 2:6, 1:4] = 3
    home = Geometry(SHAPE, affine("LPS"))
    turned_grid = CanonicalTransform(home)
    write_mask(tmp_path / "m.nii.gz", turned_grid.forward_array(mask), turned_grid.canonical_geometry)
    placed, geometry = read_mask(tmp_path / "m.nii.gz", like=home)
    assert geometry is home
    assert np.array_equal(placed, mask)
    far = home.affine.copy()
    far[:3, 3] += 500
    with pytest.raises(VolumeError, match="does not meet"):
        read_mask(tmp_path / "m.nii.gz", like=Geometry(SHAPE, far))


def test_empty_masks_are_masks_and_fractions_are_not(tmp_path: Path) -> None:
    write_mask(tmp_path / "none.nrrd", np.zeros(SHAPE, dtype=np.uint8), Geometry(SHAPE, affine()))
    assert not read_mask(tmp_path / "none.nrrd")[0].any()
    for bad in (hounsfield(), np.full(SHAPE, 0.5, dtype=np.float32)):
        with pytest.raises(VolumeError, match="not a label map"):
            read_mask(save_nifti(tmp_path / "bad.nii", bad))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", ">u2", "int16", "float32"])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
def test_counts_are_those_of_the_voxels(tmp_path: Path, suffix: str, dtype: str) -> None:
    mask = np.random.default_rng(5).choice([0, 0, 1, 2, 250], (97, 61, 53)).astype(dtype)  # more than one piece
    path = save_nifti(tmp_path / f"mask{suffix}", mask)
    counts, grid = count_labels(path)
    assert counts == {value: int((mask == value).sum()) for value in (1, 2, 250)}
    labels, same = read_labels(path)
    assert label_counts(labels) == counts
    assert (labels == mask).all()
    assert grid.matches(same, tolerance_mm=1e-9)
    assert read_mask(path)[0].dtype == np.uint16


def test_counts_of_a_file_compressed_in_parts(tmp_path: Path) -> None:
    mask = np.random.default_rng(6).choice([0, 1, 3], (97, 61, 53)).astype(np.uint16)
    content = save_nifti(tmp_path / "mask.nii", mask).read_bytes()
    path = tmp_path / "mask.nii.gz"  # as parallel compressors write it, with zeros that fill its last block
    parts = content[:300_001], content[300_001:300_002], content[300_002:]
    path.write_bytes(b"".join(gzip.compress(part) for part in parts) + bytes(1000))
    assert count_labels(path)[0] == {value: int((mask == value).sum()) for value in (1, 3)}
    path.write_bytes(b"".join(gzip.compress(part) for part in parts[:2]))
    with pytest.raises(VolumeError, match="are missing"):
        count_labels(path)
    last = gzip.compress(parts[2])
    path.write_bytes(gzip.compress(parts[0]) + last[:10] + b"\xff" * 99 + last[109:])  # no block begins with ones
    with pytest.raises(VolumeError, match="block"):
        count_labels(path)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd"])
def test_grid_alone_is_that_of_the_volume(tmp_path: Path, suffix: str) -> None:
    path = save_nifti(tmp_path / "image.nii", hounsfield())
    if suffix == ".nrrd":
        sitk.WriteImage(sitk.ReadImage(str(path)), str(tmp_path / "image.nrrd"))
    elif suffix == ".nii.gz":
        nib.save(nib.load(path), tmp_path / "image.nii.gz")
    grid = read_geometry(tmp_path / f"image{suffix}")
    assert grid.matches(read_volume(tmp_path / f"image{suffix}").geometry, tolerance_mm=1e-9)
    with pytest.raises(VolumeError, match="does not exist"):
        read_geometry(tmp_path / f"none{suffix}")


def test_torn_masks_are_not_counted(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "mask.nii.gz", np.random.default_rng(6).integers(0, 3, (40, 30, 20)).astype(np.uint8))
    whole = path.read_bytes()
    checksum = bytearray(whole)
    checksum[-6] ^= 1
    for content in (whole[:-20], whole[: len(whole) // 2], bytes(checksum), whole[:5], b""):
        path.write_bytes(content)
        with pytest.raises(VolumeError, match="not a readable"):
            count_labels(path)
    with pytest.raises(VolumeError, match="4D"):
        count_labels(save_nifti(path, np.zeros((4, 5, 6, 2), np.uint8)))
    with pytest.raises(VolumeError, match="does not exist"):
        count_labels(tmp_path / "none.nii.gz")


def test_masks_that_cannot_be_written(tmp_path: Path) -> None:
    grid = Geometry(SHAPE, affine())
    good = np.zeros(SHAPE, dtype=np.uint8)
    for name, mask, reason in [
        ("m.png", good, "m.png"),
        ("m.nrrd", good[1:], "not on the image grid"),
        ("m.nrrd", good.astype(np.int16) + 256, "256"),
        ("m.nrrd", good.astype(np.float32), "float32"),
        ("gone/m.nrrd", good, "does not exist"),
    ]:
        with pytest.raises(VolumeError, match=reason):
            write_mask(tmp_path / name, mask, grid)
    assert list(tmp_path.iterdir()) == []


# Real files


@pytest.mark.shared_data
def test_one_head_in_eight_storage_orders(shared_data: Path) -> None:
    views = {}
    for path in sorted((shared_data / "hard_nifti_orientations").glob("*.nii.gz")):
        volume = read_volume(path)
        assert "".join(nib.aff2axcodes(volume.geometry.affine)) == path.name[:3]
        views[path.name] = CanonicalTransform(volume.geometry).forward_array(volume.array)
    assert len(views) == 8
    for view in views.values():
        assert np.array_equal(view, views["RAS.nii.gz"])


@pytest.mark.shared_data
def test_byte_orders_and_nifti2(shared_data: Path) -> None:
    folder = shared_data / "hard_nifti_bytes"
    big, little = read_volume(folder / "big.nii.gz"), read_volume(folder / "little.nii.gz")
    assert np.array_equal(big.array, little.array)
    assert big.geometry.matches(little.geometry)
    assert big.array.dtype.isnative
    assert read_volume(folder / "avg152T1_LR_nifti2.nii.gz").array.shape == (91, 109, 91)
    assert read_volume(shared_data / "hard_nifti_odd/low_res.nii.gz").array.shape == (7, 5, 3)


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("hard_dicom_gantry_tilt_variable_spacing/dicom.zip", r"tilted by 18.5 degrees and slice distances vary"),
        ("hard_dicom_multiframe_ct/volume.dcm", "multi-frame"),
        ("hard_dicom_transfer_syntaxes/no-pixel-data.dcm", "no image slices"),
        ("hard_dicom_transfer_syntaxes/no-pixel-spacing.dcm", "PixelSpacing"),
        ("hard_nifti_bytes/5D_small.nii", "5D"),
        ("hard_nifti_bytes/5D_zeros.nii.gz", "5D"),
        ("hard_nifti_bytes/air2.hdr.gz", "no kind"),
        ("hard_nifti_bytes/air2.img.gz", "no kind"),
        ("hard_nifti_bytes/not-nifti.nii", "not a readable NIfTI"),
        ("hard_nifti_odd/complex.nii.gz", "complex"),
        ("hard_nifti_odd/ct_perfusion.nii.gz", "colour"),
        ("hard_nifti_odd/minimal.nii.gz", "no orientation"),
        ("hard_nifti_odd/shear.nii.gz", "sheared grid"),
        ("dcmqi_ct3_dicomseg/liver_seg.dcm", "no image slices"),
    ],
)
def test_hard_inputs_are_refused_with_the_reason(shared_data: Path, name: str, reason: str) -> None:
    with pytest.raises(VolumeError, match=reason):
        read_volume(shared_data / name)


@pytest.mark.shared_data
def test_mask_of_another_crop_is_resampled(shared_data: Path) -> None:
    folder = shared_data / "ts_ct_pulmonary_1p5mm"
    volume = read_volume(folder / "ct.nii.gz")
    heart, geometry = read_mask(folder / "masks_wrong_grid/heart.nii.gz", like=volume.geometry)
    assert heart.shape == volume.array.shape
    assert geometry.matches(volume.geometry)
    assert 0 < np.median(volume.array[heart > 0]) < 500


@pytest.mark.shared_data
def test_read_only_sources_stay_untouched(shared_data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "ct.nii.gz"
    shutil.copy(shared_data / "ts_ct_abdomen_slab_3mm/ct.nii.gz", copy)
    before = copy.read_bytes()
    read_volume(copy).array[:] = 0
    assert copy.read_bytes() == before


# What a table states instead of the header


def test_a_table_may_state_grid_and_units(tmp_path: Path) -> None:
    stored = hounsfield()
    nib.save(nib.Nifti1Image(stored, None), tmp_path / "bare.nii.gz")  # no orientation at all
    with pytest.raises(VolumeError, match="states no orientation"):
        read_volume(tmp_path / "bare.nii.gz", Modality.CT, Stated(rescale=(2.0, 3.0)))
    volume = read_volume(tmp_path / "bare.nii.gz", Modality.CT, Stated(affine("PIR"), (2.0, -24.0)))
    assert np.array_equal(volume.array, stored * 2 - 24)
    assert volume.array.dtype == np.int16
    assert np.allclose(volume.geometry.affine, affine("PIR"))


def test_one_frame_of_a_series(tmp_path: Path) -> None:
    frames = np.stack([hounsfield(), hounsfield() + 7], axis=-1)
    path = save_nifti(tmp_path / "series.nii.gz", frames)
    assert np.array_equal(read_volume(path, stated=Stated(frame=1)).array, frames[..., 1])
    with pytest.raises(VolumeError, match="has no frame 2"):
        read_volume(path, stated=Stated(frame=2))
    with pytest.raises(VolumeError, match="4D"):
        read_volume(path)


def test_only_nifti_headers_are_replaced(tmp_path: Path) -> None:
    write_mask(tmp_path / "m.nrrd", np.ones(SHAPE, np.uint8), Geometry(SHAPE, affine()))
    with pytest.raises(VolumeError, match="no NIfTI file"):
        read_volume(tmp_path / "m.nrrd", stated=Stated(rescale=(1.0, 0.0)))
