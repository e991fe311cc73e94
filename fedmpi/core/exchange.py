"""One exchange: an order and vectors go down, clients are visited, what they came to goes up.

Shapes: V entries of a flat vector, U of its range that comes back, K clients in the cohort, B integer buffer entries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmpi.core.order import (
    HEADER_SIZE,
    ClientUpdate,
    Collect,
    IntArray,
    MessageCode,
    Order,
    pack_updates,
    unpack_updates,
)
from fedmpi.core.segments import Layout
from fedmpi.core.sums import UpdateSums
from fedmpi.errors import TransferError
from fedmpi.machine.device import host_buffer
from fedmpi.mpi.buffers import Form
from fedmpi.mpi.comm import Comm
from fedmpi.mpi.setup import agree
from fedmpi.mpi.tree import bcast, gather_records, gather_rows
from fedmpi.mpi.waiting import Pending

_LEAST = np.iinfo(np.int64).min


@dataclass(frozen=True)
class LocalWork:
    """Result of one rank for an order, ready to be collected.

    Attributes:
        updates: one for each client visited here.
        sums: this rank's part of the exact sums; None: none travels.
        rows: (U,) float32 vectors, in the order of `updates`; empty: none travels.
        row_size: U, if rows travel; else 0.
        integers: (B,) the largest value of each entry among the clients visited here; empty: none was.
        metrics: (4,) int64, see `evaluate`.
        stop: the signal that has asked this rank to stop; 0: none.
    """

    updates: list[ClientUpdate] = field(default_factory=list)
    sums: UpdateSums | None = None
    rows: list[NDArray[np.float32]] = field(default_factory=list)
    row_size: int = 0
    integers: IntArray = field(default_factory=lambda: np.empty(0, np.int64))
    metrics: IntArray = field(default_factory=lambda: np.zeros(4, np.int64))
    stop: int = 0

    @classmethod
    def empty(cls, layout: Layout, sent: Sequence[Tensor], order: Order) -> LocalWork:
        """Return the work of a rank that has visited nobody yet: room for the sums or rows that travel."""
        if order.code != MessageCode.PARAMETER_UPDATE or order.collect == Collect.NUMBERS:
            return cls()
        row_size = layout.up.stop - layout.up.start if order.collect == Collect.ROWS else 0
        return cls(sums=UpdateSums(layout, sent, order), row_size=row_size)


@dataclass(frozen=True)
class Arrived:
    """Results that have come to the server; empty on the other ranks.

    Attributes:
        updates: of the whole cohort, in ascending order of client ids.
        busy_s: seconds that each rank has worked on clients.
        sums: over all ranks; None: none travelled.
        blocks: columns of what comes back, and their (K, columns) values in ascending order of client ids; to be
            consumed to the end, since ranks wait for it.
        integers: (B,) the largest value of each entry among the cohort; empty: nobody was visited.
        metrics: (4,) int64, see `evaluate`.
        signals: (rank, signal) of ranks that were asked to stop.
    """

    updates: list[ClientUpdate] = field(default_factory=list)
    busy_s: dict[int, float] = field(default_factory=dict)
    sums: UpdateSums | None = None
    blocks: Iterator[tuple[slice, NDArray[np.float32]]] = field(default_factory=lambda: iter(()))
    integers: IntArray = field(default_factory=lambda: np.empty(0, np.int64))
    metrics: IntArray = field(default_factory=lambda: np.zeros(4, np.int64))
    signals: list[tuple[int, int]] = field(default_factory=list)


class Exchange:
    """One rank's side of every exchange.

    Attributes:
        comm: this rank's end of the communicator.
        local_work: what this rank does for an order and the (V,) vectors sent with it, without communication.
    """

    def __init__(
        self,
        comm: Comm,
        layout: Layout,
        local_work: Callable[[Order, list[Tensor]], LocalWork],
        device: torch.device | None = None,
        cuda_aware: bool = False,
    ) -> None:
        """Over a communicator.

        Args:
            comm: this rank's end.
            layout: of the flat vectors.
            local_work: see above.
            device: where a trainer wants the vectors; None: CPU.
            cuda_aware: MPI writes them straight to that device.
        """
        self.comm, self.local_work = comm, local_work
        self._vectors = SentVectors(comm, layout, device or torch.device("cpu"), cuda_aware)

    def __call__(self, order: Order | None = None, vectors: Sequence[Tensor] = ()) -> tuple[Order, Arrived]:
        """Collective. The server passes an order and the vectors that go with it, the other ranks nothing.

        Returns:
            The order, on every rank, and what has arrived, on the server.
        """
        order = bcast_order(self.comm, self._vectors.marked(order, vectors))  # A  server -> all
        sent = self._vectors.bcast(order, vectors)  # B  server -> all  (V,); segments that ranks hold are not sent
        work = self.local_work(order, sent)  #           no communication
        return order, collect(self.comm, order, work)  #           C  all -> server: sums, rows or numbers


class SentVectors:
    """The vectors that go down, and what ranks hold of them from before.

    The server keeps a copy of what it sent last, and compares bits: a flag would miss an author's write in place.
    """

    def __init__(self, comm: Comm, layout: Layout, device: torch.device, cuda_aware: bool) -> None:
        """See `Exchange`."""
        self._comm, self._layout, self._segments = comm, layout, layout.sent_down()
        self._device, self._through_host = device, device.type != "cpu" and not cuda_aware
        self._held: list[Tensor] = []  # by place: on the server what was sent last, else what was received
        self._host: list[Tensor] = []  # where MPI receives, if that is not the same memory

    def marked(self, order: Order | None, vectors: Sequence[Tensor]) -> Order | None:
        """On the server, return the order with a note of which segments come with it."""
        if not isinstance(order, Order) or not self._comm.is_server:
            return order
        flags = [
            self._changed(i, vector, segment.columns) for i, vector in enumerate(vectors) for segment in self._segments
        ]
        return dataclasses.replace(order, changed=np.array(flags, np.int64))

    def _changed(self, i: int, vector: Tensor, columns: slice) -> bool:
        if self._comm.size == 1 or i >= len(self._held):
            return True
        new, old = (one[columns].view(torch.int32) for one in (vector, self._held[i]))
        return not torch.equal(new, old)

    def bcast(self, order: Order, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Collective. Return the vectors that go with an order, on every rank."""
        if self._comm.size == 1:
            return [self._as_sent(vector).to(self._device) for vector in vectors]
        flags = order.changed.reshape(-1, len(self._segments)).tolist()
        while len(self._held) < len(flags):
            self._make_room()
        for i, row in enumerate(flags):
            for columns in _joined([s.columns for s, flag in zip(self._segments, row, strict=True) if flag]):
                self._bcast_columns(i, columns, vectors)
        return [self._as_sent(one) for one in vectors] if self._comm.is_server else self._held[: len(flags)]

    def _as_sent(self, vector: Tensor) -> Tensor:
        """Return one of the server's vectors as ranks receive it: zero in segments that only go up."""
        if self._layout.down.stop == self._layout.size:
            return vector
        sent = torch.zeros_like(vector)
        sent[self._layout.down] = vector[self._layout.down]
        return sent

    def _make_room(self) -> None:
        size, device = self._layout.down.stop, torch.device("cpu") if self._comm.is_server else self._device
        self._held.append(torch.zeros(self._layout.size, dtype=torch.float32, device=device))
        if self._through_host:
            self._host.append(host_buffer(size, torch.float32, self._device))

    def _bcast_columns(self, i: int, columns: slice, vectors: Sequence[Tensor]) -> None:
        if self._comm.is_server:
            bcast(self._comm, vectors[i][columns].numpy())
            self._held[i][columns] = vectors[i][columns]
        elif self._through_host:
            bcast(self._comm, self._host[i][columns].numpy())
            self._held[i][columns].copy_(self._host[i][columns], non_blocking=True)
        else:
            part = self._held[i][columns]
            bcast(self._comm, part.numpy() if part.device.type == "cpu" else part.view(torch.uint8))


def _joined(ranges: list[slice]) -> list[slice]:
    """Return ascending ranges with those that touch made one."""
    joined: list[slice] = []
    for part in ranges:
        if joined and joined[-1].stop == part.start:
            part = slice(joined.pop().start, part.stop)
        joined.append(part)
    return joined


def bcast_order(comm: Comm, order: Order | None) -> Order:
    """Collective. The server passes an order, the others None; return the order.

    Raises:
        TransferError: on every rank, if the server's is no order that can be sent.
    """
    header, body, mistake = np.zeros(HEADER_SIZE, np.int64), np.empty(0, np.int64), None
    if comm.is_server:
        try:
            if not isinstance(order, Order):
                raise TransferError(f"bcast_order: rank 0 passed {type(order).__name__}; wanted is an Order")
            header, body = order.header(), order.body()
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
    if received.code == MessageCode.PARAMETER_UPDATE:
        comm.pending = Pending(received.clients_per_rank, received.longest_client_ms / 1e3)
    return received


def collect(comm: Comm, order: Order, work: LocalWork) -> Arrived:
    """Collective. Bring to the server what the ranks did for `order`."""
    if order.code == MessageCode.EXIT:
        return Arrived()
    if order.code == MessageCode.EVALUATE_PARAMS:
        metrics, _, signals = gather_records(comm, work.metrics[None], note=work.stop)
        return Arrived(metrics=metrics.sum(0), signals=_given(signals))
    packed, counts, signals = gather_records(comm, pack_updates(work.updates), note=work.stop)
    parts = [unpack_updates(part) for part in np.split(packed, np.cumsum(counts)[:-1])] if counts else []
    if work.sums is not None:
        work.sums.sum_over_ranks(comm)
    integers = np.empty(0, np.int64)
    if len(order.integers) and order.collect != Collect.NUMBERS:
        integers = comm.largest(work.integers if len(work.integers) else np.full(len(order.integers), _LEAST))
    arrived = [update for part in parts for update in part]
    ids = np.array([update.client_id for update in arrived], np.int64)
    rows = work.row_size if len(order.cohort) else 0
    blocks = _blocks(comm, work, order, np.argsort(ids)) if rows else iter(())
    if not comm.is_server:
        for _ in blocks:  # send them
            pass
    busy_s = {rank: sum(update.seconds for update in part) for rank, part in enumerate(parts)}
    updates = sorted(arrived, key=lambda update: update.client_id)
    return Arrived(updates, busy_s, work.sums, blocks, integers, signals=_given(signals))


def _given(signals: list[int]) -> list[tuple[int, int]]:
    return [(rank, signal) for rank, signal in enumerate(signals) if signal]


def _blocks(
    comm: Comm, work: LocalWork, order: Order, ascending: IntArray
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Collective. Yield one block of columns of all ranks' rows after the other, on the server."""
    step = max(1, order.block_bytes // (4 * len(order.cohort)))
    room = np.empty(0, np.float32)  # one for all blocks: malloc would keep more than it gives back
    for start in range(0, work.row_size, step):
        columns = slice(start, min(start + step, work.row_size))
        part = np.empty((len(work.rows), columns.stop - start), np.float32)
        for i, row in enumerate(work.rows):
            part[i] = row[columns]
        block = gather_rows(comm, part, Form("float32", part.shape), room)
        if comm.is_server:
            room = room if room.size else block.reshape(-1)
            yield columns, block[ascending]
