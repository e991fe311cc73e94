"""Constructors that a pickle of integer arrays gets instead of NumPy's; they check all and only look at its bytes."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedmpi.errors import shown

MAX_DIMENSIONS = 8

_INT64: np.dtype[Any] = np.dtype(np.int64)


class IntArray:
    """An array of integers on its way out of a pickle: so far only the bytes and how to look at them."""

    __slots__ = ("content", "dtype", "order", "shape")

    def __init__(self) -> None:
        self.content: bytes | bytearray | str = b""  # str: latin-1, as Python 2 wrote bytes
        self.dtype: np.dtype[Any] = _INT64
        self.shape: tuple[int, ...] = (0,)
        self.order: Literal["C", "F"] = "C"

    @property
    def array(self) -> NDArray[Any]:
        """The array, over the bytes of the pickle.

        Raises:
            ValueError: text that is no latin-1.
        """
        content = self.content.encode("latin1") if isinstance(self.content, str) else self.content
        return np.frombuffer(content, self.dtype).reshape(self.shape, order=self.order)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        plain = type(content) is bytes and type(dtype) is _IntType and type(shape) is tuple and len(shape) == 1
        if plain and type(shape[0]) is int and shape[0] * dtype.itemsize == len(content):  # nearly all of a split's
            self.content, self.dtype, self.shape = content, dtype.dtype, shape
            return
        self.fill(content, dtype, shape, "F" if fortran else "C")

    def fill(self, content: Any, dtype: Any, shape: Any, order: Any) -> None:
        """Take the bytes if type, shape and length agree."""
        if type(content) not in (bytes, bytearray, str) or type(dtype) is not _IntType or type(shape) is not tuple:
            raise pickle.UnpicklingError("an array that is not made of integers and bytes")
        if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n <= len(content) for n in shape):
            raise pickle.UnpicklingError(f"an array of shape {shown(shape)} over {len(content)} bytes")
        num_entries = 1
        for n in shape:
            num_entries *= n
        if num_entries * dtype.itemsize != len(content) or order not in ("C", "F"):
            raise pickle.UnpicklingError(f"an array of shape {shape} over {len(content)} bytes")
        self.content, self.dtype, self.shape, self.order = content, dtype.dtype, shape, order


class _IntType:
    """A NumPy dtype on its way out: an integer type, nothing else."""

    __slots__ = ("dtype", "itemsize")

    def __init__(self, code: str) -> None:
        self.dtype = np.dtype(code)
        self.itemsize = self.dtype.itemsize

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("a dtype with an unknown state")
        self.dtype = self.dtype.newbyteorder(state[1])


def constructors(num_bytes: int) -> dict[tuple[str, str], Callable[..., Any]]:
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
        ("numpy", "dtype"): _dtype,
        ("_codecs", "encode"): encode,
        ("builtins", "bytes"): _no_bytes,
        ("__builtin__", "bytes"): _no_bytes,
    }
    for core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
        found[f"{core}.multiarray", "_reconstruct"] = _reconstruct
        found[f"{core}.multiarray", "scalar"] = _scalar
        found[f"{core}.numeric", "_frombuffer"] = _from_buffer
    return found


def _ndarray(*_: Any) -> Any:
    raise pickle.UnpicklingError("an array made without _reconstruct")


def _reconstruct(kind: Any, shape: Any, code: Any) -> IntArray:
    if kind is not _ndarray:
        raise pickle.UnpicklingError("an array of an unknown class")
    return IntArray()


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> IntArray:
    array = IntArray()
    array.fill(content, dtype, shape, order)
    return array


def _dtype(code: Any, align: Any = False, copy: Any = False) -> _IntType:
    if type(code) is not str or not re.fullmatch(r"[<>|=]?[iu][1248]", code):
        raise pickle.UnpicklingError(f"numbers of type {shown(code, 20)}, not integers")
    return _IntType(code)


def _scalar(dtype: Any, content: Any) -> int:
    array = IntArray()
    array.fill(content, dtype, (1,), "C")
    return int(array.array[0])


def _no_bytes() -> bytes:  # how protocol 2 says b""; with an argument it would allocate
    return b""
