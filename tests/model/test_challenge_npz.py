"""The challenge's npz files are read whole, and nothing in them is executed."""

from __future__ import annotations

import datetime
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medvl_sam2.errors import DataError
from medvl_sam2.evaluation.challenge.npz import read_npz


class Malicious:
    """Makes a directory when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def pickled(path: Path, value: object) -> Path:
    holder = np.empty(1, dtype=object)
    holder[0] = value
    np.savez_compressed(path, boxes=holder)
    return path


def test_prompts_of_the_challenge_are_read(tmp_path: Path) -> None:
    path = tmp_path / "case.npz"
    image = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    members: dict[str, Any] = {
        "imgs": np.asfortranarray(image),
        "spacing": (3.0, 0.5, 0.7),
        "boxes": [{"z_min": np.int64(1), "z_max": 2, "z_mid": np.float32(1.5)}, {"z_min": 0}],
        "clicks": [{"fg": [[np.int64(1), np.int64(2), 3]], "bg": []}, {"fg": [np.array([4, 5, 6])], "bg": [[7, 8, 9]]}],
        "clicks_order": [["fg", None], ["fg", "bg"]],
        "prev_pred": image > 3,
    }
    np.savez_compressed(path, **members)
    found = read_npz(path)
    assert set(found) == set(members)
    assert np.array_equal(found["imgs"], image)
    assert found["spacing"].tolist() == [3.0, 0.5, 0.7]
    assert found["boxes"] == [{"z_min": 1, "z_max": 2, "z_mid": 1.5}, {"z_min": 0}]
    assert found["clicks"] == [{"fg": [[1, 2, 3]], "bg": []}, {"fg": [[4, 5, 6]], "bg": [[7, 8, 9]]}]
    assert [list(order) for order in found["clicks_order"]] == [["fg", None], ["fg", "bg"]]


def test_a_malicious_pickle_is_refused_by_name_and_does_nothing(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    path = pickled(tmp_path / "bad.npz", {"z_min": Malicious(trap)})
    with pytest.raises(DataError, match=r"bad\.npz: .*\.mkdir, which is no data"):
        read_npz(path)
    assert not trap.exists()
    # The same file as numpy would read it when told to trust it: the trap is real.
    assert b"mkdir" in zipfile.ZipFile(path).read("boxes.npy")


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({1, 2}, "set"),
        (b"raw", "bytes"),
        (datetime.date(2025, 6, 11), "datetime.date"),
        (1j, "complex"),
        (np.array([(1, 2)], dtype="i4,i4"), "V8"),
        (np.datetime64(3, "s"), "M8"),
        (Path("x"), "pathlib"),
    ],
)
def test_what_is_no_data_is_named(tmp_path: Path, value: object, named: str) -> None:
    with pytest.raises(DataError, match=named):
        read_npz(pickled(tmp_path / "odd.npz", value))


def test_a_pickle_that_unfolds_without_end_is_refused(tmp_path: Path) -> None:
    laughs: list[Any] = ["ha"]
    for _ in range(6):
        laughs = [laughs] * 10
    with pytest.raises(DataError, match="more than 100000 values"):
        read_npz(pickled(tmp_path / "laughs.npz", laughs))
    shared = np.empty(1, dtype=object)
    shared[0] = "ha"
    deep = shared.reshape((1,) * 32)
    with pytest.raises(DataError, match="more than 100000 values"):
        read_npz(pickled(tmp_path / "deep.npz", [deep] * 5000))
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(DataError, match=r"circle\.npz"):
        read_npz(pickled(tmp_path / "circle.npz", circle))


@pytest.mark.parametrize("shape", [(2_000_000, 0), (100_000, 1, 0)])
def test_lists_round_nothing_count_as_values(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = pickled(tmp_path / "hollow.npz", np.zeros(shape))
    assert path.stat().st_size < 1000
    with pytest.raises(DataError, match="more than 100000 values"):
        read_npz(path)


def test_an_array_of_no_clicks_is_an_empty_list(tmp_path: Path) -> None:
    assert read_npz(pickled(tmp_path / "none.npz", {"fg": np.zeros((0, 3)), "bg": np.zeros(0)}))["boxes"] == [
        {"fg": [], "bg": []}
    ]


@pytest.mark.parametrize(
    ("shape", "message"),
    [(b"M-\x01", r"holds 300 values as shape \(301,\)"), (b"J\xff\xff\xff\xff", r"array of shape \(-1,\)")],
)
def test_a_shape_that_does_not_fit_the_values_is_refused(tmp_path: Path, shape: bytes, message: str) -> None:
    path = pickled(tmp_path / "false.npz", np.arange(300.0))
    with zipfile.ZipFile(path) as archive:
        data = archive.read("boxes.npy")
    whole = b"M,\x01"  # the pickle's 300
    assert data.count(whole) == 1
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("boxes.npy", data.replace(whole, shape))
    with pytest.raises(DataError, match=message):
        read_npz(path)


def torn_stream(kind: int) -> Callable[[Path], None]:
    """Spoils the compressed bytes of the first member; its names and sizes stay right."""

    def spoil(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", kind) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        data = bytearray(path.read_bytes())
        start = 30 + len(next(iter(members)))
        data[start + 4 : start + 24] = b"\xff" * 20
        path.write_bytes(data)

    return spoil


def marked(offset: int, value: int) -> Callable[[Path], None]:
    """Changes one 16 bit field of the first member in both of its headers; ``offset`` counts in the local one."""

    def spoil(path: Path) -> None:
        data = bytearray(path.read_bytes())
        central = data.index(b"PK\x01\x02") + 2
        for at in (offset, central + offset):
            data[at : at + 2] = value.to_bytes(2, "little")
        path.write_bytes(data)

    return spoil


def no_python(path: Path) -> None:
    """A header of numpy whose brackets do not close."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data.replace(b"}", b"(", 1))


@pytest.mark.parametrize(
    "spoil",
    [
        torn_stream(zipfile.ZIP_DEFLATED),
        torn_stream(zipfile.ZIP_LZMA),
        torn_stream(zipfile.ZIP_BZIP2),
        marked(6, 1),  # encrypted
        marked(8, 97),  # a compression nobody knows
        no_python,
    ],
    ids=["deflate", "lzma", "bzip2", "encrypted", "unknown", "header"],
)
def test_however_a_file_is_broken_it_is_named(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = tmp_path / "odd.npz"
    np.savez_compressed(path, imgs=np.random.default_rng(0).integers(0, 99, (9, 9, 9)))
    read_npz(path)
    spoil(path)
    with pytest.raises(DataError, match=r"odd\.npz is not a readable npz file"):
        read_npz(path)


def test_torn_and_foreign_files_are_refused(tmp_path: Path) -> None:
    whole = pickled(tmp_path / "whole.npz", {"z_min": 1})
    torn = tmp_path / "torn.npz"
    torn.write_bytes(whole.read_bytes()[:60])
    with pytest.raises(DataError, match="not a readable npz"):
        read_npz(torn)
    with pytest.raises(DataError, match="not a readable npz"):
        read_npz(tmp_path / "missing.npz")
    single = tmp_path / "single.npy"
    np.save(single, np.zeros(3))
    with pytest.raises(DataError, match="not a readable npz"):
        read_npz(single)


def test_a_header_that_claims_more_than_there_is_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.npz"
    np.savez(path, imgs=np.zeros((2, 3, 4), dtype=np.uint8))
    with zipfile.ZipFile(path) as archive:
        data = archive.read("imgs.npy").replace(b"(2, 3, 4)", b"(9, 9, 9)")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("imgs.npy", data)
    with pytest.raises(DataError, match=r"states shape \(9, 9, 9\)"):
        read_npz(path)
