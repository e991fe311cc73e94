"""Loading other people's pickles without running their code.

Only integers, text, bytes, flat lists and tuples, dicts, and NumPy arrays and scalars of integers come out. A first
pass judges all steps of the file (`pickle_scan`). The standard unpickler then takes them, with constructors of our own
in place of NumPy's, which check what they are given; no class or function of NumPy or Python is ever handed out.
"""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import pickle
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedmpi.data.pickle_scan import RefusedError, flat_pickle
from fedmpi.errors import shown

__all__ = ["IntArray", "RefusedError", "load_plain", "paused_gc"]

MAX_DIMENSIONS = 8

_INT64: np.dtype[Any] = np.dtype(np.int64)
_MANY_KEYS = 10_000
"""From here on keys of a dict are looked at before it is made."""

_MALFORMED = (
    pickle.UnpicklingError, ArithmeticError, AttributeError, BufferError, EOFError, LookupError, MemoryError,
    struct.error, SystemError, TypeError, ValueError,
)  # fmt: skip


@contextlib.contextmanager
def paused_gc() -> Iterator[None]:
    """No garbage collection inside: it would look through a million new objects, none of them garbage, every time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def load_plain(data: bytes) -> Any:
    """The content of the pickle `data`; arrays come as `IntArray`.

    Raises:
        RefusedError: it is damaged, holds more than flat data, or has many keys that are neither text nor 0..K-1.
    """
    flat, is_dict = flat_pickle(data)
    try:
        loaded = _Unpickler(flat).load()
        return _dict_of(loaded) if is_dict else loaded
    except _MALFORMED as error:
        raise RefusedError(shown(str(error), 200) or type(error).__name__) from error


def _dict_of(items: list[Any]) -> dict[Any, Any]:
    """The dict of keys and values in turn, or in pairs, as old protocols set them."""
    if tuple in set(map(type, items[::2])):
        rest = iter(items)
        items = list(itertools.chain(*(item if type(item) is tuple else (item, next(rest)) for item in rest)))
    keys, values = items[::2], items[1::2]
    kinds = set(map(type, keys))
    if len(keys) > _MANY_KEYS and not kinds <= {str, bytes}:
        counts_up = kinds == {int} and min(keys) >= 0 and max(keys) < len(keys)
        if not counts_up or np.bincount(np.fromiter(keys, np.int64, len(keys))).max() > 1:
            raise RefusedError(f"its {len(keys):,} client ids are not the integers 0..{len(keys) - 1}, each once")
    return dict(zip(keys, values, strict=True))


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._constructors = _constructors(len(data))

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._constructors[module, name]
        except KeyError:
            asked = f"{shown(module)}.{shown(name)}"
            raise pickle.UnpicklingError(f"it asks for {asked}, which is no integer array") from None


class IntArray:
    """An array of integers out of a pickle: the bytes, and how to look at them; empty until `__setstate__`."""

    __slots__ = ("content", "dtype", "order", "shape")

    def __init__(self) -> None:
        self.content: bytes | bytearray = b""
        self.dtype: np.dtype[Any] = _INT64
        self.shape: tuple[int, ...] = (0,)
        self.order: Literal["C", "F"] = "C"

    @property
    def array(self) -> NDArray[Any]:
        """The array, over the bytes of the pickle."""
        return np.frombuffer(self.content, self.dtype).reshape(self.shape, order=self.order)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        self.fill(content, dtype, shape, "F" if fortran else "C")

    def fill(self, content: Any, dtype: Any, shape: Any, order: Any) -> None:
        """Take the bytes (or the latin-1 text that Python 2 wrote) if type, shape and length agree."""
        if type(content) not in (bytes, bytearray, str) or type(dtype) is not _IntType or type(shape) is not tuple:
            raise pickle.UnpicklingError("an array that is not made of integers and bytes")
        num_entries, sized = 1, len(shape) <= MAX_DIMENSIONS
        for n in shape:
            sized = sized and type(n) is int and 0 <= n <= len(content)
            num_entries *= n if sized else 0
        if not sized or num_entries * dtype.dtype.itemsize != len(content) or order not in ("C", "F"):
            raise pickle.UnpicklingError(
                f"an array of shape {shape if sized else shown(shape)} over {len(content)} bytes"
            )
        self.content = content.encode("latin1") if type(content) is str else content
        self.dtype, self.shape, self.order = dtype.dtype, shape, order


class _IntType:
    """A NumPy dtype out of a pickle: an integer type, nothing else."""

    __slots__ = ("dtype",)

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        if type(code) is not str or not re.fullmatch(r"[<>|=]?[iu][1248]", code):
            raise pickle.UnpicklingError(f"numbers of type {shown(code, 20)}, not integers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("a dtype with an unknown state")
        self.dtype = self.dtype.newbyteorder(state[1])


def _constructors(num_bytes: int) -> dict[tuple[str, str], Callable[..., Any]]:
    """(module, name) -> constructor, for one pickle of `num_bytes`; `encode` makes no more than that in all."""
    encoded = 0

    def encode(text: Any, encoding: Any) -> bytes:
        nonlocal encoded
        if type(text) is not str or encoding != "latin1":
            raise pickle.UnpicklingError("bytes in an unknown encoding")
        encoded += len(text)
        if encoded > num_bytes:  # one text, encoded again and again
            raise pickle.UnpicklingError("more bytes than the file has")
        return text.encode("latin1")

    found: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): _ndarray,
        ("numpy", "dtype"): _IntType,
        ("_codecs", "encode"): encode,
        ("builtins", "bytes"): _no_bytes,
        ("__builtin__", "bytes"): _no_bytes,
    }
    for core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
        found[f"{core}.multiarray", "_reconstruct"] = _reconstruct
        found[f"{core}.multiarray", "scalar"] = _scalar
        found[f"{core}.numeric", "_frombuffer"] = _from_buffer
    return found


def _ndarray(*_: Any) -> Any:  # stands for the class, which `_reconstruct` is called with
    raise pickle.UnpicklingError("an array made without _reconstruct")


def _reconstruct(kind: Any, shape: Any, code: Any) -> IntArray:
    if kind is not _ndarray:
        raise pickle.UnpicklingError("an array of an unknown class")
    return IntArray()


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> IntArray:
    array = IntArray()
    array.fill(content, dtype, shape, order)
    return array


def _scalar(dtype: Any, content: Any) -> int:
    return int(_from_buffer(content, dtype, (1,), "C").array.item())


def _no_bytes() -> bytes:  # how protocol 2 says b""; with an argument it would allocate
    return b""
