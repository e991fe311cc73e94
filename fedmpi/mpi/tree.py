"""Collectives of buffers: from the server to all ranks, and from all ranks to the server.

Both ways go along a binomial tree made by hand of sends and receives, in which a rank waits for its relatives only:
MPICH's `Ibcast` takes up to eight times, its `Ireduce` two to four times as long between ranks that sleep.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedmpi.mpi.buffers import MAX_MESSAGE_BYTES, Form, as_bytes, pieces_of
from fedmpi.mpi.comm import Comm
from fedmpi.mpi.processes import SERVER_RANK
from fedmpi.mpi.setup import agree_on_buffer, require_form

SUM_BYTES = 2**23
"""A rank receives so much of another's sums at a time, to add it to its own."""

Buffer = TypeVar("Buffer")


def bcast(comm: Comm, array: Any, piece_bytes: int = MAX_MESSAGE_BYTES) -> None:
    """Collective. Overwrite the others' buffers with the server's, unchecked; one may lie on a device, as bytes."""
    parent, children = relatives(comm.rank, comm.size)
    for piece in pieces_of(array, piece_bytes):
        if parent is not None:
            comm.receive(piece, parent)
        comm.send(piece, *reversed(children))  # the one with the most below it first
    _count_bytes(comm, array.nbytes)


def bcast_vector(
    comm: Comm, vector: Buffer, agreed: Form | None = None, piece_bytes: int = MAX_MESSAGE_BYTES
) -> Buffer:
    """Collective. Overwrite the others' buffers with the server's, of the same shape and dtype; return this rank's.

    Args:
        comm: the communicator.
        vector: contiguous, of any number type; on a rank whose MPI library can write to its device it may be a tensor
            there, as bytes.
        agreed: as for `require_form`.
        piece_bytes: the longest message.

    Raises:
        TransferError: on every rank, if any rank's buffer is unfit or another; with `agreed`, on the ranks whose
            buffer has changed since.
    """
    require_form(comm, agreed, "bcast_vector", vector, written=not comm.is_server)
    with comm.timeline.span("broadcast"):
        bcast(comm, vector, piece_bytes)
    return vector


def reduce_sum(comm: Comm, sums: NDArray[np.int64], agreed: Form | None = None, piece_bytes: int = SUM_BYTES) -> None:
    """Collective. Make the server's int64 buffer the sum over all ranks' buffers; the others' are used up.

    Args:
        comm: the communicator.
        sums: int64, of the same shape on all ranks.
        agreed: as for `require_form`.
        piece_bytes: what is received, and added, at a time.

    Raises:
        TransferError: on every rank, if any rank's buffer is another.
    """
    require_form(comm, agreed, "reduce_sum", sums, "int64", written=True)
    sum_bins(comm, [sums], lambda _: [sums], piece_bytes)


def sum_bins(
    comm: Comm,
    sums: list[NDArray[np.int64]],
    grow: Callable[[int], list[NDArray[np.int64]]],
    piece_bytes: int = SUM_BYTES,
) -> None:
    """Collective. Sum, as `reduce_sum` does, as many buffers as the rank with the most of them has.

    Args:
        comm: the communicator.
        sums: this rank's buffers; more come at the end.
        grow: number of buffers -> that many, the first of which are `sums`.
        piece_bytes: what is received, and added, at a time.
    """
    parent, children = relatives(comm.rank, comm.size)
    count = np.empty(1, np.int64)
    for child in children:
        with comm.timeline.span("idle"):
            comm.receive(count, child)
        with comm.timeline.span("collect"):
            sums += grow(int(count[0]))[len(sums) :]
            for buffer in sums[: int(count[0])]:
                arrived = np.empty(min(buffer.size, max(1, piece_bytes // 8)), np.int64)
                for piece in pieces_of(buffer, piece_bytes):
                    comm.receive(arrived[: piece.size], child)
                    piece += arrived[: piece.size]
    if parent is not None:
        with comm.timeline.span("collect"):
            comm.send(np.array([len(sums)], np.int64), parent)
            for buffer in sums:
                for piece in pieces_of(buffer, piece_bytes):
                    comm.send(piece, parent)
    _count_bytes(comm, sum(buffer.nbytes for buffer in sums))


def gather_rows(
    comm: Comm,
    rows: NDArray[np.float32],
    agreed: Form | None = None,
    room: NDArray[np.float32] | None = None,
    piece_bytes: int = MAX_MESSAGE_BYTES,
) -> NDArray[np.float32]:
    """Collective. Bring the ranks' (k, B) float32 rows, k >= 0, to the server.

    Args:
        comm: the communicator.
        rows: this rank's.
        agreed: what `agree_on_buffer` returned for rows of this width; None: compare the ranks' now.
        room: on the server, a flat buffer to receive into; None, or too small: a new one.
        piece_bytes: the longest message.

    Returns:
        All rows, rank after rank, on the server; (0, B) elsewhere.

    Raises:
        TransferError: on every rank, if any rank's rows have another width or type.
    """
    if agreed is None:
        agree_on_buffer(comm, "gather_rows", rows, "float32", rows=True)
    arrived, _, _ = gather_records(comm, rows, room=room, piece_bytes=piece_bytes)
    _count_bytes(comm, rows.nbytes + arrived.nbytes)
    return arrived


def gather_counts(comm: Comm, values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Collective. Bring the ranks' (k,) int64 values to the server, rank after rank; the others get none.

    Raises:
        TransferError: on every rank, if any rank's values are of another type.
    """
    agree_on_buffer(comm, "gather_counts", values, "int64", rows=True)
    return gather_records(comm, values)[0]


def gather_records(
    comm: Comm,
    items: NDArray[Any],
    note: int = 0,
    room: NDArray[Any] | None = None,
    piece_bytes: int = MAX_MESSAGE_BYTES,
) -> tuple[NDArray[Any], list[int], list[int]]:
    """Collective. Bring the ranks' items, of one dtype and width, and a note of each rank to the server, unchecked.

    Returns:
        On the server all items, rank after rank, the ranks' numbers of them, and their notes; nothing elsewhere.
    """
    head = np.array([len(items), note], np.int64)
    if not comm.is_server:
        comm.send(head, SERVER_RANK)
        for piece in pieces_of(as_bytes(items), piece_bytes):
            comm.send(piece, SERVER_RANK)
        return items[:0], [], []
    counts, notes = [len(items)], [note]
    for rank in range(1, comm.size):
        with comm.timeline.span("idle"):
            comm.receive(head, rank)
        counts.append(int(head[0]))
        notes.append(int(head[1]))
    shape = (sum(counts), *items.shape[1:])
    size = math.prod(shape)
    arrived = np.empty(shape, items.dtype) if room is None or room.size < size else room[:size].reshape(shape)
    arrived[: len(items)] = items
    with comm.timeline.span("collect"):
        for rank, stop in list(enumerate(np.cumsum(counts)))[1:]:
            for piece in pieces_of(as_bytes(arrived[stop - counts[rank] : stop]), piece_bytes):
                comm.receive(piece, rank)
    return arrived, counts, notes


def relatives(rank: int, size: int) -> tuple[int | None, list[int]]:
    """Return a rank's parent and children in the binomial tree; the last child has the most ranks below it."""
    children: list[int] = []
    distance = 1
    while distance < size:
        if rank % (2 * distance):
            return rank - distance, children
        if rank + distance < size:
            children.append(rank + distance)
        distance *= 2
    return None, children


def _count_bytes(comm: Comm, num_bytes: int) -> None:
    if comm.size > 1:
        comm.bytes_sent += num_bytes
