"""A hold-out of patients that stays the same while the store of labels grows.

Rule. A patient's digest, SHA-256 of the patient key, read as a fraction in [0, 1), decides: below ``fraction`` the
patient is held out, otherwise trained on. The decision is written down the first time the patient is seen and is never
changed again, whatever ``fraction`` says later. Two exceptions keep both sides usable, and only patients seen for the
first time can be moved by them:

* nobody is trained on yet: the new patient of the highest digest is trained on;
* nobody is held out yet although two or more patients are known: the new patient of the lowest digest is held out.

So a lone first patient is trained on, the second one is held out, and no patient ever crosses over. The file keeps
digests, not patient identifiers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from medvl_sam2.errors import ConfigError, DataError
from medvl_sam2.files import write_json_atomically

HOLDOUT = "holdout"
TRAIN = "train"
_FORMAT = 1
_LOCK_TIMEOUT_S = 60.0

_BIDS_SUBJECT = re.compile(r"^(sub-[a-z0-9]+)(?:_|$)", re.IGNORECASE)
_SERIES_TOKEN = re.compile(
    r"""(?:
        ct|cta|mr|mri|mra|pet|us|dwi|adc|flair|swi|t1|t1w|t1c|t1ce|t1gd|t2|t2w|t2f|pd|pdw      # modality, sequence
      | pre|post|native|contrast|arterial|portal|venous|portalvenous|delayed                  # contrast phase
      | ax|axial|cor|coronal|sag|sagittal                                                     # plane
      | (?:ser|series|scan|ses|session|visit|tp|timepoint|acq|run|phase|crop|slab)-?\d*       # numbered series
      | \d+(?:p\d+)?mm                                                                        # resampling: 3mm, 1p5mm
      | 000\d                                                                                 # nnU-Net channel
    )""",
    re.IGNORECASE | re.VERBOSE,
)


@dataclass(frozen=True)
class HoldoutSplit:
    """Patient keys on either side, sorted. No key is on both."""

    train: tuple[str, ...]
    holdout: tuple[str, ...]


def patient_key(image_id: str, info: Mapping[str, object] | None = None) -> str:
    """The patient an image belongs to: ``PatientID`` of the image info, else the image id without its series suffix.

    Dropped from the end of an id, one after the other: modality, contrast phase, plane, numbered series, resampling
    (``_3mm``) and nnU-Net channels (``_0000``); of a BIDS name only ``sub-<label>`` stays. An id cannot tell that two
    unlike names are one patient: give both the same ``PatientID``.
    """
    known = str((info or {}).get("PatientID") or "").strip()
    if known:
        return f"id:{known}"
    stem = re.sub(r"\.(nii\.gz|nii|nrrd|mha|mhd|dcm|zip)$", "", Path(image_id).name, flags=re.IGNORECASE)
    if not stem:
        raise DataError(f"image id {image_id!r} names no patient; give the image an id or a PatientID")
    subject = _BIDS_SUBJECT.match(stem)
    if subject:
        return f"name:{subject.group(1).lower()}"
    tokens = re.split(r"[_ ]", stem)
    while len(tokens) > 1 and _SERIES_TOKEN.fullmatch(tokens[-1]):
        tokens.pop()
    return f"name:{'_'.join(tokens).lower()}"


def assign_patients(path: Path, patients: Iterable[str], fraction: float = 0.2) -> HoldoutSplit:
    """Sides of ``patients`` (keys from :func:`patient_key`), recorded in the JSON file ``path`` for ever.

    Safe to call from several processes at once.

    Raises:
        ConfigError: ``fraction`` is not between 0 and 1.
        DataError: the file is damaged. It is never silently begun anew: that would mix the sides.
    """
    if not 0.0 < fraction < 1.0:
        raise ConfigError(f"hold-out fraction {fraction} must lie between 0 and 1, for example 0.2")
    keys = sorted(set(patients))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(path.name + ".lock"), timeout=_LOCK_TIMEOUT_S):
        sides = _read(path)
        new = sorted({_digest(key) for key in keys} - set(sides))
        if new:
            sides.update(_decide(new, sides, fraction))
            write_json_atomically(path, {"format": _FORMAT, "patients": dict(sorted(sides.items()))})
    return HoldoutSplit(
        train=tuple(key for key in keys if sides[_digest(key)] == TRAIN),
        holdout=tuple(key for key in keys if sides[_digest(key)] == HOLDOUT),
    )


def _decide(new: list[str], known: Mapping[str, str], fraction: float) -> dict[str, str]:
    """Sides of the new digests (sorted), by the rule at the top of this file."""
    decided = {digest: HOLDOUT if _position(digest) < fraction else TRAIN for digest in new}
    if TRAIN not in known.values() and TRAIN not in decided.values():
        decided[new[-1]] = TRAIN
    sides = [*known.values(), *decided.values()]
    if HOLDOUT not in sides and len(sides) >= 2:
        decided[new[0]] = HOLDOUT
    return decided


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8")).hexdigest()


def _position(digest: str) -> float:
    return int(digest[:12], 16) / float(16**12)


def _read(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    remedy = "restore it from a copy; beginning anew could train on patients held out so far"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        patients = data["patients"]
        if data["format"] != _FORMAT or not isinstance(patients, dict) or set(patients.values()) - {TRAIN, HOLDOUT}:
            raise DataError(f"{path} is no hold-out record of format {_FORMAT}; {remedy}")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error!r}); {remedy}") from error
    return dict(patients)
