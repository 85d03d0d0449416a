"""M3D-Seg (Bai et al. 2024): 25 public sets, numbered 0000 to 0024, as arrays.

``<code>/<case>/image.npy`` (1, I, J, K), normalised by the foreground (so not HU: modality OTHER), and
``mask_(C, I, J, K).npz``, a SciPy sparse matrix (C, I*J*K) whose shape stands only in the file name; ``<code>.json``
with ``labels`` and the sides ``train`` and ``test``. Spacing and orientation were thrown away: the axes are assumed,
and :func:`~medvl_sam2.datasets.volumes.read_case` lets labels with a side decide between left and right.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from medvl_sam2.datasets import amos, btcv, msd, totalsegmentator
from medvl_sam2.datasets.manifest import CaseRecord, Grid, ImageFile, LabelFile, Split
from medvl_sam2.datasets.source import Finding, Problem, missing, named_values, read_object, relative, text_fields
from medvl_sam2.errors import DataError
from medvl_sam2.types import Modality

_MASK = re.compile(r"mask_\((\d+), (\d+), (\d+), (\d+)\)\.npz")
_SPLITS = {"train": Split.TRAIN, "test": Split.TEST}
_NAMES = {  # what a name that is short within its set means outside it
    "0005": {"tumour": "kidney_tumour"},
    "0019": {"tumour": "liver_tumour", "hepatic_vessels": "hepatic_vessel"},
    "0020": {"tumour": "liver_tumour"},
    "0022": {"tumour": "pancreas_tumour"},
}
_REPEATED = ("vertebrae_L1", "vertebrae_L2")  # 0014 and 0015 list L1 twice and no L2
_ORIGINS = {"0002": amos.patient, "0007": btcv.patient, "0011": totalsegmentator.patient} | {
    f"00{n}": msd.patient for n in (18, 19, 20, 21, 22, 23)
}
"""Sets that are also read from their own folders: their patients must be the same ones there and here."""


def mask_shape(name: str) -> tuple[int, int, int, int]:
    """Shape (C, I, J, K) in the name of a mask file; :class:`DataError` when there is none."""
    match = _MASK.fullmatch(name)
    if match is None:
        raise DataError(f"mask file {name!r} is not named mask_(C, H, W, D).npz, so its shape is unknown")
    c, i, j, k = map(int, match.groups())
    return c, i, j, k


def read(root: Path) -> Iterator[Finding]:
    """All sets below ``root``, or the one set ``root`` is."""
    found = sorted(path.parent for path in root.glob("*/[0-9][0-9][0-9][0-9].json") if path.stem == path.parent.name)
    sets = [root] if (root / f"{root.name}.json").exists() else found
    if not sets:
        raise DataError(f"{root} holds no <code>/<code>.json; give the folder M3D_Seg")
    for folder in sets:
        yield from _read_set(folder, root)


def _read_set(folder: Path, root: Path) -> Iterator[Finding]:
    code = folder.name
    table = read_object(folder / f"{code}.json", "labels", *_SPLITS)
    short = _NAMES.get(code, {})
    names = {value: short.get(name, name) for value, name in named_values(table["labels"]).items()}
    repeated = [value for value, name in names.items() if name == _REPEATED[0]]
    if len(repeated) == 2 and _REPEATED[1] not in names.values():
        names[repeated[1]] = _REPEATED[1]
    for key, split in _SPLITS.items():
        for entry in table[key]:
            try:
                image, mask = (folder.parent / name for name in text_fields(entry, "image", "label"))
                yield _record(root, code, image, mask, names, split)
            except DataError as error:
                yield Problem(f"{code}/{_case_of(entry)}", str(error))


def _case_of(entry: object) -> str:
    """What to call an entry that may be damaged."""
    return Path(str(entry["image"])).parent.name if isinstance(entry, dict) and "image" in entry else str(entry)


def _record(root: Path, code: str, image: Path, mask: Path, names: Mapping[int, str], split: Split) -> CaseRecord:
    """The record of one case; :class:`DataError` says why there is none."""
    case = image.parent.name
    classes, i, j, k = mask_shape(mask.name)
    reason = missing(image, mask)
    if reason is None and classes != max(names, default=0):
        reason = f"its mask has {classes} classes, {code}.json names {max(names, default=0)}"
    if reason is not None:
        raise DataError(reason)
    # CT slices are square: where the last two axes are, the stack runs along the first (KiTS), else along the last.
    axes = "SAR" if j == k != i else "RAS"
    return CaseRecord(
        id=f"m3d_seg/{code}/{case}",
        source="m3d_seg",
        patient=_ORIGINS[code](case) if code in _ORIGINS else f"m3d_seg/{code}/{case}",
        split=split,
        modality=Modality.OTHER,
        licence=f"that of the set behind code {code}",
        image=ImageFile(relative(image, root), grid=Grid(axes, assumed=True)),
        labels=(LabelFile(relative(mask, root), names),),
    )
