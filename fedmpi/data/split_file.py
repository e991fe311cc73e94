"""Split files: a pickle {client_id: int64 indices}, as FedLab's, and a manifest beside it that says what it is."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmpi.config import DataConfig
from fedmpi.data.datasets import Dataset
from fedmpi.data.partitioners import Partition, partition_parameters
from fedmpi.data.pickles import IntArray, RefusedError, load_plain, paused_gc
from fedmpi.data.split import RENUMBER, PartitionIndex
from fedmpi.data.trust import read_whole
from fedmpi.errors import FilesystemError, PartitionError, shown
from fedmpi.lifecycle.files import atomic_write, os_errors

VERSION = 1
_MAX_MANIFEST_BYTES = 2**20
_INT64: np.dtype[Any] = np.dtype(np.int64)


@paused_gc()
def save_dict(partition: Mapping[int, Any], path: str | Path) -> None:
    """Write {client_id: indices} as a pickle that any Python with NumPy loads; atomic.

    Raises:
        PartitionError: ids or indices that are no integers.
        FilesystemError: the folder cannot be written.
    """
    for client_id in partition:
        if isinstance(client_id, bool) or not isinstance(client_id, int | np.integer):
            found = f"{shown(client_id, 40)} ({type(client_id).__name__})"
            raise PartitionError(f"client ids must be integers, got {found}")
    plain = {int(client_id): _as_int64(client_id, indices) for client_id, indices in partition.items()}
    atomic_write(Path(path), lambda file: pickle.dump(plain, file, protocol=4))


def load_dict(path: str | Path) -> Partition:
    """Read what `save_dict`, FedLab, or another program pickled as {client_id: integers}; runs no code of the file.

    Raises:
        PartitionError: no such file, damaged, or it holds anything but integers, lists and arrays of integers.
    """
    return parse_dict(read_pickle(path), path)


def read_pickle(path: str | Path) -> bytes:
    """The bytes of a split file; errors as in `load_dict`."""
    with os_errors(PartitionError, f"{path} cannot be read"):
        try:
            return read_whole(path)
        except FileNotFoundError as error:
            raise PartitionError(f"{path}: no such file; python -m fedmpi.data.prepare makes splits") from error


@paused_gc()
def parse_dict(data: bytes, name: str | Path) -> Partition:
    """The split in these bytes, called `name` in messages; errors as in `load_dict`."""
    try:
        value = load_plain(data)
    except RefusedError as error:
        raise PartitionError(f"{name} is refused: {error}") from error
    if type(value) is not dict:
        raise PartitionError(f"{name} must hold a dict of client_id: indices, found a {type(value).__name__}")
    try:
        return _flat_copies(value, len(data))
    except PartitionError as error:
        raise PartitionError(f"{name}: {error}") from error


def _flat_copies(value: dict[Any, Any], num_bytes: int) -> Partition:
    """The arrays, writable, as views of one buffer."""
    if not {type(client_id) for client_id in value} <= {int}:
        wrong = next(client_id for client_id in value if type(client_id) is not int)
        found = f"{shown(wrong, 40)} ({type(wrong).__name__})"
        raise PartitionError(f"client ids must be the integers 0..{len(value) - 1}, found {found}; {RENUMBER}")
    ends = np.cumsum(np.fromiter((_size(*item) for item in value.items()), np.int64, len(value))).tolist()
    if ends and ends[-1] > num_bytes:  # one array under many ids: a small file that would fill the memory
        raise PartitionError("it holds more indices than bytes: some are shared between clients")
    if {indices.dtype if type(indices) is IntArray else None for indices in value.values()} == {_INT64}:
        joined = bytearray().join(indices.content for indices in value.values())  # a million of them take a second less
        flat = np.frombuffer(joined, np.int64)
    else:
        flat = np.concatenate([np.empty(0, np.int64), *(_as_int64(*item) for item in value.items())])
    return {client_id: flat[start:end] for client_id, start, end in zip(value, [0, *ends], ends, strict=False)}


def _size(client_id: int, indices: Any) -> int:
    if type(indices) is IntArray and len(indices.shape) == 1:
        return indices.shape[0]
    if type(indices) in (list, tuple):
        return len(indices)
    kind = f"array of shape {indices.shape}" if type(indices) is IntArray else type(indices).__name__
    raise PartitionError(f"client {client_id}: indices must be a list or a flat array of integers, got {kind}")


def _as_int64(client_id: object, indices: Any) -> NDArray[np.int64]:
    client = f"client {shown(client_id)}"
    indices = indices.array if type(indices) is IntArray else indices
    try:
        if isinstance(indices, list | tuple):
            for index in indices:
                if type(index) is not int and (isinstance(index, bool) or not isinstance(index, int | np.integer)):
                    found = f"{shown(index, 40)} ({type(index).__name__})"
                    raise PartitionError(f"{client}: indices must be integers, got {found}")
            return np.array(indices, np.int64)
        if isinstance(indices, np.ndarray) and indices.dtype.kind in "iu" and indices.ndim == 1:
            if indices.dtype.kind == "u" and indices.size and int(indices.max()) > np.iinfo(np.int64).max:
                raise PartitionError(f"{client} holds index {int(indices.max())}, too large for int64")
            return np.ascontiguousarray(indices, np.int64)
    except OverflowError as error:
        raise PartitionError(f"{client} holds an index too large for int64") from error
    what = f"{indices.dtype} of shape {indices.shape}" if isinstance(indices, np.ndarray) else type(indices).__name__
    raise PartitionError(f"{client}: indices must be a list or a flat array of integers, got {what}")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Of which data a split file is, how it was made, and the identity of the split."""

    version: int
    dataset: str
    dataset_sha256: str
    num_samples: int
    num_clients: int
    partition: str
    parameters: dict[str, float]
    seed: int
    sha256: str

    @classmethod
    def of(cls, index: PartitionIndex, dataset: Dataset, config: DataConfig) -> Manifest:
        """The manifest of a split that `config` made of `dataset`."""
        return cls(
            VERSION, dataset.name, dataset.sha256, len(dataset.train), index.num_clients, config.partition,
            partition_parameters(config), config.partition_seed, index.sha256(),
        )  # fmt: skip


def manifest_path(path: Path) -> Path:
    """The place of the manifest of the split file `path`."""
    return path.with_name(path.name + ".manifest.json")


def read_manifest(path: Path) -> Manifest | None:
    """The manifest of the split file `path`; None: it has none.

    Raises:
        PartitionError: damaged, or of a version this program does not know.
    """
    file = manifest_path(path)
    try:
        fields = json.loads(read_whole(file, _MAX_MANIFEST_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise PartitionError(f"{file} is no manifest: {shown(str(error), 200)}") from error
    if type(fields) is not dict or "version" not in fields:
        raise PartitionError(f"{file} is no manifest: it holds no version")
    if type(fields["version"]) is not int or fields["version"] != VERSION:
        raise PartitionError(f"{file} has version {shown(fields['version'])}, this program knows version {VERSION}")
    kinds = {field.name: {"int": int, "str": str}.get(str(field.type), dict) for field in dataclasses.fields(Manifest)}
    for name, kind in kinds.items():
        if type(fields.get(name)) is not kind:
            found = shown(fields.get(name, "nothing"))
            raise PartitionError(f"{file} is no manifest: {name} must be of type {kind.__name__}, found {found}")
    unknown = sorted(set(fields) - set(kinds))
    if unknown:
        raise PartitionError(f"{file} is no manifest: unknown fields {shown(unknown)}")
    return Manifest(**fields)


def write_partition(path: Path, index: PartitionIndex, manifest: Manifest) -> None:
    """Write the pickle, then its manifest: a manifest stands for a pickle that is complete.

    Raises:
        FilesystemError: the folder cannot be written.
    """
    with os_errors(FilesystemError, f"{manifest_path(path)} cannot be replaced"):
        manifest_path(path).unlink(missing_ok=True)
    save_dict({client_id: index[client_id] for client_id in range(index.num_clients)}, path)
    atomic_write(manifest_path(path), (json.dumps(dataclasses.asdict(manifest), indent=1) + "\n").encode())
