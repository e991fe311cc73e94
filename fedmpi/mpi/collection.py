"""An order and its vector go out to the ranks; what they did comes back: records of clients, and their sum or rows.

Shapes: P vector entries, K clients in the cohort.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedmpi.errors import TransferError
from fedmpi.mpi.buffers import Form, check_buffer, described
from fedmpi.mpi.messages import (
    HEADER_SIZE,
    SERVER_RANK,
    LocalWork,
    MessageCode,
    Order,
    Receiver,
    pack_updates,
    unpack_updates,
)
from fedmpi.mpi.tree import Tree
from fedmpi.mpi.work_queue import batch_size

Buffer = TypeVar("Buffer")

BLOCK_BYTES = 2**24
"""The server holds this much of the cohort's rows at a time, however many clients take part."""


class Collection(Tree):
    """The exchanges of a round.

    Attributes:
        order: of the round at hand; None before the first.
    """

    order: Order | None = None

    # The round: every call is collective, in the same order on all ranks, and through buffers.

    def bcast_order(self, order: Order | None) -> Order:
        """Collective. The server passes an order, the others None; each gets the order.

        Raises:
            TransferError: on every rank, if the server's is no order that can be sent.
        """
        header, body = np.zeros(HEADER_SIZE, np.int64), np.empty(0, np.int64)
        mistake = None
        if self.is_server:
            try:
                header, body = _packed(order)
            except TransferError as error:
                mistake = error
        with self.timeline.span("order" if self.is_server else "idle"):
            self._spread(header)
            if not header.any():
                self.agree(mistake)
            size = Order.body_size(header)
            body = body if self.is_server else np.empty(size, np.int64)
            if size:
                self._spread(body)
        received = Order.unpack(header, body)
        if received.code is MessageCode.PARAMETER_UPDATE:
            self.order = received
        return received

    def bcast_vector(self, vector: Buffer, agreed: Form | None = None) -> Buffer:
        """Collective. The server's contiguous buffer overwrites the others', which have its shape and dtype.

        Args:
            vector: of any number type; on a rank whose MPI library can write to its device it may be a tensor there,
                as bytes.
            agreed: what `agree_on_buffer` returned for buffers like these, all ranks'; None: compare them now.

        Raises:
            TransferError: on every rank, if any rank's buffer is unfit or another; with `agreed`, on the ranks whose
                buffer has changed since.
        """
        if agreed is None:
            self.agree_on_buffer("bcast_vector", vector, written=not self.is_server)
        else:
            agreed.check(vector, written=not self.is_server)
        with self.timeline.span("broadcast"):
            self._spread(vector)
        return vector

    @property
    def num_trainers(self) -> int:
        """Ranks that train: all but the server, or the server itself when it is alone."""
        return max(1, self.size - 1)

    def begin_line(self) -> None:
        """On the server, before the order that tells trainers to draw."""
        self._count_on(0, replace=True)

    def draw(self, count: int, least: Callable[[int], int]) -> Iterator[range]:
        """One-sided. The places in a line of `count` that no rank has drawn yet, a few at a time, in ascending order.

        How few: see `work_queue.batch_size`. Every trainer draws until there are none.

        Args:
            count: places in the line.
            least: about where the line has got to -> how many places to draw at least.
        """
        place = 0
        while place < count:
            num_places = batch_size(count - place, self.num_trainers, least(place))
            place = self._count_on(num_places)
            if place < count:
                yield range(place, min(place + num_places, count))

    @abstractmethod
    def _count_on(self, operand: int, replace: bool = False) -> int:
        """One-sided. Add to the server's counter, or set it; returns what it was."""

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
        for row in rows:
            check_buffer(row, "float32", width)
        with self.timeline.span("collect"):
            room = np.empty(0, np.float32)  # one for all blocks: malloc would keep more than it gives back
            for columns in _column_blocks(width, num_rows):
                mine = [row[columns] for row in rows]
                empty = np.empty((0, columns.stop - columns.start), np.float32)
                block = self._gather_rows(np.stack(mine) if mine else empty, room)
                if self.rank == SERVER_RANK:
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
