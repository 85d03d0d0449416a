"""The YAML file of a stage, read into its frozen dataclass, and the command line that names it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
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


def stage_command(
    arguments: Sequence[str] | None, description: str | None, kind: type[T], shipped: Path | None = None
) -> tuple[T, Path]:
    """Settings and result folder of a stage that learns from a manifest, from its command line; sets torch's threads.

    ``shipped``: the settings without ``--config``, which is required where there are none.

    Raises :class:`ConfigError` as :func:`read_stage_config` does.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = "such as one of training/stages" if shipped is None else "the shipped one by default"
    parser.add_argument("--config", type=Path, default=shipped, required=shipped is None, help=f"YAML file, {which}")
    parser.add_argument("--manifest", type=Path, help="instead of the configuration's")
    parser.add_argument("--out", type=Path, required=True, help="folder for the result and the resumable state")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    config: Any = read_stage_config(options.config, kind)
    if options.manifest is not None:
        config = replace(config, data=replace(config.data, manifest=options.manifest))
    torch.set_num_threads(options.threads)
    return config, options.out
