"""Checkpoints: the state of a run as one file that is whole or not there, and the newest two of them in a folder.

A file is a line `fedmpi checkpoint 1 SHA256`, then what the sum is of: a line of JSON and the bytes of the arrays it
names. Nothing in it can name a function or a class, so reading a hostile one runs no code; and nothing is read before
the length of the file is what the line of JSON says.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from fedmpi.errors import CheckpointError, FilesystemError
from fedmpi.lifecycle.files import atomic_write, free_path, open_regular, refuse_odd, remove_temps, sync_folder

logger = logging.getLogger(__name__)

State = Mapping[str, Any]
"""Plain values, CPU tensors and arrays of numbers, in mappings with text keys and in lists."""

GENERATIONS = 2

_FORMAT = 1
_MAGIC = f"fedmpi checkpoint {_FORMAT} ".encode()
_FIRST_LINE = len(_MAGIC) + 64 + 1
_ANY_FORMAT = re.compile(rb"fedmpi checkpoint (\d{1,9}) ")
_MOST_HEADER_BYTES = 2**22
_SMALL_BYTES = 2**26  # up to here the sum is formed even of a file that has not the length it must have
_SPARSE_BYTES = 2**30
_DAMAGED = "does not match its checksum: it is damaged or cut"
_ARRAY = "array"  # {"array": index}: where an array stood
_DTYPES = {
    np.dtype(name).str: name for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "float32", "float64")
}
_NAME = re.compile(r"round-(\d{1,12})\.ckpt")


class OtherVersionError(CheckpointError):
    """A checkpoint that another version of fedmpi wrote; it may be whole."""


def snapshot(state: State) -> State:
    """A copy of `state` that training may go on beside.

    Raises:
        TypeError: a value, named by its path, that a checkpoint cannot hold.
        CheckpointError: too much of it is no array.
    """
    arrays: list[NDArray[Any]] = []
    tree = _pack(state, arrays, "state")
    kinds = [[array.dtype.newbyteorder("<").str, list(array.shape)] for array in arrays]
    header = json.dumps({"state": tree, "arrays": kinds}, allow_nan=True).encode() + b"\n"
    if len(header) > _MOST_HEADER_BYTES:
        raise CheckpointError(
            f"a checkpoint holds at most {_MOST_HEADER_BYTES:,} bytes beside arrays, this state has {len(header):,}:"
            " keep its numbers in arrays"
        )
    return {"header": header, "arrays": [array.copy() for array in arrays]}


def write_state(file: BinaryIO, copied: State) -> None:
    """Write what `snapshot` returned."""
    arrays = copied["arrays"]
    little = (array.astype(array.dtype.newbyteorder("<"), copy=False) for array in arrays)
    parts = [copied["header"], *(array.reshape(-1).view(np.uint8).data for array in little)]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    file.write(_MAGIC + digest.hexdigest().encode() + b"\n")
    for part in parts:
        file.write(part)


def read_state(path: Path) -> dict[str, Any]:
    """The state in a file; tensors come back as arrays.

    Raises:
        CheckpointError: the file is damaged, cut, of another version, or none of ours; it says how.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            return _read(file)
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"does not hold what its first line promises ({type(error).__name__})") from error
    except MemoryError as error:
        raise CheckpointError("does not fit into memory") from error


def _read(file: BufferedReader) -> dict[str, Any]:
    stat = os.fstat(file.fileno())
    first = file.read(_FIRST_LINE)
    if not first.startswith(_MAGIC):
        other = _ANY_FORMAT.match(first)
        if other:
            raise OtherVersionError(
                f"is no checkpoint of this version of fedmpi but of another (format {int(other[1])}, not {_FORMAT})"
            )
        raise CheckpointError("is no checkpoint of this version of fedmpi" if first else "is empty")
    digest, header = hashlib.sha256(), file.readline(_MOST_HEADER_BYTES)
    digest.update(header)
    size = stat.st_size - len(first) - len(header)
    try:
        content = json.loads(header)
        promised = [(np.dtype(_DTYPES[dtype]), shape) for dtype, shape in content["arrays"]]
        if sum(_num_bytes(kind, shape, stat.st_size) for kind, shape in promised) != size:
            raise ValueError("size")
    except (ValueError, TypeError, KeyError, RecursionError):
        if size <= _SMALL_BYTES:
            digest.update(file.read())
        if size > _SMALL_BYTES or first[len(_MAGIC) :] != digest.hexdigest().encode() + b"\n":
            raise CheckpointError(_DAMAGED) from None
        raise
    if stat.st_size > _SPARSE_BYTES and 16 * 512 * stat.st_blocks < stat.st_size:
        raise CheckpointError(f"has {stat.st_size:,} bytes, nearly all of them holes: none of fedmpi's")
    if stat.st_size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise CheckpointError(f"has {stat.st_size:,} bytes, more than this machine has memory")
    arrays = []
    for kind, shape in promised:
        array = np.empty(shape, kind.newbyteorder("<"))
        piece = array.reshape(-1).view(np.uint8).data
        if file.readinto(piece) != len(piece):
            raise CheckpointError(_DAMAGED)
        digest.update(piece)
        arrays.append(array.astype(kind, copy=False))
    if first[len(_MAGIC) :] != digest.hexdigest().encode() + b"\n":
        raise CheckpointError(_DAMAGED)
    state = _unpack(content["state"], arrays)
    if not isinstance(state, dict):
        raise TypeError("state")
    return state


def _num_bytes(kind: np.dtype[Any], shape: list[int], most: int) -> int:
    if len(shape) > 32 or not all(type(length) is int and 0 <= length <= most for length in shape):
        raise ValueError("shape")
    return math.prod(shape) * kind.itemsize


def _pack(value: Any, arrays: list[NDArray[Any]], where: str) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray) and value.dtype.newbyteorder("<").str in _DTYPES:
        arrays.append(np.ascontiguousarray(value).reshape(value.shape))
        return {_ARRAY: len(arrays) - 1}
    if isinstance(value, Mapping) and set(value) != {_ARRAY} and all(isinstance(key, str) for key in value):
        return {key: _pack(each, arrays, f"{where}[{key!r}]") for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_pack(each, arrays, f"{where}[{i}]") for i, each in enumerate(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    kind = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
    raise TypeError(f"a checkpoint holds numbers, text, arrays, lists and dicts with text keys; {where} is {kind}")


def _unpack(value: Any, arrays: list[NDArray[Any]]) -> Any:
    if isinstance(value, list):
        return [_unpack(each, arrays) for each in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {_ARRAY}:
        return arrays[value[_ARRAY]]
    return {key: _unpack(each, arrays) for key, each in value.items()}


class Checkpoints:
    """The checkpoints in a folder. Written by a thread of its own, one at a time, while rank 0 goes on.

    Attributes:
        longest_s: the longest that writing one has taken.
        loaded_round: the round in the name of the one that `load` returned.
    """

    def __init__(self, folder: Path, may_write: Callable[[], None] = lambda: None) -> None:
        """In `folder`, which need not be there yet. `may_write` is called right before each change; it may raise."""
        self.folder = folder
        self._may_write = may_write
        self.loaded_round = -1
        self.longest_s = 0.0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._began_s = 0.0
        self._damaged: list[Path] = []

    def names(self) -> list[Path]:
        """The files, the newest first: by the round in their name, for clocks jump."""
        found = [path for path in self.folder.glob("round-*.ckpt") if _NAME.fullmatch(path.name)]
        return sorted(found, key=_round_of, reverse=True)

    def load(self) -> dict[str, Any] | None:
        """The newest state that is whole; None if there was never one. A damaged newer one is said in a line.

        Raises:
            CheckpointError: there are some, and none is whole; or a newer one is of another version.
            FilesystemError: a link or a file lies in the place of the folder.
        """
        refuse_odd(self.folder, folder=True)
        damaged: list[tuple[Path, CheckpointError]] = []
        for path in self.names():
            try:
                state = read_state(path)
            except OtherVersionError as error:
                raise CheckpointError(
                    f"{path} {error}: go on with that one, or --resume never to start over"
                ) from error
            except CheckpointError as error:
                damaged.append((path, error))
                continue
            for bad, reason in damaged:
                logger.warning("checkpoint %s %s: going on from %s", bad, reason, path.name)
            self._damaged, self.loaded_round = [bad for bad, _ in damaged], _round_of(path)
            return state
        if damaged:
            told = "; ".join(f"{path.name} {reason}" for path, reason in damaged)
            raise CheckpointError(f"no checkpoint in {self.folder} is whole: {told}; --resume never starts over")
        return None

    def begin(self) -> None:
        """Make the folder; remove what a killed writer left, and put aside what `load` found damaged.

        Raises:
            FilesystemError: it cannot be written.
        """
        self._ask()
        try:
            self.folder.mkdir(exist_ok=True)
            for path in self._damaged:
                path.rename(free_path(path.with_name(path.name + ".damaged")))
        except OSError as error:
            raise FilesystemError(f"{self.folder}: cannot be written ({error.strerror})") from error
        remove_temps(self.folder)

    @property
    def writes_for_s(self) -> float:
        """Seconds for which one has been under way to the disk; 0: none is."""
        thread = self._thread
        return time.monotonic() - self._began_s if thread is not None and thread.is_alive() else 0.0

    def write(self, round_idx: int, state: State, before: Callable[[], None]) -> None:
        """Begin to write `state`, as of now; call `before` first, in the same thread.

        Raises:
            FilesystemError: the one before could not be written.
        """
        self.finish()
        copied = snapshot(state)
        self._began_s = time.monotonic()
        self._thread = threading.Thread(target=self._write, args=(round_idx, copied, before), name="checkpoint")
        self._thread.start()

    def finish(self) -> None:
        """Return once what was begun is on disk.

        Raises:
            FilesystemError: it could not be written; the checkpoints before it are untouched.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, round_idx: int, copied: State, before: Callable[[], None]) -> None:
        try:
            before()
            path = self.folder / f"round-{round_idx:06}.ckpt"
            atomic_write(path, lambda file: write_state(file, copied), self._ask)
            for old in self.names()[GENERATIONS:]:
                old.unlink(missing_ok=True)
            sync_folder(self.folder)
        except OSError as error:
            self._error = FilesystemError(f"{self.folder}: cannot be tidied up ({error.strerror})")
        except BaseException as error:  # noqa: BLE001  # whatever it is: `finish` raises it in the main thread
            self._error = error
        self.longest_s = max(self.longest_s, time.monotonic() - self._began_s)

    def _ask(self) -> None:
        refuse_odd(self.folder, folder=True)
        self._may_write()


def _round_of(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else -1
