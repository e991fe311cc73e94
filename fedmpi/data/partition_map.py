"""A large split as a file that is mapped into memory: the ranks of a node share one copy and touch what they use.

Such a file is a copy of one partition pickle, found by the SHA-256 of that pickle's bytes, so that it can never stand
for another; whoever removes it loses nothing but the time it takes to read the pickle. It is used only where nobody
else can write (see `trust`): its own checksum shows damage, not who made it.

Layout, int64, little endian: SHA-256 of what follows (4 words), K, offsets (K + 1), indices (N).
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmpi.data.partition_index import PartitionIndex, check_partition
from fedmpi.data.partition_pickle import parse_dict, read_pickle
from fedmpi.data.trust import exposed
from fedmpi.errors import FilesystemError
from fedmpi.lifecycle.files import atomic_write

LARGE_BYTES = 2**20
"""Smaller pickles are read and sent to the ranks: that is quicker than a file."""

_FOLDER = "mapped-splits"
_DIGEST_WORDS = 4


def read_checked(path: Path, root: Path, num_samples: int, num_clients: int) -> PartitionIndex:
    """The split in a partition file, if it fits (see `check_partition`); a large one mapped.

    Args:
        path: the pickle.
        root: the folder of all data sets; mapped splits have a folder there, if it can be written.
        num_samples: size of the training data.
        num_clients: K.

    Raises:
        PartitionError: no such file, damaged, or it does not fit.
    """
    data = read_pickle(path)  # once: between two looks somebody may put another file there
    copy = root / _FOLDER / f"{hashlib.sha256(data).hexdigest()}.split" if len(data) >= LARGE_BYTES else None
    mapped = map_split(copy) if copy is not None else None
    index = check_partition(mapped or parse_dict(data, path), num_samples, num_clients, str(path))
    if copy is None or mapped is not None:
        return index
    return write_map(index, copy) or index


def write_map(index: PartitionIndex, path: Path) -> PartitionIndex | None:
    """Write a mapped split; None where the folder cannot be written, or others may write to it."""
    if exposed(path):
        return None
    words = np.concatenate([[index.num_clients], index.offsets, index.indices]).astype("<i8")
    with contextlib.suppress(OSError, FilesystemError):
        path.parent.mkdir(0o755, parents=True, exist_ok=True)
        atomic_write(path, hashlib.sha256(words.data).digest() + words.tobytes())
        return map_split(path)
    return None


def map_split(path: Path, whole: bool = True) -> PartitionIndex | None:
    """The split in a file that `write_map` wrote; None if there is none, it is damaged, or others may write to it.

    Args:
        path: the file.
        whole: read it all, to compare its checksum.
    """
    if exposed(path):
        return None
    try:
        words: NDArray[np.int64] = np.asarray(np.memmap(path, "<i8", "r"))
    except (OSError, ValueError):  # none, unreadable, empty
        return None
    num_clients = int(words[_DIGEST_WORDS]) if len(words) > _DIGEST_WORDS else -1
    start = _DIGEST_WORDS + 1
    if not 0 < num_clients <= len(words) - start - 1:
        return None
    if whole and hashlib.sha256(words[_DIGEST_WORDS:].data).digest() != words[:_DIGEST_WORDS].tobytes():
        return None
    stop = start + num_clients + 1
    return PartitionIndex(words[start:stop], words[stop:], path)
