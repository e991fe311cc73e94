"""A partition as two arrays, which is how a job keeps it: a million clients are two buffers, not a million objects.

Letters: K clients, N samples that are dealt out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmpi.errors import PartitionError, shown

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class PartitionIndex:
    """Client k holds `indices[offsets[k]:offsets[k + 1]]`; `offsets` (K + 1,) and `indices` (N,) are int64.

    `file`: where the arrays are mapped from (see `partition_map`); None: they are in memory.
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
        wrong = next((client_id for client_id in range(num_clients) if client_id not in partition), None)
        if wrong is not None:
            found = shown(list(partition)[:4])
            raise PartitionError(
                f"{num_clients} clients must have the ids 0..{num_clients - 1}, found {found}; to renumber a split: "
                "{k: split[client] for k, client in enumerate(split)}"
            )
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


def partition_sha256(partition: Mapping[int, Any]) -> str:
    """The identity (hex) of {client_id: indices}; see `PartitionIndex.sha256`."""
    return PartitionIndex.from_dict(partition).sha256()


def check_partition(
    partition: Mapping[int, Any] | PartitionIndex, num_samples: int, num_clients: int, name: str = "the split"
) -> PartitionIndex:
    """Refuse a split that does not fit the data, the number of clients or itself.

    A split that leaves samples out is legal and gets one warning.

    Args:
        partition: the split.
        num_samples: size of the training data.
        num_clients: K.
        name: what to call it in messages, e.g. its path.

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
    outside = np.flatnonzero((index.indices < 0) | (index.indices >= num_samples))
    if len(outside):
        raise PartitionError(
            f"{name}: client {_holder(index, outside[0])} holds index {index.indices[outside[0]]}, "
            f"the data has {num_samples} samples (0..{num_samples - 1})"
        )
    counts = np.bincount(index.indices, minlength=num_samples)
    if counts.max() > 1:
        twice = int(np.flatnonzero(counts > 1)[0])
        first, second = np.flatnonzero(index.indices == twice)[:2]
        raise PartitionError(
            f"{name}: sample {twice} occurs {counts[twice]} times (clients {_holder(index, first)} and "
            f"{_holder(index, second)}); {int((counts > 1).sum())} samples occur more than once"
        )
    if len(index.indices) < num_samples:
        logger.warning("%s uses %d of %d samples", name, len(index.indices), num_samples)
    return index


def _holder(index: PartitionIndex, position: int) -> int:
    return int(np.searchsorted(index.offsets, position, side="right")) - 1
