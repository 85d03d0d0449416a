"""What is known of one version of a label, as it stands in JSON beside the mask."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

from lib.label_names import stored_names
from medvl_sam2.errors import DataError

FORMAT = "medvl-sam2-label-version-1"
ADOPTED = ("history", "found")
"""Sources of labels that lay in the store and came by no request."""
DRAFT = "draft"
"""Review status of a label that was saved and not submitted."""
_TAG = re.compile(r"version_([1-9][0-9]*)")
_REVIEW = ("status", "level", "approvedBy", "comment", "editTime")
"""What MONAI Label's Reviewer module for Slicer keeps under ``segmentationMeta``; it fails where one is missing."""


class Provenance(NamedTuple):
    """What the server knows of a label that is being saved: the weights it serves, the prompts its author placed."""

    model_version: str
    prompts: list[dict[str, Any]]


@dataclass(frozen=True)
class Structure:
    """One structure of a label: the ``value`` it has in the mask and how many ``voxels``."""

    name: str
    value: int
    voxels: int


@dataclass(frozen=True)
class LabelVersion:
    """One submitted label; ``extension`` and ``checksum`` (SHA-256) are those of its file, ``time`` is ISO, UTC.

    ``info`` is what MONAI Label keeps with a label (``label_info``, ``segmentationMeta``, ...). ``restored_from`` and
    ``made_from`` are versions of the same image. ``withdrawn``: the tag ``final`` was deleted while it held this.
    ``submitted``: when a draft began to count; empty where that was ``time``.
    """

    image: str
    version: int
    extension: str
    checksum: str
    time: str
    author: str
    source: str
    client_id: str
    model_version: str
    structures: tuple[Structure, ...]
    prompts: tuple[Any, ...] = ()
    restored_from: int | None = None
    made_from: tuple[int, ...] = ()
    withdrawn: bool = False
    submitted: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tag(self) -> str:
        return version_tag(self.version)

    @property
    def review(self) -> Mapping[str, Any]:
        return self.info["segmentationMeta"]

    @property
    def draft(self) -> bool:
        """Saved to go on later: a version that never counts as the image's label."""
        return is_draft(self.info)

    def updated(self, info: Mapping[str, Any]) -> LabelVersion:
        """With other entries in ``info``."""
        merged = {**self.info, **info}
        merged["segmentationMeta"] = whole_review(merged.get("segmentationMeta"), "", self.time)
        return replace(self, info=merged)

    def index_info(self) -> dict[str, Any]:
        """What stands in MONAI Label's index: all but the prompts, as the whole index is written at every save."""
        return {
            **self.info,
            "author": self.author,
            "source": self.source,
            "model_version": self.model_version,
            "version": self.version,
            "checksum": self.checksum,
            "ts": int(datetime.fromisoformat(self.time).timestamp()),
            "name": f"{self.image}{self.extension}",
        }

    def shown(self) -> dict[str, Any]:
        """As ``GET /medvl/labels`` shows it."""
        return {
            "version": self.version,
            "tag": self.tag,
            "author": self.author,
            "time": self.time,
            "source": self.source,
            "client_id": self.client_id,
            "model_version": self.model_version,
            "note": str(self.review["comment"]),
            "status": str(self.review["status"]),
            "level": str(self.review["level"]),
            "approved_by": str(self.review["approvedBy"]),
            "checksum": self.checksum,
            "structures": [asdict(structure) for structure in self.structures],
            "prompts": list(self.prompts),
            "restored_from": self.restored_from,
            "made_from": list(self.made_from),
        }

    def to_json(self) -> bytes:
        return f"{json.dumps({'format': FORMAT, **asdict(self)}, indent=1, default=str)}\n".encode()

    @classmethod
    def from_json(cls, content: bytes) -> LabelVersion:
        """Read what :meth:`to_json` wrote.

        Raises:
            DataError: it is something else.
        """
        try:
            fields = json.loads(content)
            if fields.pop("format") != FORMAT:
                raise DataError(f"a label version of another format than {FORMAT}; update this server")
            lists = {name: tuple(fields.pop(name)) for name in ("prompts", "made_from")}
            structures = tuple(Structure(**one) for one in fields.pop("structures"))
            return cls(structures=structures, **lists, **fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"not the record of a label version: {error}") from error


class SavedLabel(str):
    """Id of a label that was just saved; ``record`` is the version it became, None for a label that is no version.

    What saving returns, MONAI Label hands to the app's hook: the version reaches it whoever else saves meanwhile.
    """

    record: LabelVersion | None

    def __new__(cls, label_id: str, record: LabelVersion | None) -> SavedLabel:
        saved = super().__new__(cls, label_id)
        saved.record = record
        return saved


def version_tag(number: int) -> str:
    """MONAI Label's tag of a version, as its Reviewer module names them."""
    return f"version_{number}"


def version_number(tag: str) -> int | None:
    """The number a tag names; None for ``final``, ``original`` and every other tag."""
    match = _TAG.fullmatch(tag)
    return int(match[1]) if match else None


def is_draft(info: Mapping[str, Any]) -> bool:
    """Whether a label that is sent or kept with ``info`` is a draft."""
    review = info.get("segmentationMeta")
    return isinstance(review, Mapping) and review.get("status") == DRAFT


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def whole_review(sent: Any, note: str, time: str) -> dict[str, Any]:
    """``segmentationMeta`` with all five entries; ``note`` is the comment where none was sent."""
    edited = int(datetime.fromisoformat(time).timestamp())
    defaults = {"status": "", "level": "", "approvedBy": "", "comment": note, "editTime": edited}
    return {**defaults, **({key: sent[key] for key in _REVIEW if key in sent} if isinstance(sent, Mapping) else {})}


def names_in(info: Mapping[str, Any]) -> dict[str, Any]:
    """What of a label's ``info`` names the structures of its mask."""
    return {key: info[key] for key in ("label_info", "params") if key in info}


def stated_names(record: LabelVersion) -> dict[str, Any]:
    """The names of a version with their values; of a label that was only found here, what was kept with it."""
    if record.source in ADOPTED:
        return names_in(record.info)
    return {"label_info": [{"name": one.name, "idx": one.value, "value": one.value} for one in record.structures]}


def named_structures(info: Mapping[str, Any], voxels: Mapping[int, int]) -> tuple[Structure, ...]:
    """Structures of a mask from the ``voxels`` of its values and the names its client sent.

    3D Slicer numbers the mask over the segments it exports, so a value is the *position* in ``label_info``; ``idx``
    there counts all segments of the scene, exported or not, and runs ahead of the values after one that was left out.
    Clients that mean mask values say ``value``. Where the names do not explain every value, none is guessed.
    """
    used = sorted(value for value in voxels if value)
    try:
        names = stored_names(info, used)
    except DataError:
        names = {value: f"label {value}" for value in used}
    return tuple(Structure(names[value], value, int(voxels[value])) for value in used)


def text_of(info: Mapping[str, Any], key: str) -> str:
    value = info.get(key)
    return "" if value is None else str(value)
