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

import numpy as np

from fedmpi.data.pickle_arrays import IntArray, constructors
from fedmpi.data.pickle_scan import RefusedError, flat_pickle
from fedmpi.errors import shown

__all__ = ["IntArray", "RefusedError", "load_plain", "paused_gc"]

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
    """What the pickle `data` holds; arrays come as `IntArray`.

    Raises:
        RefusedError: whatever is wrong with it.
    """
    flat, is_dict = flat_pickle(data)
    try:
        loaded = _Unpickler(flat).load()
        return _dict_of(loaded) if is_dict else loaded
    except _MALFORMED as error:
        raise RefusedError(shown(str(error), 200) or type(error).__name__) from error


def _dict_of(items: list[Any]) -> dict[Any, Any]:
    """The dict of keys and values in turn, or in pairs.

    Raises:
        RefusedError: many keys that are neither text nor 0..K-1, each once.
    """
    if tuple in set(map(type, items[::2])):  # single items of an old protocol
        flat: list[Any] = []
        rest = iter(items)
        for item in rest:
            flat += item if type(item) is tuple else (item, next(rest))
        items = flat
    keys, values = items[::2], items[1::2]
    if len(keys) > _MANY_KEYS and not set(map(type, keys)) <= {str, bytes} and not _counts_up(keys):
        raise RefusedError(f"its {len(keys):,} client ids are not the integers 0..{len(keys) - 1}, each once")
    return dict(zip(keys, values, strict=True))


def _counts_up(keys: list[Any]) -> bool:
    if set(map(type, keys)) != {int} or min(keys) < 0 or max(keys) >= len(keys):
        return False
    return bool(np.bincount(np.fromiter(keys, np.int64, len(keys))).max() == 1)


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
