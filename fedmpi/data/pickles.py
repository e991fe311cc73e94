"""Loading other people's pickles without running their code.

Only integers, text, bytes, lists, tuples, dicts and NumPy arrays and scalars of integers come out. Every global a
pickle names is looked up in a table of our own stand-ins, which check what they are given and build nothing but arrays
over the bytes that are in the file; no class or function of NumPy or Python is ever handed out. Pickles of any size
that a person writes by hand go through a machine that also checks each step; only the large ones, where that takes too
long, go through the fast C machine, with the same stand-ins.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

CAREFUL_BYTES = 8 * 2**20
"""Up to this size each step is checked."""

_MALFORMED = (
    pickle.UnpicklingError, ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, ImportError,
    LookupError, MemoryError, RecursionError, struct.error, SystemError, TypeError, ValueError,
)  # fmt: skip


class RefusedError(Exception):
    """The pickle is damaged or asks for more than data; the text says what."""


def load_plain(data: bytes) -> Any:
    """What the pickle `data` holds; arrays come as `IntArray`.

    Raises:
        RefusedError: whatever is wrong with it.
    """
    careful = len(data) <= CAREFUL_BYTES or _has_odd_memo(data)
    try:
        file = io.BytesIO(data)
        value = (
            _CarefulMachine(file, encoding="latin1").load() if careful else _FastMachine(file, encoding="latin1").load()
        )
    except _MALFORMED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RefusedError(reason[:200]) from error
    return value


class IntArray:
    """A NumPy array on its way out of a pickle: `array` once the pickle has given its state."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array: NDArray[Any] = np.empty(0, np.int64)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        self.fill(content, dtype, shape, "F" if fortran else "C")

    def fill(self, content: Any, dtype: Any, shape: Any, order: Any) -> None:
        """Look at `content` (bytes, or a latin-1 str from Python 2) as an array."""
        if type(content) is str:
            content = content.encode("latin1")
        if type(content) not in (bytes, bytearray) or type(dtype) is not _IntType or type(shape) is not tuple:
            raise pickle.UnpicklingError("an array that is not made of integers and bytes")
        if not all(type(n) is int and n >= 0 for n in shape) or order not in ("C", "F"):
            raise pickle.UnpicklingError(f"an array of shape {shape}")
        if math.prod(shape) * dtype.dtype.itemsize != len(content):
            raise pickle.UnpicklingError(f"an array of shape {shape} over {len(content)} bytes")
        array = np.frombuffer(content, dtype.dtype)
        self.array = array if len(shape) == 1 else array.reshape(shape, order=order)


class _IntType:
    """A NumPy dtype on its way out: an integer type, nothing else."""

    __slots__ = ("dtype",)

    def __init__(self, code: str) -> None:
        self.dtype = np.dtype(code)

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


_STAND_INS: dict[tuple[str, str], _StandIn] = {
    ("numpy", "ndarray"): _Ndarray(),
    ("numpy", "dtype"): _Dtype(),
    ("_codecs", "encode"): _Encode(),
    ("builtins", "bytes"): _NoBytes(),
    ("__builtin__", "bytes"): _NoBytes(),
}
for _core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    _STAND_INS[f"{_core}.multiarray", "_reconstruct"] = _Reconstruct()
    _STAND_INS[f"{_core}.multiarray", "scalar"] = _Scalar()
    _STAND_INS[f"{_core}.numeric", "_frombuffer"] = _FromBuffer()


def _stand_in(module: str, name: str) -> _StandIn:
    try:
        return _STAND_INS[module, name]
    except KeyError:
        raise pickle.UnpicklingError(f"it asks for {module[:80]}.{name[:80]}, which is no integer array") from None


class _FastMachine(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _stand_in(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside the file")


_Step = Callable[[Any], None]


class _Steps(dict[int, _Step]):
    def __missing__(self, opcode: int) -> _Step:
        raise pickle.UnpicklingError(f"it is no pickle of plain data (step {opcode:#x})")


_PLAIN_STEPS = b"\x80\x95.(012NI\x88\x89JKMG\x8a\x8bFLSUTVX\x8c\x8dBC\x8e\x96])\x85\x86\x87tl}dsuaecgphjqr\x94R\x93b"
"""The opcodes admitted: no objects (i o \\x81 \\x92), extensions (\\x82-\\x84), persistent ids (P Q), sets, buffers."""


class _CarefulMachine(pickle._Unpickler):
    """Python's own pickle machine in Python, with only the steps that make plain data.

    Its memo is a dict, so an index of 4 billion allocates nothing, and keys are flat, because hashing a deeply nested
    tuple overflows the C stack.
    """

    dispatch: ClassVar[dict[int, Any]] = _Steps({step: pickle._Unpickler.dispatch[step] for step in _PLAIN_STEPS})
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def find_class(self, module: str, name: str) -> Any:
        return _stand_in(module, name)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set(items)

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _set(self, items: list[Any]) -> None:
        target, keys = self.stack[-1], items[::2]
        if type(target) is not dict or not {type(key) for key in keys} <= {int, str, bytes}:
            raise pickle.UnpicklingError("a dict whose keys are neither integers nor text")
        target.update(zip(keys, items[1::2], strict=True))

    dispatch[ord("d")] = load_dict
    dispatch[ord("u")] = load_setitems
    dispatch[ord("s")] = load_setitem


def _has_odd_memo(data: bytes) -> bool:
    """Whether some bytes of `data` could tell the C machine to make a memo larger than `data`. May say so in vain."""
    after = np.flatnonzero(np.frombuffer(data, np.uint8)[: max(0, len(data) - 4)] == ord("r")) + 1
    index = sum(np.frombuffer(data, np.uint8)[after + i].astype(np.int64) << (8 * i) for i in range(4))
    return bool(np.any(index > len(data))) or re.search(rb"p[\s+_0-9]{8,}\n", data) is not None
