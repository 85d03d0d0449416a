"""Cases as image, geometry and masks: merging, sides, and files that are not what the record says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

import dataset_folders as folders
from dataset_folders import SHAPE, axes_affine, phantom, save_array, save_nifti
from medvl_sam2.datasets.case_cache import CaseCache
from medvl_sam2.datasets.label_layers import LayerBuilder, side_votes
from medvl_sam2.datasets.label_names import opposite_side
from medvl_sam2.datasets.manifest import CaseRecord, Grid, ImageFile, LabelFile, Split
from medvl_sam2.datasets.volumes import LoadedCase, read_case
from medvl_sam2.errors import ConfigError, DataError, MedVLError, VolumeError
from medvl_sam2.types import Modality
from medvl_sam2.volume_io import read_mask, read_volume

KIDNEYS = {1: "kidney_right", 2: "kidney_left", 3: "liver"}


def record(image: ImageFile, *labels: LabelFile, modality: Modality = Modality.CT) -> CaseRecord:
    return CaseRecord("set/1", "set", "set/1", Split.TRAIN, modality, "x", image, labels)


def test_overlapping_masks_keep_all_their_voxels() -> None:
    builder = LayerBuilder((3, 4, 5), ("liver", "tumour", "spleen"))
    builder.add(np.arange(20), "liver")
    builder.add(np.arange(5, 8), "tumour")
    builder.add(np.arange(25, 30), "liver")  # a second file of the same structure
    labels = builder.built()
    assert labels.maps.shape == (2, 3, 4, 5)
    assert labels.maps.dtype == np.uint8
    assert labels.mask("liver").sum() == 25
    assert np.flatnonzero(labels.mask("tumour")).tolist() == [5, 6, 7]
    assert labels.present == ("liver", "tumour")
    assert not labels.mask("spleen").any()
    with pytest.raises(DataError, match="'heart' is not labelled"):
        labels.mask("heart")


def test_many_names_take_two_bytes() -> None:
    names = tuple(f"rib_{n}" for n in range(300))
    builder = LayerBuilder((5, 8, 9), names)
    builder.add(np.array([7]), names[299])
    labels = builder.built()
    assert labels.maps.dtype == np.uint16
    assert labels.mask("rib_299").ravel()[7]


def test_mirrored_labels_are_refused_where_the_file_states_the_sides(tmp_path: Path) -> None:
    case = phantom(axes_affine("RAS", turn=True))
    save_nifti(tmp_path / "ct.nii.gz", case.array, case.affine)
    mirrored = np.array([0, 2, 1, 3], dtype=np.uint8)[case.labels]
    save_nifti(tmp_path / "mask.nii.gz", mirrored, case.affine)
    with pytest.raises(DataError, match="left and right labels lie on the other side"):
        read_case(record(ImageFile("ct.nii.gz"), LabelFile("mask.nii.gz", KIDNEYS)), tmp_path)


def test_a_mask_on_another_grid_is_placed_by_its_affine(tmp_path: Path) -> None:
    case, other = phantom(axes_affine("RAS")), phantom(axes_affine("LPI"))
    save_nifti(tmp_path / "ct.nii.gz", case.array, case.affine)
    save_nifti(tmp_path / "mask.nii.gz", other.labels, other.affine)
    loaded = read_case(record(ImageFile("ct.nii.gz"), LabelFile("mask.nii.gz", KIDNEYS)), tmp_path)
    assert loaded.labels is not None
    for value, name in KIDNEYS.items():
        assert np.array_equal(loaded.labels.mask(name), case.labels == value)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SRA", "IPL"])
def test_a_stated_grid_replaces_the_header(tmp_path: Path, axes: str) -> None:
    case = phantom(axes_affine(axes))
    save_nifti(tmp_path / "ct.nii.gz", case.array, axes_affine("PIR"))
    save_array(tmp_path / "mask.npy", case.labels)
    image = ImageFile("ct.nii.gz", grid=Grid(axes, folders.SPACING), rescale=(0.5, 3.0))
    loaded = read_case(record(image, LabelFile("mask.npy", KIDNEYS)), tmp_path)
    assert np.allclose(loaded.volume.geometry.affine[:3, :3], case.affine[:3, :3])
    assert np.array_equal(loaded.volume.array, case.array * 0.5 + 3)


def _torn_files(folder: Path) -> dict[str, CaseRecord]:
    """Records whose files are not what they should be, by what the message must say."""
    case = phantom(axes_affine("RAS"))
    save_nifti(folder / "ct.nii.gz", case.array, case.affine)
    save_nifti(folder / "far.nii.gz", case.labels, np.diag([1.0, 1.0, 1.0, 1.0]) + 1000 * np.eye(4, k=3))
    save_array(folder / "ct.npy", case.array[None])
    save_array(folder / "flat.npy", case.array[0])
    save_array(folder / "small.npy", case.labels[1:])
    (folder / "torn.npy").write_bytes(b"\x93NUMPY torn")
    np.save(folder / "objects.npy", np.array([{}, None], dtype=object))  # pickled inside
    (folder / f"mask_{(3, *SHAPE)}.npz").write_bytes(b"PK torn")
    wrong = folder / "wrong" / f"mask_{(3, *SHAPE)}"
    wrong.parent.mkdir()
    sparse.save_npz(wrong, sparse.csr_matrix(np.zeros((3, 7))))
    (folder / "empty").mkdir()
    (folder / "words").mkdir()
    (folder / "words" / "scout.png").write_bytes(b"png")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "1.png").write_bytes(b"png")
    grid = Grid("RAS")
    npy = ImageFile("ct.npy", grid=grid)
    return {
        "does not exist": record(ImageFile("gone.nii.gz")),
        "No such file": record(ImageFile("gone.npy", grid=grid)),
        "states no orientation; give its record a grid": record(ImageFile("ct.npy")),
        "one 3D grey image": record(ImageFile("flat.npy", grid=grid)),
        "torn.npy is not a readable array": record(ImageFile("torn.npy", grid=grid)),
        "objects.npy is not a readable array": record(ImageFile("objects.npy", grid=grid)),
        "has no frame 1": record(ImageFile("ct.nii.gz", index=1)),
        "no pictures named by number": record(ImageFile("empty", grid=grid)),
        "named by number": record(ImageFile("words", grid=grid)),
        "not a readable picture": record(ImageFile("pictures", grid=grid)),
        "does not meet the image": record(ImageFile("ct.nii.gz"), LabelFile("far.nii.gz", KIDNEYS)),
        "not on the image grid": record(npy, LabelFile("small.npy", KIDNEYS)),
        "not a readable sparse matrix": record(npy, LabelFile(f"mask_{(3, *SHAPE)}.npz", KIDNEYS)),
        "matrix of shape (3, 7)": record(npy, LabelFile(f"wrong/mask_{(3, *SHAPE)}.npz", KIDNEYS)),
        "holds 3 classes, the record names 4": record(npy, LabelFile(f"few/mask_{(3, *SHAPE)}.npz", {4: "spleen"})),
    }


def test_every_broken_file_says_what_is_wrong(tmp_path: Path) -> None:
    records = _torn_files(tmp_path)
    folders.m3d_seg_case(tmp_path / "few", phantom(axes_affine("RAS")))
    for message, broken in records.items():
        with pytest.raises((VolumeError, DataError)) as caught:
            read_case(broken, tmp_path)
        assert message in str(caught.value)


def _cached(folder: Path, count: int = 3) -> tuple[list[CaseRecord], Path]:
    records = []
    for number in range(count):
        folders.labelled(folder, f"ct{number}.nii", f"mask{number}.nii", "RAS", number)
        made = record(ImageFile(f"ct{number}.nii"), LabelFile(f"mask{number}.nii", KIDNEYS))
        records.append(dataclasses.replace(made, id=f"set/{number}"))
    return records, folder


def _same(first: LoadedCase, second: LoadedCase) -> bool:
    assert first.labels is not None
    assert second.labels is not None
    return (
        np.array_equal(first.volume.array, second.volume.array)
        and first.volume.array.dtype == second.volume.array.dtype
        and np.array_equal(first.volume.geometry.affine, second.volume.geometry.affine)
        and np.array_equal(first.labels.maps, second.labels.maps)
        and (first.labels.names, first.labels.present) == (second.labels.names, second.labels.present)
        and (first.record, first.sides_known) == (second.record, second.sides_known)
    )


def _held(cache: CaseCache) -> list[Path]:
    return sorted(cache.folder.glob("*.npz"))


def test_cached_case_is_the_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first, *_), root = _cached(tmp_path / "data")
    cache = CaseCache(tmp_path / "cache", 10**7)
    fresh = cache.read(first, root)
    assert _same(fresh, read_case(first, root))
    monkeypatch.setattr("medvl_sam2.datasets.case_cache.read_case", None)  # a second reading would fail
    assert _same(cache.read(first, root), fresh)


def test_cache_notices_a_changed_file_and_a_changed_record(tmp_path: Path) -> None:
    (first, *_), root = _cached(tmp_path / "data")
    cache = CaseCache(tmp_path / "cache", 10**7)
    cache.read(first, root)
    case = phantom(axes_affine("RAS", turn=True), seed=9)
    save_nifti(root / "ct0.nii", case.array, case.affine)  # as many bytes as before
    assert np.array_equal(cache.read(first, root).volume.array, case.array)
    renamed = dataclasses.replace(first, labels=(LabelFile("mask0.nii", {1: "spleen"}),))
    labels = cache.read(renamed, root).labels
    assert labels is not None
    assert labels.present == ("spleen",)


def test_cache_keeps_its_budget_and_drops_the_longest_unused(tmp_path: Path) -> None:
    records, root = _cached(tmp_path / "data", 4)
    probe = CaseCache(tmp_path / "probe", 10**7)
    probe.read(records[0], root)
    one = _held(probe)[0].stat().st_size
    cache = CaseCache(tmp_path / "cache", 2 * one + 8192)
    for r in records[:2]:
        cache.read(r, root)
    kept, dropped = _held(cache) if _held(cache)[0] == _path(cache, records[0], root) else _held(cache)[::-1]
    cache.read(records[0], root)  # used again: the other one is now the oldest
    cache.read(records[2], root)
    assert kept.exists()
    assert not dropped.exists()
    assert sum(path.stat().st_size for path in _held(cache)) <= cache.max_bytes
    tiny = CaseCache(tmp_path / "tiny", one // 2)
    tiny.read(records[3], root)
    assert _held(tiny) == []
    with pytest.raises(ConfigError, match="positive number of bytes"):
        CaseCache(tmp_path / "none", 0)


def _path(cache: CaseCache, wanted: CaseRecord, root: Path) -> Path:
    """Where a case lies: the only file of a fresh cache that holds it."""
    alone = CaseCache(cache.folder.with_name("alone"), 10**7)
    alone.read(wanted, root)
    return cache.folder / _held(alone)[0].name


def test_torn_and_abandoned_cache_files_count_as_absent(tmp_path: Path) -> None:
    records, root = _cached(tmp_path / "data")
    cache = CaseCache(tmp_path / "cache", 10**7)
    fresh = cache.read(records[0], root)
    (held,) = _held(cache)
    held.write_bytes(held.read_bytes()[:200])
    abandoned = held.with_name("x.npz.writing")
    abandoned.write_bytes(b"half")
    assert _same(cache.read(records[0], root), fresh)
    assert not abandoned.exists()
    assert _same(cache.read(records[0], root), fresh)


def test_a_full_disk_costs_the_cache_not_the_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    (first, *_), root = _cached(tmp_path / "data")
    cache = CaseCache(tmp_path / "cache", 10**7)
    monkeypatch.setattr(np, "savez", full)
    assert _same(cache.read(first, root), read_case(first, root))
    assert "No space left on device" in caplog.text
    assert _held(cache) == []


def test_a_broken_case_is_not_cached(tmp_path: Path) -> None:
    cache = CaseCache(tmp_path / "cache", 10**7)
    with pytest.raises(MedVLError):
        cache.read(record(ImageFile("gone.nii.gz")), tmp_path)
    assert _held(cache) == []


@pytest.mark.shared_data
def test_real_abdomen_in_three_layouts(shared_data: Path, tmp_path: Path) -> None:
    """As TotalSegmentator stores it, and as M3D-Seg would with and without a mirrored first axis: one anatomy."""
    source = shared_data / "ts_ct_wholeabdomen_3mm"
    volume = read_volume(source / "ct.nii.gz")
    labels, _ = read_mask(source / "seg_total_fast.nii.gz")
    table = json.loads((source / "labels.json").read_text())
    names = {int(v): name for v, name in table.items() if v.isdecimal() and (labels == int(v)).any()}
    assert {"kidney_left", "kidney_right", "spleen"} <= set(names.values())
    folder = tmp_path / "s0001"
    save_nifti(folder / "ct.nii.gz", volume.array, volume.geometry.affine)
    for value, name in names.items():
        mask = (labels == value).astype(np.uint8)
        save_nifti(folder / "segmentations" / f"{name}.nii.gz", mask, volume.geometry.affine)
    folders.save_table(tmp_path / "meta.csv", [{"image_id": "s0001", "split": "train"}], ";")
    (stated,) = folders.found("totalsegmentator", tmp_path).records
    case = read_case(stated, tmp_path)
    assert case.labels is not None
    assert case.sides_known
    pairs = [n for n in names.values() if "left" in n.split("_") and opposite_side(n) in names.values()]
    assert side_votes(case.labels, case.volume.geometry) == len(pairs) > 10
    for value, name in names.items():
        assert np.array_equal(case.labels.mask(name), labels == value)
    for number, flip in enumerate((1, -1)):
        save_array(tmp_path / f"{number}.npy", volume.array[None, ::flip])
        save_array(tmp_path / f"mask{number}.npy", labels[::flip])
        image = ImageFile(f"{number}.npy", grid=Grid("RAS", assumed=True))
        turned = read_case(record(image, LabelFile(f"mask{number}.npy", names)), tmp_path)
        assert turned.labels is not None
        assert turned.sides_known
        assert side_votes(turned.labels, turned.volume.geometry) == len(pairs)
