"""FedLab's `PackageProcessor`: a rank's end of the communicator, with the functions of `fedmpi.mpi` as methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedmpi.errors import FedmpiError
from fedmpi.mpi import setup, tree
from fedmpi.mpi.buffers import Form
from fedmpi.mpi.comm import Comm

T = TypeVar("T")


class PackageProcessor(Comm):
    """A rank's end of the job's communicator, for scripts: the functions of `fedmpi.mpi` as methods."""

    def on_root(self, work: Callable[[], T], share: bool = True) -> T:
        """Collective. See `setup.on_root`."""
        return setup.on_root(self, work, share)

    def on_all(self, work: Callable[[], T]) -> T:
        """Collective. See `setup.on_all`."""
        return setup.on_all(self, work)

    def agree(self, error: FedmpiError | None) -> None:
        """Collective. See `setup.agree`."""
        setup.agree(self, error)

    def on_every_rank(self, value: T) -> list[T]:
        """Collective. See `setup.on_every_rank`."""
        return setup.on_every_rank(self, value)

    def same_everywhere(self, facts: Mapping[str, object]) -> dict[str, dict[object, list[int]]]:
        """Collective. See `setup.same_everywhere`."""
        return setup.same_everywhere(self, facts)

    def require_same(self, facts: Mapping[str, object]) -> None:
        """Collective. See `setup.require_same`."""
        setup.require_same(self, facts)

    def bcast_vector(self, vector: T, agreed: Form | None = None) -> T:
        """Collective. See `tree.bcast_vector`."""
        return tree.bcast_vector(self, vector, agreed)

    def reduce_sum(self, sums: NDArray[np.int64], agreed: Form | None = None) -> None:
        """Collective. See `tree.reduce_sum`."""
        tree.reduce_sum(self, sums, agreed)

    def gather_rows(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Collective. See `tree.gather_rows`."""
        return tree.gather_rows(self, rows)

    def gather_counts(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Collective. See `tree.gather_counts`."""
        return tree.gather_counts(self, values)
