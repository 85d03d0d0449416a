"""Frozen dataclasses to plain JSON values and back, by field name and type; whatever does not fit is refused.

The reader of a type is put together once: a manifest holds a million small records.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from medvl_sam2.errors import DataError

T = TypeVar("T")
Reader = Callable[[Any], Any]


class _Misfit(ValueError):
    """A value of the wrong type; the record it belongs to adds the name of the field."""


def to_plain(record: Any) -> dict[str, Any]:
    """Fields by name; those at their default are left out."""
    kind: Any = type(record)
    values = ((name, getattr(record, name), default) for name, default in _defaults(kind))
    return {name: _plain(value) for name, value, default in values if value != default}


def from_plain(kind: type[T], data: Any) -> T:
    """The record of ``kind`` that :func:`to_plain` made ``data`` from.

    Raises :class:`DataError` naming the field: unknown, missing, of another type, or refused by the record itself.
    """
    hint: Any = kind
    return _reader(hint)(data)


@cache
def _defaults(kind: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((field.name, field.default) for field in dataclasses.fields(kind))


def _plain(value: Any) -> Any:
    if isinstance(value, (str, int, float)):
        return value
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return to_plain(value)


@cache
def _reader(hint: Any) -> Reader:
    """What turns a JSON value into a value of ``hint``."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):  # only ever "X | None"
        read = _reader(inner[0])
        return lambda value: None if value is None else read(value)
    if origin is tuple:
        return _tuple_reader(inner)
    if origin is Mapping:
        return _names_reader(_reader(inner[1]))
    if dataclasses.is_dataclass(hint):
        return _record_reader(hint)
    if issubclass(hint, StrEnum):
        members = {str(member): member for member in hint}
        return lambda value: _checked(members.get(value) if isinstance(value, str) else None, value, list(members))
    kinds = (int, float) if hint is float else (hint,)
    return lambda value: _checked(hint(value) if type(value) in kinds else None, value, hint.__name__)


def _checked(read: Any, value: Any, wanted: Any) -> Any:
    if read is None:
        raise _Misfit(f"cannot be {value!r}; it must be {wanted}")
    return read


def _tuple_reader(inner: tuple[Any, ...]) -> Reader:
    readers = [_reader(kind) for kind in inner if kind is not Ellipsis]
    length = None if inner[-1] is Ellipsis else len(inner)

    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or length not in (None, len(value)):
            raise _Misfit(f"cannot be {value!r}; it must be a list" + (f" of {length}" if length else ""))
        each = readers if length else readers * len(value)
        return tuple(reader(item) for reader, item in zip(each, value, strict=True))

    return read


def _names_reader(read_item: Reader) -> Reader:
    def read(value: Any) -> dict[int, Any]:
        if not isinstance(value, dict) or not all(key.isdecimal() for key in value):
            raise _Misfit(f"cannot be {value!r}; it must be an object with whole numbers as keys")
        return {int(key): read_item(item) for key, item in value.items()}

    return read


def _record_reader(kind: Any) -> Reader:
    readers = {name: _reader(hint) for name, hint in get_type_hints(kind).items()}
    required = {name for name, default in _defaults(kind) if default is dataclasses.MISSING}

    def read(data: Any) -> Any:
        if not isinstance(data, dict):
            raise DataError(f"{kind.__name__} needs a JSON object, not {data!r}")
        if not data.keys() <= readers.keys():
            unknown = sorted(data.keys() - readers.keys())[0]
            raise DataError(f"{kind.__name__} has no field {unknown!r}; known: {', '.join(readers)}")
        if not required <= data.keys():
            raise DataError(f"{kind.__name__} lacks the field {sorted(required - data.keys())[0]!r}")
        values = {}
        for name, value in data.items():
            try:
                values[name] = readers[name](value)
            except _Misfit as misfit:
                raise DataError(f"{kind.__name__}.{name} {misfit}") from misfit
        return kind(**values)

    return read
