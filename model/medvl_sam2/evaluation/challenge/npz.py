"""Read the challenge's npz files, whose prompts are pickled object arrays, without executing anything in them.

A pickle may only build lists, dictionaries, tuples, text, numbers, None, and numpy arrays of these. The names it looks
up are answered by methods of the reader that make inert records; not even numpy's own constructors are called on what
a file says. Anything else is refused with its name.
"""

from __future__ import annotations

import lzma
import math
import pickle
import re
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import IO, Any

import numpy as np

from medvl_sam2.errors import DataError, MedVLError

MAX_PICKLED_BYTES = 64 * 2**20
"""Prompts take kilobytes; a larger member is none."""
MAX_VALUES = 100_000
"""Values and lists of one member: a few references can stand for billions."""
_BROKEN = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    tokenize.TokenError,  # numpy's way of saying that a header is no Python
    RuntimeError,  # an encrypted member, an unknown compression, a nesting too deep
    OSError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    OverflowError,
    MemoryError,
)


def read_npz(path: Path) -> dict[str, Any]:
    """Every member of an npz file: numpy arrays, and nested plain Python values for pickled ones.

    Raises :class:`DataError`: the file is no npz, is torn, or holds a pickle of anything but data.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy"): _member(archive, name) for name in archive.namelist()}
    except MedVLError as error:
        raise DataError(f"{path}: {error}") from error
    except _BROKEN as error:
        raise DataError(f"{path} is not a readable npz file ({error}); write it again") from error


def _member(archive: zipfile.ZipFile, name: str) -> Any:
    """One member; only object arrays take the way of the pickle."""
    size = archive.getinfo(name).file_size
    with archive.open(name) as stream:
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(stream)
        if dtype.hasobject:
            if size > MAX_PICKLED_BYTES:
                raise DataError(f"member {name!r} holds {size} pickled bytes; prompts take at most {MAX_PICKLED_BYTES}")
            return _Plain()(_Reader(stream).load())
    if math.prod(shape) * dtype.itemsize > size:
        raise DataError(f"member {name!r} states shape {shape} but holds {size} bytes; write the file again")
    with archive.open(name) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


class _Reader(pickle.Unpickler):
    """Answers a pickle's look-ups with methods that only make :class:`_Kind` and :class:`_Array`."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream)
        array, scalar = self._array, self._scalar
        self._known: dict[str, Callable[..., Any]] = {
            "numpy.ndarray": array,
            "numpy.dtype": self._kind,
            "numpy.core.multiarray._reconstruct": array,
            "numpy._core.multiarray._reconstruct": array,
            "numpy.core.multiarray.scalar": scalar,
            "numpy._core.multiarray.scalar": scalar,
        }

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """The method that stands for a numpy constructor; :class:`DataError` for any other name."""
        wanted = f"{module_name}.{global_name}"
        if wanted not in self._known:
            raise DataError(f"the pickle in it asks for {wanted}, which is no data; take files from the challenge only")
        return self._known[wanted]

    def _array(self, *_: object) -> _Array:
        return _Array()

    def _kind(self, code: str, *_: object) -> _Kind:
        return _Kind(code)

    def _scalar(self, kind: _Kind, data: bytes) -> Any:
        return np.frombuffer(data, kind.numpy(), 1)[0].item()


class _Kind:
    """A numpy dtype as a pickle states it: code and byte order of a bool, a whole number, a float, text or object."""

    def __init__(self, code: str) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"O8?|[biuf][1248]|U\d{1,4}", code):
            raise DataError(f"the pickle in it holds an array of dtype {code!r}; only numbers and text are data")
        self._code, self._order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "=", "|") or state[2:5] != (None, None, None):
            raise DataError("the pickle in it holds a structured dtype; only numbers and text are data")
        self._order = "=" if state[1] == "|" else state[1]

    def numpy(self) -> np.dtype[Any]:
        """The dtype; None of its state comes from the file beyond code and byte order."""
        return np.dtype(f"{self._order}{self._code}")


class _Array:
    """An array as a pickle states it."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self._shape, self._kind, self._columns_first, self._data = state

    def items(self) -> list[Any]:
        """Its items in the order of the pickle."""
        dtype = self._kind.numpy()
        return list(self._data) if dtype.hasobject else np.frombuffer(self._data, dtype).tolist()

    def lists(self) -> int:
        """How many lists its shape makes, also around no item at all: one for it, one for each of its rows, ..."""
        if min(self._shape, default=0) < 0:
            raise DataError(f"the pickle in it holds an array of shape {self._shape}; write the file again")
        return sum(accumulate(self._shape[:-1], mul, initial=1))

    def nested(self, items: list[Any]) -> Any:
        """Plain ``items`` nested by the array's shape."""
        if math.prod(self._shape) != len(items):
            raise DataError(f"the pickle in it holds {len(items)} values as shape {self._shape}; write the file again")
        values = np.empty(len(items), dtype=object)
        for place, item in enumerate(items):
            values[place] = item
        return values.reshape(self._shape, order="F" if self._columns_first else "C").tolist()


class _Plain:
    """Turns what a pickle made into plain Python values, and checks what it can make without a look-up."""

    def __init__(self) -> None:
        self._left = MAX_VALUES

    def __call__(self, value: Any) -> Any:
        self._left -= value.lists() if isinstance(value, _Array) else 1
        if self._left < 0:
            raise DataError(f"the pickle in it holds more than {MAX_VALUES} values; prompts are few")
        if isinstance(value, _Array):
            return value.nested([self(item) for item in value.items()])
        if type(value) is dict:
            return {self(key): self(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return [self(item) for item in value]
        if value is None or type(value) in (str, int, float, bool):
            return value
        raise DataError(f"the pickle in it holds a value of class {type(value).__name__}; only data are read")
