"""Frozen dataclasses to plain JSON values and back, by field name and type; whatever does not fit is refused."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Hashable, Mapping
from enum import StrEnum
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from medvl_sam2.errors import DataError

T = TypeVar("T")


def to_plain(record: Any) -> dict[str, Any]:
    """Fields by name; those at their default are left out."""
    plain = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if value != field.default:
            plain[field.name] = _plain(value)
    return plain


def from_plain(kind: type[T], data: Any) -> T:
    """The record of ``kind`` that :func:`to_plain` made ``data`` from.

    Raises :class:`DataError` naming the field: unknown, missing, of another type, or refused by the record itself.
    """
    if not isinstance(data, dict):
        raise DataError(f"{kind.__name__} needs a JSON object, not {data!r}")
    hints, required = _fields(cast(Hashable, kind))
    unknown, missing = sorted(set(data) - set(hints)), sorted(required - set(data))
    if unknown:
        raise DataError(f"{kind.__name__} has no field {unknown[0]!r}; known: {', '.join(hints)}")
    if missing:
        raise DataError(f"{kind.__name__} lacks the field {missing[0]!r}")
    return kind(**{name: _value(hints[name], value, f"{kind.__name__}.{name}") for name, value in data.items()})


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_plain(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


@cache
def _fields(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Types by field name, and the fields without a default."""
    required = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    return get_type_hints(kind), frozenset(required)


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):  # only ever "X | None"
        return None if value is None else _value(inner[0], value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_plain(hint, value)
    if origin is tuple and isinstance(value, list):
        kinds = (inner[0],) * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) == len(value):
            return tuple(_value(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    elif origin is Mapping and isinstance(value, dict):
        if all(key.isdecimal() for key in value):
            return {int(key): _value(inner[1], item, where) for key, item in value.items()}
    elif isinstance(hint, type) and issubclass(hint, StrEnum):
        if isinstance(value, str) and value in list(hint):
            return hint(value)
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint in (str, int, bool) and type(value) is hint:
        return value
    raise DataError(f"{where} cannot be {value!r}; it must be {getattr(hint, '__name__', hint)}")
