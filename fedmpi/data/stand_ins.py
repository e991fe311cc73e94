"""What a pickle gets instead of NumPy's functions: objects that check what they get and only look at its bytes."""

from __future__ import annotations

import pickle
import re
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

_INT64: np.dtype[Any] = np.dtype(np.int64)


class IntArray:
    """An array of integers on its way out of a pickle: so far only the bytes and how to look at them."""

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
        plain = type(content) is bytes and type(dtype) is _IntType and type(shape) is tuple and len(shape) == 1
        if plain and type(shape[0]) is int and shape[0] * dtype.itemsize == len(content):  # nearly all of a split's
            self.content, self.dtype, self.shape = content, dtype.dtype, shape
            return
        self.fill(content, dtype, shape, "F" if fortran else "C")

    def fill(self, content: Any, dtype: Any, shape: Any, order: Any) -> None:
        """Take the bytes (a latin-1 str from Python 2) if type, shape and length agree."""
        if type(content) is str:
            content = content.encode("latin1")
        if type(content) not in (bytes, bytearray) or type(dtype) is not _IntType or type(shape) is not tuple:
            raise pickle.UnpicklingError("an array that is not made of integers and bytes")
        num_entries = 1
        for n in shape:
            if type(n) is not int or n < 0:
                raise pickle.UnpicklingError(f"an array of shape {shape}")
            num_entries *= n
        if num_entries * dtype.dtype.itemsize != len(content) or order not in ("C", "F"):
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


class _StandIn:
    """What a pickle gets where it names a global. Without a `__dict__`, so that a pickle cannot change it."""

    __slots__ = ()


class _Ndarray(_StandIn):
    __slots__ = ()


class _Reconstruct(_StandIn):
    __slots__ = ()

    def __call__(self, kind: Any, shape: Any, code: Any) -> IntArray:
        if type(kind) is not _Ndarray:
            raise pickle.UnpicklingError("an array of an unknown class")
        return IntArray()


class _FromBuffer(_StandIn):
    __slots__ = ()

    def __call__(self, content: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> IntArray:
        array = IntArray()
        array.fill(content, dtype, shape, order)
        return array


class _Dtype(_StandIn):
    __slots__ = ()

    def __call__(self, code: Any, align: Any = False, copy: Any = False) -> _IntType:
        if type(code) is not str or not re.fullmatch(r"[<>|=]?[iu][1248]", code):
            raise pickle.UnpicklingError(f"numbers of type {str(code)[:20]!r}, not integers")
        return _IntType(code)


class _Scalar(_StandIn):
    __slots__ = ()

    def __call__(self, dtype: Any, content: Any) -> int:
        array = IntArray()
        array.fill(content, dtype, (1,), "C")
        return int(array.array[0])


class _Encode(_StandIn):
    __slots__ = ()

    def __call__(self, text: Any, encoding: Any) -> bytes:
        if type(text) is not str or encoding != "latin1":
            raise pickle.UnpicklingError("bytes in an unknown encoding")
        return text.encode("latin1")


class _NoBytes(_StandIn):
    __slots__ = ()

    def __call__(self) -> bytes:  # how protocol 2 says b""; with an argument it would allocate
        return b""


STAND_INS: dict[tuple[str, str], _StandIn] = {
    ("numpy", "ndarray"): _Ndarray(),
    ("numpy", "dtype"): _Dtype(),
    ("_codecs", "encode"): _Encode(),
    ("builtins", "bytes"): _NoBytes(),
    ("__builtin__", "bytes"): _NoBytes(),
}
for _core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    STAND_INS[f"{_core}.multiarray", "_reconstruct"] = _Reconstruct()
    STAND_INS[f"{_core}.multiarray", "scalar"] = _Scalar()
    STAND_INS[f"{_core}.numeric", "_frombuffer"] = _FromBuffer()


def stand_in(module: str, name: str) -> _StandIn:
    try:
        return STAND_INS[module, name]
    except KeyError:
        raise pickle.UnpicklingError(f"it asks for {module[:80]}.{name[:80]}, which is no integer array") from None
