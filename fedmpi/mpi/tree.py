"""Buffers go from the server to all ranks and from all ranks to the server.

Both ways go along a binomial tree made by hand of sends and receives, in which a rank waits for its relatives only:
MPICH's `Ibcast` takes up to eight times, its `Ireduce` two to four times as long between ranks that sleep.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmpi.mpi.buffers import Form
from fedmpi.mpi.messages import SERVER_RANK
from fedmpi.mpi.setup import Agreement
from fedmpi.mpi.timeline import Timeline

MAX_MESSAGE_BYTES = 2**30
"""Longer buffers travel in pieces: MPI's classic calls count in a C int."""

SUM_BYTES = 2**23
"""What a rank receives of another's sums at a time, to add it to its own."""


class Tree(Agreement):
    """Collectives of buffers that begin or end at the server.

    Attributes:
        timeline: notes what this rank spends its time on.
    """

    timeline: Timeline

    @abstractmethod
    def send(self, array: NDArray[Any], *ranks: int) -> None:
        """Send a contiguous buffer of at most `MAX_MESSAGE_BYTES` to each of `ranks`, at the same time."""

    @abstractmethod
    def receive(self, array: NDArray[Any], rank: int) -> None:
        """Receive what `rank` sends into a buffer of that size."""

    @abstractmethod
    def max_of(self, value: int) -> int:
        """Collective. The largest of the ranks' values, on every rank."""

    @abstractmethod
    def count_bytes(self, num_bytes: int) -> None:
        """Note what went through a call of this rank's."""

    def reduce_sum(self, sums: NDArray[np.int64], agreed: Form | None = None) -> None:
        """Collective. The server's int64 buffer becomes the sum over all ranks' buffers; the others' are used up.

        Args:
            sums: int64, of the same shape on all ranks.
            agreed: what `agree_on_buffer` returned; None: compare the ranks' buffers now.

        Raises:
            TransferError: on every rank, if any rank's buffer is another.
        """
        if agreed is None:
            self.agree_on_buffer("reduce_sum", sums, "int64", written=True)
        else:
            agreed.check(sums, written=True)
        self._sum_up([sums], lambda _: [sums])

    def _sum_up(self, sums: list[NDArray[np.int64]], grow: Callable[[int], list[NDArray[np.int64]]]) -> None:
        """Collective. `reduce_sum` of as many buffers as the rank with the most of them has.

        Args:
            sums: this rank's buffers; more come at the end.
            grow: that many buffers, the first of which are `sums`.
        """
        parent, children = relatives(self.rank, self.size)
        count = np.empty(1, np.int64)
        for child in children:
            with self.timeline.span("idle"):
                self.receive(count, child)
            with self.timeline.span("collect"):
                sums += grow(int(count[0]))[len(sums) :]
                for buffer in sums[: int(count[0])]:
                    self._receive_and_add(buffer, child)
        if parent is not None:
            with self.timeline.span("collect"):
                self.send(np.array([len(sums)], np.int64), parent)
                for buffer in sums:
                    for piece in pieces_of(buffer, SUM_BYTES):
                        self.send(piece, parent)
        for buffer in sums:
            self.count_bytes(buffer.nbytes)

    def _spread(self, vector: Any) -> None:
        """Collective. The server's contiguous buffer overwrites the others'; one may lie on a device, as bytes."""
        parent, children = relatives(self.rank, self.size)
        for piece in pieces_of(vector):
            if parent is not None:
                self.receive(piece, parent)
            self.send(piece, *reversed(children))  # the one with the most below it first
        self.count_bytes(vector.nbytes)

    def _receive_and_add(self, buffer: NDArray[np.int64], source: int) -> None:
        arrived = np.empty(min(buffer.size, max(1, SUM_BYTES // 8)), np.int64)
        for piece in pieces_of(buffer, SUM_BYTES):
            self.receive(arrived[: piece.size], source)
            piece += arrived[: piece.size]

    def gather_rows(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Collective. Each rank passes (k, B) float32 rows, k >= 0; the server gets them all, the others (0, B).

        Raises:
            TransferError: on every rank, if any rank's rows have another width or type.
        """
        self.agree_on_buffer("gather_rows", rows, "float32", rows=True)
        return self._gather_rows(rows)

    def _gather_rows(self, rows: NDArray[np.float32], room: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Collective. `gather_rows` of rows whose width the ranks know; `room`: the server's flat buffer for them."""
        arrived, _, _ = self._gather(rows, room)
        self.count_bytes(rows.nbytes + arrived.nbytes)
        return arrived

    def gather_counts(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Collective. Each rank passes (k,) int64; the server gets them all, rank after rank, the others none.

        Raises:
            TransferError: on every rank, if any rank's values are of another type.
        """
        self.agree_on_buffer("gather_counts", values, "int64", rows=True)
        return self._gather(values)[0]

    def _gather(
        self, mine: NDArray[Any], room: NDArray[Any] | None = None, note: int = 0
    ) -> tuple[NDArray[Any], list[int], list[int]]:
        """Collective. On the server all ranks' items, rank after rank, how many each had, and the ranks' notes.

        Nothing elsewhere.
        """
        first = np.array([len(mine), note], np.int64)
        if self.rank != SERVER_RANK:
            self.send(first, SERVER_RANK)
            for piece in pieces_of(as_bytes(mine)):
                self.send(piece, SERVER_RANK)
            return mine[:0], [], []
        counts, notes = [len(mine)], [note]
        for rank in range(1, self.size):
            with self.timeline.span("idle"):
                self.receive(first, rank)
            counts.append(int(first[0]))
            notes.append(int(first[1]))
        shape = (sum(counts), *mine.shape[1:])
        fits = room is not None and room.size >= math.prod(shape)
        arrived = room[: math.prod(shape)].reshape(shape) if room is not None and fits else np.empty(shape, mine.dtype)
        arrived[: len(mine)] = mine
        with self.timeline.span("collect"):
            for rank, stop in list(enumerate(np.cumsum(counts)))[1:]:
                for piece in pieces_of(as_bytes(arrived[stop - counts[rank] : stop])):
                    self.receive(piece, rank)
        return arrived, counts, notes


def relatives(rank: int, size: int) -> tuple[int | None, list[int]]:
    """A rank's parent and children in the binomial tree over `size` ranks; the last child has the most below it."""
    children: list[int] = []
    distance = 1
    while distance < size:
        if rank % (2 * distance):
            return rank - distance, children
        if rank + distance < size:
            children.append(rank + distance)
        distance *= 2
    return None, children


def as_bytes(array: Any) -> Any:
    """The same memory as bytes, which MPI counts alike on every library; what is no NumPy array is bytes already."""
    return array.reshape(-1).view(np.uint8) if isinstance(array, np.ndarray) else array


def pieces_of(array: Any, num_bytes: int | None = None) -> Iterator[Any]:
    """Contiguous parts of at most `num_bytes` (default: `MAX_MESSAGE_BYTES`), whole items each."""
    flat = array.reshape(-1)
    step = max(1, (num_bytes or MAX_MESSAGE_BYTES) // array.itemsize)
    return (flat[start : start + step] for start in range(0, len(flat), step))
