"""An order and its vector go out to the ranks; what they did comes back: records of clients, and their sum or rows.

Both ways go along a binomial tree made by hand of sends and receives, in which a rank waits for its relatives only:
MPICH's `Ibcast` takes up to eight times, its `Ireduce` two to four times as long between ranks that sleep.

Shapes: P vector entries, K clients in the cohort.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmpi.core.messages import (
    SERVER_RANK,
    LocalWork,
    MessageCode,
    Order,
    Receiver,
    pack_updates,
    unpack_updates,
)
from fedmpi.core.timeline import Timeline

MAX_MESSAGE_BYTES = 2**30
"""Longer buffers travel in pieces: MPI's classic calls count in a C int."""

SUM_BYTES = 2**23
"""What a rank receives of another's sums at a time, to add it to its own."""

BLOCK_BYTES = 2**24
"""The server holds this much of the cohort's rows at a time, however many clients take part."""


class Collection(ABC):
    """Collectives that begin or end at the server.

    Attributes:
        rank: this process, 0 is the server.
        size: all processes.
        timeline: notes what this rank spends its time on.
    """

    rank: int
    size: int
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

    def collect(self, order: Order, work: LocalWork, receiver: Receiver) -> None:
        """Collective. Bring to the server what the ranks did for `order`.

        EVALUATE_PARAMS: the server's `work.metrics` becomes the sum over ranks.
        PARAMETER_UPDATE: the server's `receiver` gets each rank's client updates; then the server's `work.exact`
        becomes the sum over ranks, or, with `order.rows`, the receiver gets one block of columns after the other.
        """
        if order.code is MessageCode.EVALUATE_PARAMS:
            rows, _, signals = self._gather(work.metrics[None], note=work.stop)
            if self.rank == SERVER_RANK:
                work.metrics[:] = rows.sum(0)
            self._tell_signals(signals, receiver)
            return
        num_integers = len(order.integer_state)
        code = MessageCode.PARAMETER_UPDATE if order.rows else MessageCode.GRADIENT_UPDATE
        arrived, counts, signals = self._gather(pack_updates(work.updates, num_integers), note=work.stop)
        for rank, records in enumerate(np.split(arrived, np.cumsum(counts)[:-1]) if counts else []):
            receiver.on_receive(rank, code, unpack_updates(records))
        self._tell_signals(signals, receiver)
        if order.rows:
            self._collect_rows(len(order.cohort), work.rows, receiver)
        elif work.exact:
            self._sum_up(work.exact.buffers(work.exact.num_bins), work.exact.buffers)

    def _tell_signals(self, signals: list[int], receiver: Receiver) -> None:
        for rank, signal in enumerate(signals):
            if signal:
                receiver.on_receive(rank, MessageCode.EXIT, signal)

    def _collect_rows(self, num_rows: int, rows: list[NDArray[np.float32]], receiver: Receiver) -> None:
        with self.timeline.span("idle"):  # until the slowest rank is here
            width = self.max_of(len(rows[0]) if rows else 0)
        with self.timeline.span("collect"):
            room = np.empty(0, np.float32)  # one for all blocks: malloc would keep more than it gives back
            for columns in _column_blocks(width, num_rows):
                mine = [row[columns] for row in rows]
                empty = np.empty((0, columns.stop - columns.start), np.float32)
                block = self.gather_rows(np.stack(mine) if mine else empty, room)
                if self.rank == SERVER_RANK:
                    receiver.on_block(columns, block)
                    room = room if room.size else block.reshape(-1)

    def reduce_sum(self, sums: NDArray[np.int64]) -> None:
        """Collective. The server's int64 buffer becomes the sum over all ranks' buffers; the others' are used up."""
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

    def spread(self, vector: Any) -> None:
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

    def gather_rows(self, rows: NDArray[np.float32], room: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Collective. Each rank passes (k, B) rows; the server gets them all, rank after rank, the others (0, B).

        Args:
            rows: this rank's.
            room: on the server, a flat buffer to put them in, if it is large enough.
        """
        arrived, _, _ = self._gather(rows, room)
        self.count_bytes(rows.nbytes + arrived.nbytes)
        return arrived

    def gather_counts(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Collective. Each rank passes integers; the server gets them all, rank after rank, the others none."""
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


def _column_blocks(num_columns: int, num_rows: int) -> Iterator[slice]:
    """Slices that cover the columns, each at most `BLOCK_BYTES` of float32 in `num_rows` rows."""
    step = max(1, BLOCK_BYTES // (4 * max(1, num_rows)))
    return (slice(start, min(start + step, num_columns)) for start in range(0, num_columns, step))
