"""Loading other people's pickles without running their code.

Only integers, text, bytes, lists, tuples, dicts and NumPy arrays and scalars of integers come out. Every global a
pickle names is looked up in a table of our own stand-ins, which check what they are given and build nothing but arrays
over the bytes that are in the file; no class or function of NumPy or Python is ever handed out. Files of up to
`CAREFUL_BYTES` go through a machine that also checks each step, so that a small file cannot ask for much memory or
stack. Larger ones, where that takes too long, go through the C machine with the same stand-ins: they still run no code.
"""

from __future__ import annotations

import contextlib
import gc
import io
import pickle
import struct
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from fedmpi.data.stand_ins import IntArray, stand_in

__all__ = ["IntArray", "RefusedError", "load_plain", "paused_gc"]

CAREFUL_BYTES = 8 * 2**20
"""Up to this size each step is checked."""

_MALFORMED = (
    pickle.UnpicklingError, ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, ImportError,
    LookupError, MemoryError, RecursionError, struct.error, SystemError, TypeError, ValueError,
)  # fmt: skip


class RefusedError(Exception):
    """The pickle is damaged or asks for more than data; the text says what."""


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
    """What the pickle `data` holds; arrays come as `IntArray`.

    Raises:
        RefusedError: whatever is wrong with it.
    """
    file = io.BytesIO(data)
    try:
        if len(data) <= CAREFUL_BYTES:
            return _CarefulMachine(file, encoding="latin1").load()
        return _FastMachine(file, encoding="latin1").load()
    except _MALFORMED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RefusedError(reason[:200]) from error


class _FastMachine(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return stand_in(module, name)

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
        return stand_in(module, name)

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
