"""The YAML file of a stage, read into its frozen dataclass."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar, cast

import yaml

from medvl_sam2.config import from_plain
from medvl_sam2.errors import ConfigError

T = TypeVar("T")


def read_stage_config(path: Path, kind: type[T]) -> T:
    """Settings of ``path`` as ``kind``; fields that are left out keep their defaults.

    Raises :class:`ConfigError` when the file is no YAML, or a field is unknown, ill-typed or impossible.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML ({error}); start from one of training/stages") from error
    try:
        return cast(T, from_plain(kind, {} if data is None else data))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
