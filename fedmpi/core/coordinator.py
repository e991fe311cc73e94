"""The server's side of the exchanges of a round: who trains where, what has arrived, and what it cost.

Shapes: V entries of a flat vector, K clients in the cohort, N clients, R rows of weights, B integer buffer entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from fedmpi.core.evaluate import Metrics, metrics_of
from fedmpi.core.exchange import Arrived, Exchange
from fedmpi.core.order import ClientUpdate, Collect, IntArray, MessageCode, Order
from fedmpi.core.schedule import CostModel, is_pinned, place, queue
from fedmpi.core.segments import Layout
from fedmpi.core.timings import RoundTimings
from fedmpi.errors import DivergedError
from fedmpi.lifecycle.policies import StopPolicy
from fedmpi.mpi.work_queue import WorkQueue

Grouping = Callable[[IntArray, IntArray], list[IntArray]]
"""(client ids, ascending; their sample counts) -> places of those that take their one step together, by group."""


class Coordinator:
    """Sends orders and receives what they came to.

    Attributes:
        client_sizes: (N,) sample counts.
        updates: of all clients that trained in the round at hand.
        bytes_down: what the round would send to clients in a real federation.
        bytes_up: what clients would send back.
    """

    def __init__(
        self,
        exchange: Exchange,
        layout: Layout,
        client_sizes: IntArray,
        work_queue: WorkQueue | None,
        policy: StopPolicy,
        timings: RoundTimings,
        grouping: Grouping | None = None,
        block_bytes: int = 2**24,
    ) -> None:
        """Over the exchanges of a job.

        Args:
            exchange: this rank's side of them.
            layout: of the flat vectors.
            client_sizes: (N,) sample counts.
            work_queue: from which idle trainers draw; None: units are placed beforehand.
            policy: hears of signals and of the longest visit.
            timings: hears of the parts of a round.
            grouping: of clients of one step; None: each client is trained by itself.
            block_bytes: the server takes so much of a cohort's rows at a time.
        """
        self._exchange, self._layout, self._queue = exchange, layout, work_queue
        self._policy, self._timings, self._grouping = policy, timings, grouping
        self.client_sizes, self._block_bytes = client_sizes, block_bytes
        self.costs = CostModel()
        self.updates: list[ClientUpdate] = []
        self.bytes_down = self.bytes_up = 0
        self._exchange_idx = 0
        self._sample_s = 0.0  # the longest that a sample took in the last exchange

    def begin_round(self) -> None:
        """Forget the round before."""
        self.updates, self.bytes_down, self.bytes_up, self._exchange_idx = [], 0, 0, 0

    @property
    def exchange_idx(self) -> int:
        """The next exchange's place in the round."""
        return self._exchange_idx

    def train(
        self,
        round_idx: int,
        cohort: IntArray,
        weights: IntArray,
        vectors: Sequence[Tensor],
        integers: IntArray,
        *,
        visit_idx: int = 0,
        collect: Collect = Collect.SUM,
        buckets: IntArray | None = None,
        num_buckets: int = 1,
        send_idx: IntArray | None = None,
    ) -> Arrived:
        """Collective, as the server. Have the clients of a cohort visited.

        Args:
            round_idx: the round.
            cohort: (K,) client ids, ascending.
            weights: (R, K) see `exactsum.integer_weights`.
            vectors: (V,) float32 each, what goes down.
            integers: (B,) the model's integer buffers.
            visit_idx: which method of the algorithm visits.
            collect: the form in which results come back.
            buckets: (K,) in [0, num_buckets); None: one bucket.
            num_buckets: exact sums per segment.
            send_idx: (K,) which of `vectors` a client gets; None: the first.

        Raises:
            DivergedError: names the clients that sent back something not finite.
        """
        self._timings.start()
        none = np.empty(0, np.int64)
        buckets, send_idx = none if buckets is None else buckets, none if send_idx is None else send_idx
        groups = self._units(cohort, buckets, send_idx, collect)
        unit_weights = np.zeros((len(weights), int(groups.max(initial=-1)) + 1), np.int64)
        for row, sums in zip(weights, unit_weights, strict=True):
            np.add.at(sums, groups, row)
        order = Order(
            MessageCode.PARAMETER_UPDATE,
            round_idx,
            self._exchange_idx,
            visit_idx,
            collect,
            num_buckets,
            longest_client_ms=self._longest_client_ms(cohort),
            block_bytes=self._block_bytes,
            cohort=cohort,
            ranks=self._places(cohort, groups),
            groups=groups,
            weights=weights.reshape(-1),
            unit_max=unit_weights.max(1, initial=0),
            buckets=buckets,
            send_idx=send_idx,
            integers=integers,
        )
        self._exchange_idx += 1
        self._exchange.comm.activity = f"round {round_idx}"
        _, arrived = self._exchange(order, vectors)
        self._note(order, arrived)
        bad = [update.client_id for update in arrived.updates if not update.finite]
        if bad:
            for _ in arrived.blocks:  # the ranks are sending them
                pass
            raise DivergedError(_not_finite(bad, round_idx))
        return arrived

    def evaluate(self, round_idx: int, vector: Tensor, integers: IntArray) -> Metrics:
        """Collective, as the server. Evaluate a model, (V,) float32, on the test set."""
        self._timings.start()
        order = Order(MessageCode.EVALUATE_PARAMS, round_idx, integers=integers)
        _, arrived = self._exchange(order, [vector])
        self._hear(arrived)
        return metrics_of(arrived.metrics)

    def exit(self, exit_code: int) -> None:
        """Collective, as the server. Tell all ranks that the job ends."""
        self._exchange(Order(MessageCode.EXIT, exit_code=exit_code))

    def _hear(self, arrived: Arrived) -> None:
        for rank, signal in arrived.signals:
            self._policy.on_signal(signal, rank)

    def _note(self, order: Order, arrived: Arrived) -> None:
        self._hear(arrived)
        for rank, seconds in arrived.busy_s.items():
            self._timings.busy(rank, seconds)
        self._timings.collected()
        if arrived.updates:
            self._sample_s = max(update.seconds / max(1, update.num_samples) for update in arrived.updates)
        down = sum(segment.size for segment in self._layout.sent_down())
        self.bytes_down += 4 * len(order.cohort) * down
        if order.collect == Collect.NUMBERS:
            self.bytes_up += 8 * sum(len(update.reported) for update in arrived.updates)
            return
        self.bytes_up += 4 * len(order.cohort) * (self._layout.up.stop - self._layout.up.start)
        self.updates += arrived.updates
        if arrived.updates:
            trained = [(update.num_samples, update.seconds) for update in arrived.updates]
            self.costs.observe(*(np.array(column) for column in zip(*trained, strict=True)))

    def _longest_client_ms(self, cohort: IntArray) -> int:
        longest_s = self._sample_s * float(self.client_sizes[cohort].max(initial=0))
        self._policy.longest_client_s = max(self._policy.longest_client_s, longest_s)
        return math.ceil(1e3 * self._policy.longest_client_s)

    def _units(self, cohort: IntArray, buckets: IntArray, send_idx: IntArray, collect: Collect) -> IntArray:
        """(K,) the number of the unit that each client is trained in."""
        units = np.arange(len(cohort))
        if self._grouping is None or collect != Collect.SUM:
            return units
        kinds = np.stack([part if len(part) else np.zeros_like(cohort) for part in (buckets, send_idx)])
        for kind in np.unique(kinds, axis=1).T:
            inside = np.flatnonzero((kinds == kind[:, None]).all(0))
            for places in self._grouping(cohort[inside], self.client_sizes[cohort[inside]]):
                units[inside[places]] = inside[places[0]]
        return np.unique(units, return_inverse=True)[1]

    def _places(self, cohort: IntArray, groups: IntArray) -> IntArray:
        """(K,) the rank of each client, or -1 - its unit's place in the queue."""
        comm, num_clients = self._exchange.comm, len(self.client_sizes)
        costs = np.zeros(int(groups.max(initial=-1)) + 1)
        np.add.at(costs, groups, self.costs.costs(self.client_sizes[cohort]))
        alone = len(costs) == len(cohort)
        if self._queue is not None and not (alone and is_pinned(len(cohort), comm.num_trainers, num_clients)):
            self._queue.begin()
            return (-1 - queue(costs))[groups]
        ids, total = (cohort, num_clients) if alone else (np.arange(len(costs)), -1)
        return (place(ids, costs, comm.num_trainers, total) + (comm.size > 1))[groups]


def _not_finite(client_ids: list[int], round_idx: int) -> str:
    if len(client_ids) == 1:
        subject = f"client {client_ids[0]}'s model is"
    else:
        subject = f"the models of clients {', '.join(map(str, client_ids))} are"
    return f"{subject} not finite after training in round {round_idx}: lower --client-lr{last_good(round_idx)}"


def last_good(round_idx: int) -> str:
    """Return the end of a sentence on a round that failed."""
    return f"; the last good round is {round_idx - 1}" if round_idx else "; no round was good"
