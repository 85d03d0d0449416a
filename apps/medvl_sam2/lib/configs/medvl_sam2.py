"""Labels and settings of the app: what ``--conf`` may say, with its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from medvl_sam2.errors import ConfigError
from medvl_sam2.modeling.compute import Precision, compute_device
from medvl_sam2.vocabulary import CLASSES

APP_NAME = "MedVL-SAM2"
APP_VERSION = "0.1.0"

OBJECT_LABEL = "object"
"""Label of whatever the vocabulary has no word for: a click on anything, a sentence about anything."""

LABELS: tuple[str, ...] = (*CLASSES, OBJECT_LABEL)
"""``LABELS[n - 1]`` is mask value ``n``. Contiguous and without a background entry: OHIF gives index 0 a running
number, and Slicer counts values by position."""

LABEL_VALUES: Mapping[str, int] = {name: value for value, name in enumerate(LABELS, start=1)}

TRAINER = "medvl_sam2"
"""The one train task: OHIF's button starts all there are."""

HOLD_BACK_S = 900
"""For how long an image that went to one annotator is kept from the others while there is another one."""


@dataclass(frozen=True)
class AppConfig:
    """Settings from ``--conf NAME VALUE`` (all strings there)."""

    store: Path
    """Published weights, runs, scores and the retraining schedule (``--conf store DIR``; default ``<app>/model``)."""
    max_sessions: int = 8
    """Open sessions (annotator and image), least recently used dropped first."""
    session_megabytes: int = 1500
    """Memory all open sessions may hold together."""
    journal_days: int = 14
    """For how long the prompts of a session nobody works on are kept on disk; 0: they are never written."""
    prepare: bool = True
    """Read an image and look at it ahead of its first prompt, while no request waits."""
    max_upload_megabytes: int = 4096
    """Largest request; MB of 1,000,000 bytes."""
    device: str = "auto"
    """Where answers and trainings are computed: ``cpu``, ``cuda``, ``cuda:N``; ``auto``: a GPU where there is one."""
    precision: Precision = "auto"
    """Number format of slices; ``auto``: bfloat16 where the device multiplies it in hardware and that pays."""
    upstream_aliases: bool = False
    """Offer the tasks under the names of MONAI Label's radiology app as well."""

    @classmethod
    def from_conf(cls, app_dir: Path, conf: Mapping[str, str]) -> AppConfig:
        """Read the settings; unknown names belong to MONAI Label and are left alone."""
        return cls(
            store=Path(conf.get("store") or app_dir / "model").resolve(),
            max_sessions=_positive(conf, "max_sessions", cls.max_sessions),
            session_megabytes=_positive(conf, "session_megabytes", cls.session_megabytes),
            journal_days=_positive(conf, "journal_days", cls.journal_days, least=0),
            prepare=_truth(conf, "prepare", cls.prepare),
            max_upload_megabytes=_positive(conf, "max_upload_megabytes", cls.max_upload_megabytes),
            device=_device(conf),
            precision=_precision(conf),
            upstream_aliases=_truth(conf, "upstream_aliases", cls.upstream_aliases),
        )


def _positive(conf: Mapping[str, str], name: str, default: int, least: int = 1) -> int:
    text = str(conf.get(name, default)).strip()
    if not text.isdigit() or int(text) < least:
        raise ConfigError(f"--conf {name} {text!r} must be a whole number from {least} on")
    return int(text)


def _device(conf: Mapping[str, str]) -> str:
    name = str(conf.get("device", "")).strip().lower() or AppConfig.device
    try:
        compute_device(name)
    except ConfigError as error:
        raise ConfigError(f"--conf device: {error}") from error
    return name


def _precision(conf: Mapping[str, str]) -> Precision:
    text = str(conf.get("precision", "")).strip().lower() or AppConfig.precision
    for known in get_args(Precision):
        if text == known:
            return cast(Precision, known)
    raise ConfigError(f"--conf precision {text!r} must be one of {', '.join(get_args(Precision))}")


def _truth(conf: Mapping[str, str], name: str, default: bool) -> bool:
    text = str(conf.get(name, default)).strip().lower()
    if text not in ("true", "false"):
        raise ConfigError(f"--conf {name} {text!r} must be true or false")
    return text == "true"
