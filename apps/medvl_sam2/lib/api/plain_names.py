"""Ids and tags that requests name: plain file names, because the store makes paths of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException

NAMES = frozenset({"image", "label", "tag", "id", "session_id", "model", "strategy", "method"})
"""Parameters of routes that name an image, a label, a tag, a session or a task."""
_LONGEST = 255
_NOT_PLAIN = re.compile(r"[/\\\x00-\x1f\x7f]")


def check_plain_names(values: Mapping[str, Any], names: frozenset[str] = NAMES) -> None:
    """Refuse (400) a text value of ``values`` under one of ``names`` that is no plain name; empty means not given."""
    for name in names & values.keys():
        value = values[name]
        if not isinstance(value, str):
            continue
        if _NOT_PLAIN.search(value) or value in (".", "..") or len(value.encode("utf-8", "replace")) > _LONGEST:
            shown = value if len(value) <= 80 else f"{value[:80]}..."
            raise HTTPException(400, f"{name} {shown!r} is no plain name: no '/', '\\' or '..', at most 255 bytes")


def check_plain_path(path: str) -> None:
    """Refuse (400) a path that climbs out of the folder it is meant for."""
    if "\\" in path or "\0" in path or ".." in path.split("/"):
        raise HTTPException(400, f"path {path[:80]!r} leaves its folder")
