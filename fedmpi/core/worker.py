"""The local work of a trainer: it visits the clients that an order gives it, or evaluates its share of the test set.

Shapes: V entries of a flat vector, T trainable entries, B integer buffer entries.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedmpi.core.evaluate import Evaluator
from fedmpi.core.exchange import LocalWork
from fedmpi.core.isolation import Isolation
from fedmpi.core.order import ClientUpdate, Collect, MessageCode, Order
from fedmpi.core.seeding import Stream, derive_seed
from fedmpi.core.segments import Layout
from fedmpi.core.vector import integer_state
from fedmpi.errors import ConfigError
from fedmpi.lifecycle.signals import StopSignals
from fedmpi.mpi.comm import Comm
from fedmpi.mpi.work_queue import WorkQueue


@dataclass(frozen=True)
class Visit:
    """Result of a visit to a client, beside the vector that it left behind.

    Attributes:
        num_samples: samples of the client.
        loss: mean training loss; NaN: none.
        reported: numbers for the server, by name.
        deferred: the client's only step is still to be taken, together with other clients'.
    """

    num_samples: int
    loss: float
    reported: Mapping[str, float] = field(default_factory=dict)
    deferred: bool = False


class Visitor(Protocol):
    """A trainer's way to visit one client after the other, on one model object.

    Attributes:
        model: the flattened module.
        layout: of the flat vectors.
        back: (V,) float32, what a visit leaves behind; the module's own memory.
        isolation: of the model.
        seed: the run's.
    """

    model: nn.Module
    layout: Layout
    back: Tensor
    isolation: Isolation
    seed: int

    def visit(self, order: Order, client_id: int, sent: Tensor, may_defer: bool) -> Visit:
        """Visit a client that was sent `sent` (V,); what it sends back is then in `back`, unless it is deferred."""

    def step_together(self, order: Order, client_ids: Sequence[int], sent: Tensor) -> tuple[Tensor, list[float], bool]:
        """Take the deferred steps.

        Returns:
            (T,) float64, the sum of weighted updates; each client's loss; False if one of them is not finite.
        """

    def end_order(self, order: Order, sent: Sequence[Tensor]) -> None:
        """Called when this rank's visits of an order are over."""


class Worker:
    """A trainer rank's half of an exchange."""

    def __init__(
        self,
        comm: Comm,
        visitor: Visitor,
        evaluator: Evaluator | None = None,
        signals: StopSignals | None = None,
    ) -> None:
        """Over a visitor.

        Args:
            comm: this rank's end of the communicator.
            visitor: visits one client after the other.
            evaluator: evaluates this rank's share of the test set; None: no evaluation in this job.
            signals: of this process, to be told to the server.
        """
        self._comm, self._visitor, self._evaluator, self._signals = comm, visitor, evaluator, signals
        self.queue: WorkQueue | None = None

    def local_work(self, order: Order, sent: list[Tensor]) -> LocalWork:
        """Act on an order; return what it came to."""
        if order.code == MessageCode.PARAMETER_UPDATE:
            work = self._visit_all(order, sent)
        elif order.code == MessageCode.EVALUATE_PARAMS:
            work = self._evaluate(order, sent[0])
        else:
            work = LocalWork()
        return dataclasses.replace(work, stop=self._signals.received) if self._signals else work

    def _visit_all(self, order: Order, sent: list[Tensor]) -> LocalWork:
        work = LocalWork.empty(self._visitor.layout, sent, order)
        for client_ids in self._units(order):
            work = self._visit_unit(order, sent, client_ids, work)
        self._comm.activity = f"round {order.round_idx}"
        self._visitor.end_order(order, sent)
        return work

    def _visit_unit(self, order: Order, sent: list[Tensor], client_ids: list[int], work: LocalWork) -> LocalWork:
        """Visit the clients of a unit; those whose only step was put off take it together."""
        deferred = []
        for client_id in client_ids:
            started = time.perf_counter()
            visit = self._visit(order, sent, client_id, may_defer=order.collect != Collect.ROWS)
            seconds = time.perf_counter() - started
            if visit.deferred and order.collect == Collect.SUM:
                deferred.append((client_id, visit, seconds))
            else:
                work = self._hand_in(order, client_id, visit, started, work)
        if not deferred:
            return work
        ids = [client_id for client_id, _, _ in deferred]
        started = time.perf_counter()
        self._comm.activity = f"clients {', '.join(map(str, ids))}, round {order.round_idx}"
        with self._comm.timeline.span(*(f"client {client_id}" for client_id in ids)):
            update, losses, finite = self._visitor.step_together(
                order, ids, sent[order.send_of(order.place_of(ids[0]))]
            )
            assert work.sums is not None
            together = finite and work.sums.add_group(ids, update)
        seconds = (time.perf_counter() - started) / len(ids)
        for (client_id, visit, before), loss in zip(deferred, losses, strict=True):
            if together:
                update_s = before + seconds
                work.updates.append(ClientUpdate(client_id, visit.num_samples, loss, update_s, 1, visit.reported))
            else:  # one of them is not finite, or too large for the sum: each by itself, so that it is named
                started = time.perf_counter()
                alone = self._visit(order, sent, client_id, may_defer=False)
                work = self._hand_in(order, client_id, alone, started, work)
        return work

    def _visit(self, order: Order, sent: list[Tensor], client_id: int, may_defer: bool) -> Visit:
        self._comm.activity = f"client {client_id}, round {order.round_idx}"
        with self._comm.timeline.span(f"client {client_id}"):
            return self._visitor.visit(order, client_id, sent[order.send_of(order.place_of(client_id))], may_defer)

    def _hand_in(self, order: Order, client_id: int, visit: Visit, started: float, work: LocalWork) -> LocalWork:
        """Return this rank's work with what a visit left behind."""
        back, layout = self._visitor.back, self._visitor.layout
        finite = True
        if work.sums is not None:
            finite = work.sums.add(client_id, back)
        if work.row_size:
            names = (segment for segment in layout.sent_up() if segment.name != "b")
            finite &= all(bool(torch.isfinite(back[segment.columns]).all()) for segment in names)
            work.rows.append(back[layout.up].cpu().numpy().copy())
        seconds = time.perf_counter() - started
        update = ClientUpdate(client_id, visit.num_samples, visit.loss, seconds, int(finite), visit.reported)
        work.updates.append(update)
        if not len(order.integers):
            return work
        integers = integer_state(self._visitor.model)
        return dataclasses.replace(
            work, integers=np.maximum(work.integers, integers) if len(work.integers) else integers
        )

    def _units(self, order: Order) -> Iterator[list[int]]:
        """Yield the units placed on this rank, or those that it draws from the queue, as client ids."""
        if not len(order.cohort):
            return
        ascending = np.argsort(order.groups, kind="stable")
        firsts = np.flatnonzero(np.diff(order.groups[ascending], prepend=-1))
        units = np.split(order.cohort[ascending], firsts[1:])
        places = order.ranks[ascending[firsts]]
        if places[0] >= 0:
            yield from (unit.tolist() for unit, rank in zip(units, places, strict=True) if rank == self._comm.rank)
            return
        assert self.queue is not None
        line = np.argsort(-1 - places)
        for drawn in self.queue.draw(len(line), lambda _: 1):
            yield from (units[line[place]].tolist() for place in drawn)

    def _evaluate(self, order: Order, sent: Tensor) -> LocalWork:
        if self._evaluator is None:
            raise ConfigError("the server wants an evaluation, but this trainer was given no evaluator")
        self._comm.activity = f"evaluation after round {order.round_idx}"
        visitor, share = self._visitor, max(0, self._comm.rank - 1)

        def seed_of(chunk: int) -> int:
            return derive_seed(visitor.seed, Stream.EVALUATION, order.round_idx, chunk)

        vector = sent[visitor.layout.vector]
        renew = visitor.isolation.renewal(vector, order.integers, seed_of)
        with self._comm.timeline.span("evaluate"):
            metrics = self._evaluator.evaluate(visitor.model, share, self._comm.num_trainers, renew)
        visitor.isolation.check()
        return LocalWork(metrics=metrics)
