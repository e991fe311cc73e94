"""An order and its vector go out to the ranks; what they did comes back: records of clients, and their sum or rows.

Shapes: P vector entries, K clients in the cohort.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedmpi.core.messages import (
    HEADER_SIZE,
    LocalWork,
    MessageCode,
    Order,
    Receiver,
    pack_updates,
    unpack_updates,
)
from fedmpi.errors import TransferError
from fedmpi.mpi.buffers import Form, check_buffer, described
from fedmpi.mpi.comm import Comm
from fedmpi.mpi.setup import agree
from fedmpi.mpi.tree import bcast, gather_records, gather_rows, sum_bins
from fedmpi.mpi.waiting import Pending

BLOCK_BYTES = 2**24
"""The server holds this much of the cohort's rows at a time, however many clients take part."""


def bcast_order(comm: Comm, order: Order | None) -> Order:
    """Collective. The server passes an order, the others None; each gets the order.

    Raises:
        TransferError: on every rank, if the server's is no order that can be sent.
    """
    header, body = np.zeros(HEADER_SIZE, np.int64), np.empty(0, np.int64)
    mistake = None
    if comm.is_server:
        try:
            header, body = _packed(order)
        except TransferError as error:
            mistake = error
    with comm.timeline.span("order" if comm.is_server else "idle"):
        bcast(comm, header)
        if not header.any():
            agree(comm, mistake)
        size = Order.body_size(header)
        body = body if comm.is_server else np.empty(size, np.int64)
        if size:
            bcast(comm, body)
    received = Order.unpack(header, body)
    if received.code is MessageCode.PARAMETER_UPDATE:
        comm.pending = Pending(received.clients_a_rank, received.longest_client_ms / 1e3)
    return received


def collect(comm: Comm, order: Order, work: LocalWork, receiver: Receiver) -> None:
    """Collective. Bring to the server what the ranks did for `order`.

    EVALUATE_PARAMS: the server's `work.metrics` becomes the sum over ranks.
    PARAMETER_UPDATE: the server's `receiver` gets each rank's client updates; then the server's `work.exact` becomes
    the sum over ranks, or, with `order.rows`, the receiver gets one block of columns after the other.
    """
    if order.code is MessageCode.EVALUATE_PARAMS:
        rows, _, signals = gather_records(comm, work.metrics[None], work.stop)
        if comm.is_server:
            work.metrics[:] = rows.sum(0)
        _tell_signals(signals, receiver)
        return
    num_integers = len(order.integer_state)
    code = MessageCode.PARAMETER_UPDATE if order.rows else MessageCode.GRADIENT_UPDATE
    arrived, counts, signals = gather_records(comm, pack_updates(work.updates, num_integers), work.stop)
    for rank, records in enumerate(np.split(arrived, np.cumsum(counts)[:-1]) if counts else []):
        receiver.on_receive(rank, code, unpack_updates(records))
    _tell_signals(signals, receiver)
    if order.rows:
        _collect_rows(comm, len(order.cohort), work.rows, receiver)
    elif work.exact:
        sum_bins(comm, work.exact.buffers(work.exact.num_bins), work.exact.buffers)


def _tell_signals(signals: list[int], receiver: Receiver) -> None:
    for rank, signal in enumerate(signals):
        if signal:
            receiver.on_receive(rank, MessageCode.EXIT, signal)


def _collect_rows(comm: Comm, num_rows: int, rows: list[NDArray[np.float32]], receiver: Receiver) -> None:
    with comm.timeline.span("idle"):  # until the slowest rank is here
        width = comm.max_of(len(rows[0]) if rows else 0)
    for row in rows:
        check_buffer(row, "float32", width)
    with comm.timeline.span("collect"):
        room = np.empty(0, np.float32)  # one for all blocks: malloc would keep more than it gives back
        for columns in _column_blocks(width, num_rows):
            size = columns.stop - columns.start
            part = np.array([row[columns] for row in rows], np.float32).reshape(-1, size)
            block = gather_rows(comm, part, Form("float32", (len(part), size)), room)
            if comm.is_server:
                receiver.on_block(columns, block)
                room = room if room.size else block.reshape(-1)


def _column_blocks(num_columns: int, num_rows: int) -> Iterator[slice]:
    """Slices that cover the columns, each at most `BLOCK_BYTES` of float32 in `num_rows` rows."""
    step = max(1, BLOCK_BYTES // (4 * max(1, num_rows)))
    return (slice(start, min(start + step, num_columns)) for start in range(0, num_columns, step))


def _packed(order: object) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Header and body of an order, if that is what it is."""
    if not isinstance(order, Order):
        raise TransferError(f"bcast_order: rank 0 passed {type(order).__name__}; wanted is an Order")
    for name in ("cohort", "ranks", "integer_state"):
        part = getattr(order, name)
        if not isinstance(part, np.ndarray) or part.ndim != 1 or not np.can_cast(part.dtype, np.int64):
            raise TransferError(f"bcast_order: rank 0 passed {name} as {described(part)}; wanted are int64 in one row")
    if len(order.cohort) != len(order.ranks):
        raise TransferError(
            f"bcast_order: rank 0 passed {len(order.ranks)} ranks for {len(order.cohort)} clients; wanted is one each"
        )
    return order.header(), order.body().astype(np.int64, copy=False)
