"""Buffers that MPI reads and writes: what may be handed to it, and how that is said.

MPI counts bytes. A buffer with gaps, in another order, of another length or another type is read and written all the
same, and becomes numbers that nobody sent. So every transfer looks at its buffer first (`check_buffer`), and calls of a
user's own compare the buffers of all ranks too (`setup.agree_on_buffer`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedmpi.errors import TransferError

MAX_MESSAGE_BYTES = 2**30
"""Longer buffers travel in pieces: MPI's classic calls count in a C int."""

DEVICE_BYTES = "torch.uint8"
"""Memory of a device, as bytes: the only buffer that is no NumPy array. What the bytes mean, their owner knows."""

_NUMBERS = "biufc"
_REFUSED, _ANY = 1, np.iinfo(np.int64).min


def check_buffer(array: Any, dtype: str | None = None, count: int | None = None, *, written: bool = False) -> None:
    """Refuse a buffer that MPI would misread. Looks at this rank only.

    Args:
        array: NumPy array, or the bytes of a device.
        dtype: by name, e.g. "float32" or "float32 or int64"; None: any number, or the bytes of a device.
        count: items; None: any.
        written: MPI writes to it.

    Raises:
        TransferError: the buffer passed, and the one wanted.
    """
    names = dtype.split(" or ") if dtype else ()
    if type(array) in (np.ndarray, np.memmap):
        flags, kind = array.flags, array.dtype
        fits = flags.c_contiguous and flags.aligned and array.ndim > 0 and (flags.writeable or not written)
        fits = fits and (any(kind == name for name in names) if names else kind.kind in _NUMBERS and kind.isnative)
    else:
        fits = is_device_bytes(array) and (not names or DEVICE_BYTES in names)
    if not fits or (count is not None and math.prod(array.shape) != count):
        raise TransferError(f"the buffer is {described(array)}; wanted is {wanted(dtype, written, count)}")


class Form(NamedTuple):
    """The dtype and shape of a rank's buffer, once all ranks have agreed on theirs."""

    dtype: str
    shape: tuple[int, ...]

    def check(self, array: Any, *, written: bool = False) -> None:
        """Refuse a buffer of another form; looks at this rank only.

        Raises:
            TransferError: the buffer passed, and the one wanted.
        """
        check_buffer(array, self.dtype, math.prod(self.shape), written=written)


def is_device_bytes(array: Any) -> bool:
    """Return True for such memory, in one piece; without loading torch, which MPI's side does without."""
    kind = type(array)
    if (kind.__module__, kind.__name__) != ("torch", "Tensor") or str(array.dtype) != DEVICE_BYTES:
        return False
    return array.device.type in ("cpu", "cuda") and array.ndim > 0 and bool(array.is_contiguous())


def described(array: Any) -> str:
    """Return a buffer in a few words, e.g. "float32 of shape (3, 4), not contiguous, read-only"."""
    if isinstance(array, np.ndarray):
        names = [] if type(array) in (np.ndarray, np.memmap) else [f"a {type(array).__name__} of"]
        flags, dtype = array.flags, array.dtype
        plain = dtype.kind in _NUMBERS + "O"
        names += [dtype.name if plain else "structured" if dtype.names else f"dtype {dtype.str}"]
        notes = {
            "not contiguous (C order)": not flags.c_contiguous,
            "not aligned": not flags.aligned,
            "of the other byte order": not dtype.isnative,
            "read-only": not flags.writeable,
        }
        found = [note for note, holds in notes.items() if holds]
        return ", ".join([f"{' '.join(names)} of shape {array.shape}", *found])
    if type(array).__module__.partition(".")[0] == "torch" and hasattr(array, "shape"):
        gaps = "" if str(array.layout) != "torch.strided" or array.is_contiguous() else ", not contiguous"
        return f"a tensor ({array.dtype} on {array.device}) of shape {tuple(array.shape)}{gaps}"
    return f"of type {type(array).__name__}"


def wanted(dtype: str | None, written: bool, count: int | None = None) -> str:
    """Describe the buffer that `check_buffer` lets pass."""
    items = "" if count is None else f"{count} "
    return (
        f"a contiguous{', writable' if written else ''} NumPy array of {items}{dtype or 'numbers'}"
        " in this machine's byte order, of one dimension or more"
    )


def signature(call: str, array: Any, rows: bool) -> NDArray[np.int64]:
    """Return what all ranks must pass alike, as integers: bytes, and a digest of call, dtype and shape.

    Args:
        call: the transfer.
        array: a buffer that passed `check_buffer`; None for one that did not.
        rows: the first dimension may differ between ranks.
    """
    if array is None:
        return np.array([_REFUSED, 0, 0, _ANY, _ANY], np.int64)
    shape = tuple(array.shape[1:] if rows else array.shape)
    num_bytes = math.prod(shape) * array.itemsize
    if is_device_bytes(array):  # of any shape and type: the bytes decide
        return np.array([0, num_bytes, -num_bytes, _ANY, _ANY], np.int64)
    text = f"{call} {array.dtype.str} {shape}"
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 2
    return np.array([0, num_bytes, -num_bytes, digest, -digest], np.int64)


def is_alike(largest: NDArray[np.int64]) -> bool:
    """Return True if the ranks whose signatures have these maxima passed the same."""
    refused, most, least, digest, negated = largest.tolist()
    return not refused and most == -least and (digest == -negated or digest == negated == _ANY)


def as_bytes(array: Any) -> Any:
    """Return the same memory as bytes, which MPI counts alike on every library; a device's are bytes already."""
    return array.reshape(-1).view(np.uint8) if isinstance(array, np.ndarray) else array


def pieces_of(array: Any, num_bytes: int = MAX_MESSAGE_BYTES) -> Iterator[Any]:
    """Return contiguous parts of at most `num_bytes`, or of one item, whole items each."""
    flat = array.reshape(-1)
    step = max(1, num_bytes // array.itemsize)
    return (flat[start : start + step] for start in range(0, len(flat), step))
