"""A split as two arrays, in memory or mapped from a file: a million clients are two buffers, not a million objects.

A mapped split is a copy of one partition pickle, found by the SHA-256 of that pickle's bytes, so that it can never
stand for another; whoever removes it loses nothing but the time it takes to read the pickle. The ranks of a node share
one copy. It is used only where nobody else can write (see `trust`): its checksum shows damage, not who made it.

Layout, int64, little endian: SHA-256 of what follows (4 words), K, offsets (K + 1), indices (N).

Letters: K clients, N samples that are dealt out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmpi.data.trust import exposed
from fedmpi.errors import FilesystemError, PartitionError, shown
from fedmpi.lifecycle.files import atomic_write

RENUMBER = "to renumber a split: {k: split[client] for k, client in enumerate(split)}"

_DIGEST_WORDS = 4

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class PartitionIndex:
    """Client k holds `indices[offsets[k]:offsets[k + 1]]`; `offsets` (K + 1,) and `indices` (N,) are int64.

    `file`: where the arrays are mapped from; None: they are in memory.
    """

    offsets: NDArray[np.int64]
    indices: NDArray[np.int64]
    file: Path | None = None

    def __getitem__(self, client_id: int) -> NDArray[np.int64]:
        """The samples of a client: a view, not a copy."""
        if not 0 <= client_id < self.num_clients:
            raise IndexError(f"client_id must be in [0, {self.num_clients}), got {client_id}")
        return self.indices[self.offsets[client_id] : self.offsets[client_id + 1]]

    @property
    def num_clients(self) -> int:
        """K."""
        return len(self.offsets) - 1

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(K,) samples of each client."""
        return np.diff(self.offsets)

    def sha256(self) -> str:
        """Identity of the split: who holds what, in which order."""
        digest = hashlib.sha256()
        for part in (self.offsets, self.indices):
            digest.update(np.ascontiguousarray(part, "<i8").data)
        return digest.hexdigest()

    @classmethod
    def from_dict(cls, partition: Mapping[int, Any]) -> PartitionIndex:
        """From {client_id: indices} with the ids 0..K-1.

        Raises:
            PartitionError: other ids, a client without samples, or indices that are no integers.
        """
        num_clients = len(partition)
        if num_clients == 0:
            raise PartitionError("a split without clients")
        if not all(client_id in partition for client_id in range(num_clients)):
            wanted, found = f"0..{num_clients - 1}", shown(list(partition)[:4])
            raise PartitionError(f"{num_clients} clients must have the ids {wanted}, found {found}; {RENUMBER}")
        parts = [partition[client_id] for client_id in range(num_clients)]
        sizes = np.fromiter(map(len, parts), np.int64, num_clients)
        if sizes.min() == 0:
            raise PartitionError(f"client {int(sizes.argmin())} holds no sample")
        try:
            indices = np.concatenate(parts)
        except (TypeError, ValueError) as error:
            raise PartitionError(
                f"the indices of a client must be one list of integers: {shown(str(error))}"
            ) from error
        if indices.dtype.kind not in "iu" or indices.ndim != 1:
            raise PartitionError(f"indices must be integers, got {indices.dtype}")
        return cls(np.concatenate(([0], np.cumsum(sizes))), indices.astype(np.int64, copy=False))


def check_partition(
    partition: Mapping[int, Any] | PartitionIndex, num_samples: int, num_clients: int, name: str = "the split"
) -> PartitionIndex:
    """Refuse a split that does not fit the data, the number of clients or itself; one that leaves samples out is legal.

    Raises:
        PartitionError: client ids other than 0..K-1, an index out of range or held twice, no integers, an empty client.
    """
    found = len(partition) if isinstance(partition, Mapping) else partition.num_clients
    if found != num_clients:
        raise PartitionError(
            f"{name} holds {found} clients, --num-clients is {num_clients}: give the one that is meant"
        )
    try:
        index = PartitionIndex.from_dict(partition) if isinstance(partition, Mapping) else partition
    except PartitionError as error:
        raise PartitionError(f"{name}: {error}") from error

    def owner(position: int) -> int:
        return int(np.searchsorted(index.offsets, position, side="right")) - 1

    outside = np.flatnonzero((index.indices < 0) | (index.indices >= num_samples))
    if len(outside):
        raise PartitionError(
            f"{name}: client {owner(outside[0])} holds index {index.indices[outside[0]]}, "
            f"the data has {num_samples} samples (0..{num_samples - 1})"
        )
    counts = np.bincount(index.indices, minlength=num_samples)
    if counts.max() > 1:
        twice = int(np.flatnonzero(counts > 1)[0])
        first, second = np.flatnonzero(index.indices == twice)[:2]
        raise PartitionError(
            f"{name}: sample {twice} occurs {counts[twice]} times (clients {owner(first)} and "
            f"{owner(second)}); {int((counts > 1).sum())} samples occur more than once"
        )
    if len(index.indices) < num_samples:
        logger.warning("%s uses %d of %d samples", name, len(index.indices), num_samples)
    return index


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

    `whole`: read it all, to compare its checksum.
    """
    if exposed(path):
        return None
    try:
        words: NDArray[np.int64] = np.asarray(np.memmap(path, "<i8", "r"))
    except (OSError, ValueError):  # none, unreadable, empty
        return None
    num_clients = int(words[_DIGEST_WORDS]) if len(words) > _DIGEST_WORDS else -1
    start = _DIGEST_WORDS + 1
    stop = start + num_clients + 1
    if not start + 1 < stop <= len(words):
        return None
    if whole and hashlib.sha256(words[_DIGEST_WORDS:].data).digest() != words[:_DIGEST_WORDS].tobytes():
        return None
    return PartitionIndex(words[start:stop], words[stop:], path)
