"""A checkpoint: the state of a run as one file.

A file is a safetensors file. Its metadata hold the format's version, the SHA-256 of the file (formed with zeros in the
place of the sum), and the plain values as JSON, in which `{"tensor": NAME}` stands for a tensor. Nothing in it can name
a function or a class, so reading a hostile one runs no code; sizes are compared before anything is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
import safetensors.torch
import torch

from fedmpi.errors import CheckpointError
from fedmpi.lifecycle.files import open_regular, os_errors

State = Mapping[str, Any]
"""Plain values, tensors and arrays of numbers, in mappings with text keys and in lists."""

_FORMAT = 2
_ANY_FORMAT = re.compile(rb'(?:^|"format":")fedmpi checkpoint (\d{1,9})\b')  # in format 1 it was the first line
_SUM = re.compile(rb'"sha256":"([0-9a-f]{64})"')  # text of the user has a backslash before each quotation mark
_NO_SUM = b"0" * 64
_FIRST_LINE_BYTES = 2**7
_MOST_HEADER_BYTES = 2**22
_MOST_VALUES = 2**17  # or 18,000 tensors: what is parsed stays below 100 MB
_SPARSE_BYTES = 2**30
_DAMAGED = "does not match its checksum: it is damaged or cut"
_FOREIGN = "is no checkpoint of this version of fedmpi"
_PLACEHOLDERS = ({"tensor"}, {"array"})  # keys of the dict in the place of a tensor or array
_DTYPES = {"bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"}


class OtherVersionError(CheckpointError):
    """A checkpoint that another version of fedmpi wrote; it may be whole."""


def snapshot(state: State) -> bytes:
    """Return `state` as the content of a file without its checksum; training may go on beside it.

    Raises:
        TypeError: a value, named by its path, that a checkpoint cannot hold.
        CheckpointError: too much of it is outside of tensors.
    """
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_pack(state, tensors, "state"))
    metadata = {"format": f"fedmpi checkpoint {_FORMAT}", "sha256": _NO_SUM.decode(), "state": text}
    content = safetensors.torch.save(tensors, metadata)
    if not _is_bounded(content[: _body_start(content)]):
        raise CheckpointError(
            f"a checkpoint holds at most {_MOST_HEADER_BYTES:,} bytes and {_MOST_VALUES:,} values beside arrays, this"
            f" state has {len(text):,} bytes: keep its numbers in arrays"
        )
    return content


def write_state(file: BinaryIO, content: bytes) -> None:
    """Write what `snapshot` returned, with its checksum."""
    digest, start = hashlib.sha256(content).hexdigest().encode(), _body_start(content)
    found = _SUM.search(content, 0, start)
    assert found is not None
    file.write(content[: found.start(1)] + digest + content[found.end(1) : start])
    file.write(memoryview(content)[start:])


def read_state(path: Path) -> dict[str, Any]:
    """Return the state in a file; tensors come back as tensors on the CPU, arrays as arrays.

    Raises:
        CheckpointError: the file is damaged, cut, of another version, or none of ours; it says how.
    """
    try:
        with os_errors(CheckpointError, "cannot be read", "{} ({})"), os.fdopen(open_regular(path), "rb") as file:
            return _read(file)
    except (ValueError, TypeError, LookupError, RuntimeError, OverflowError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"does not hold what its header promises ({type(error).__name__})") from error
    except MemoryError as error:
        raise CheckpointError("does not fit into memory") from error


def _read(file: BufferedReader) -> dict[str, Any]:
    stat = os.fstat(file.fileno())
    first = file.read(8)
    start = _body_start(first)
    is_header = 8 < start <= _MOST_HEADER_BYTES
    header = first + file.read(start - 8 if is_header else _FIRST_LINE_BYTES)
    other = _ANY_FORMAT.search(header) if is_header else _ANY_FORMAT.match(header)
    if not other:
        is_cut = is_header and len(first) == 8 and len(header) < start
        raise CheckpointError(_DAMAGED if is_cut else _FOREIGN if first else "is empty")
    if int(other[1]) != _FORMAT:
        raise OtherVersionError(f"{_FOREIGN} but of another (format {int(other[1])}, not {_FORMAT})")
    if not _is_bounded(header):
        raise CheckpointError(f"has a header of more than {_MOST_VALUES:,} values: none of fedmpi's")
    digest = _SUM.search(header)
    if digest is None or stat.st_size != start + _body_bytes(header):
        raise CheckpointError(_DAMAGED)
    if stat.st_size > _SPARSE_BYTES and 16 * 512 * stat.st_blocks < stat.st_size:
        raise CheckpointError(f"has {stat.st_size:,} bytes, nearly all of them holes: none of fedmpi's")
    if stat.st_size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise CheckpointError(f"has {stat.st_size:,} bytes, more than this machine has memory")
    formed = hashlib.sha256(header[: digest.start(1)] + _NO_SUM + header[digest.end(1) :])
    while piece := file.read(2**20):
        formed.update(piece)
    if formed.hexdigest().encode() != digest[1]:
        raise CheckpointError(_DAMAGED)
    file.seek(0)
    tensors = safetensors.torch.load(file.read())
    state = _unpack(json.loads(json.loads(header[8:])["__metadata__"]["state"]), tensors)
    if not isinstance(state, dict):
        raise TypeError("state")
    return state


def _body_start(content: bytes) -> int:
    """Return the index of the first tensor's bytes: a safetensors file begins with the length of its header."""
    return 8 + int.from_bytes(content[:8], "little")


def _body_bytes(header: bytes) -> int:
    """Return the bytes of all tensors, -1 if the header is damaged."""
    try:
        entries = json.loads(header[8:])
        return max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return -1


def _is_bounded(header: bytes) -> bool:
    """Return True if the header takes little time and memory to parse."""
    return len(header) <= _MOST_HEADER_BYTES and sum(map(header.count, (b"{", b"[", b","))) <= _MOST_VALUES


def _pack(value: Any, tensors: dict[str, torch.Tensor], where: str) -> Any:
    kind = f"a {type(value).__name__}"
    if isinstance(value, np.ndarray | torch.Tensor):
        dtype = value.dtype.name if isinstance(value, np.ndarray) else str(value.dtype).removeprefix("torch.")
        if dtype in _DTYPES:
            tensors[where] = _copy(value)
            return {"tensor" if isinstance(value, torch.Tensor) else "array": where}
        kind = f"an array of {dtype}"
    elif isinstance(value, Mapping) and set(value) not in _PLACEHOLDERS and all(isinstance(key, str) for key in value):
        return {key: _pack(item, tensors, f"{where}[{key!r}]") for key, item in value.items()}
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_pack(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]
    elif value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"a checkpoint holds numbers, text, arrays, lists and dicts with text keys; {where} is {kind}")


def _copy(value: np.ndarray[Any, Any] | torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy on the CPU."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value, value.dtype.newbyteorder("="), order="C"))
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) in _PLACEHOLDERS:
        ((kind, name),) = value.items()
        return tensors[name] if kind == "tensor" else tensors[name].numpy()
    return {key: _unpack(item, tensors) for key, item in value.items()}
