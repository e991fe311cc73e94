"""Loading other people's pickles without running their code.

Only integers, text, bytes, flat lists and tuples, dicts, and NumPy arrays and scalars of integers come out. A first
pass judges all steps of the file (`pickle_scan`). The standard unpickler then takes them, with constructors of our own
in place of NumPy's (`pickle_arrays`); no class or function of NumPy or Python is ever handed out.
"""

from __future__ import annotations

import contextlib
import gc
import io
import pickle
import struct
from collections.abc import Iterator
from typing import Any

from fedmpi.core.errors import shown
from fedmpi.data.pickle_arrays import IntArray, constructors
from fedmpi.data.pickle_scan import RefusedError, check_pickle

__all__ = ["IntArray", "RefusedError", "load_plain", "paused_gc"]

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
    """What the pickle `data` holds; arrays come as `IntArray`.

    Raises:
        RefusedError: whatever is wrong with it.
    """
    check_pickle(data)
    try:
        return _Unpickler(data).load()
    except _MALFORMED as error:
        raise RefusedError(shown(str(error), 200) or type(error).__name__) from error


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._constructors = constructors(len(data))

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._constructors[module, name]
        except KeyError:
            asked = f"{shown(module)}.{shown(name)}"
            raise pickle.UnpicklingError(f"it asks for {asked}, which is no integer array") from None
