"""A trainer rank's half of the round loop.

Shapes: P vector entries.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from fedmpi.core.evaluate import Evaluator
from fedmpi.core.exactsum import ExactSum
from fedmpi.core.manager import Buffer, NetworkManager
from fedmpi.core.messages import ClientUpdate, LocalWork, MessageCode, Order
from fedmpi.core.trainer import ClientTrainer
from fedmpi.core.vector import integer_state
from fedmpi.core.views import check_views
from fedmpi.core.visits import LeakCheck, Visits
from fedmpi.errors import ConfigError
from fedmpi.lifecycle import progress
from fedmpi.lifecycle.signals import StopSignals
from fedmpi.mpi.comm import Comm
from fedmpi.mpi.processes import SERVER_RANK
from fedmpi.mpi.work_queue import WorkQueue

_TOGETHER = 32
"""Clients of one step each that are trained together: what they share is then next to nothing a client."""

_AT_LEAST = 12
"""Clients of one step each that a trainer draws at a time, while there are many."""


class ClientPassiveManager(NetworkManager):
    """A trainer rank: does what the server orders."""

    def __init__(
        self,
        net: Comm,
        trainer: ClientTrainer,
        evaluator: Evaluator | None = None,
        facts: Mapping[str, object] | None = None,
        *,
        cuda_aware: bool = False,
        signals: StopSignals | None = None,
        leak_check: bool = True,
    ) -> None:
        """Over a trainer.

        Args:
            net: this rank's end of the communicator.
            trainer: trains one client after the other.
            evaluator: evaluates this rank's share of the test set; None: no evaluation in this job.
            facts: more that must be the same on all ranks.
            cuda_aware: MPI writes the model straight to the trainer's device.
            signals: of this process, to be told to the server.
            leak_check: see that nothing in the trainer's attributes reaches from one client to the next.
        """
        super().__init__(net, facts)
        self.trainer = trainer
        self.evaluator = evaluator
        self.signals = signals
        self.trainer_idx = max(0, net.rank - 1)
        size, staged = trainer.model_parameters.numel(), trainer.device.type == "cuda" and not cuda_aware
        place = trainer.device if cuda_aware else "cpu"
        self._received = torch.empty(size, dtype=torch.float32, device=place, pin_memory=staged)
        self._buffer = self._received.view(torch.uint8) if cuda_aware else self._received.numpy()
        self._work = LocalWork()
        self._visits = Visits(trainer)
        self._leak_check = LeakCheck(self._visits) if leak_check and not trainer.single_client else None

    def setup(self) -> None:
        """Collective. Compare models; tell the server the sample counts of a share of the clients."""
        progress.watch(self.trainer.model)
        self._check_same(self.trainer.model, self.trainer.device)
        num_clients = self.net.max_of(0)
        self.trainer.seed = self.net.max_of(0)
        self._share_sizes(num_clients, self.trainer, self.trainer_idx)
        self.begin(num_clients)
        if self.net.max_of(0):
            self.queue = WorkQueue(self.net)

    def begin(self, num_clients: int) -> None:
        """Make ready for the first round of a job with so many clients in all."""
        if num_clients <= self.net.num_trainers:  # each client has a rank of its own
            self._leak_check = None

    def downlink(self) -> Buffer:
        """The receive buffer."""
        return self._buffer

    def local_work(self, order: Order, vector: Buffer) -> LocalWork:
        """Act on the order, then hand over what it came to."""
        received = torch.from_numpy(vector) if isinstance(vector, np.ndarray) else self._received
        self.on_receive(SERVER_RANK, order.code, (order, received.to(self.trainer.device, non_blocking=True)))
        return self.synchronize()

    def on_receive(self, sender_rank: int, message_code: MessageCode, payload: tuple[Order, torch.Tensor]) -> None:
        """Train this rank's clients of the cohort, or evaluate its share of the test set."""
        order, vector = payload
        if message_code is MessageCode.PARAMETER_UPDATE:
            self._work = self._train(order, vector)
        elif message_code is MessageCode.EVALUATE_PARAMS:
            self._work = self._evaluate(order, vector)

    def synchronize(self) -> LocalWork:
        """What this rank contributes to the collection, given up once."""
        work, self._work = self._work, LocalWork()
        return dataclasses.replace(work, stop=self.signals.received) if self.signals else work

    def _train(self, order: Order, vector: torch.Tensor) -> LocalWork:
        exact = ExactSum(vector, order.weight_total, order.weight_max)
        work = LocalWork(exact=None if order.rows else exact)
        self.trainer.round_idx = order.round_idx
        for client_ids in self._clients_of(order):
            together: list[int] = []
            for client_id in client_ids:
                if self.trainer.takes_one_step(client_id):
                    together.append(client_id)
                else:
                    self._train_alone(order, vector, client_id, exact, work)
            for start in range(0, len(together), _TOGETHER):
                self._train_together(order, vector, together[start : start + _TOGETHER], exact, work)
        self.net.activity = f"round {order.round_idx}"
        return work

    def _train_alone(
        self, order: Order, vector: torch.Tensor, client_id: int, exact: ExactSum, work: LocalWork
    ) -> None:
        state = order.integer_state
        self.net.activity = f"client {client_id}, round {order.round_idx}"
        started = time.perf_counter()
        with self.net.timeline.span(f"client {client_id}"):
            (num_samples,) = self.trainer.num_samples(np.array([client_id])).tolist()
            trained = self._visits.train(order.round_idx, client_id, vector, state)
            bin_idx = exact.bin_of(trained) if order.rows else exact.add(trained, order.weight_of(client_id))
            if order.rows:
                work.rows.append(trained.cpu().numpy().copy())
            if len(state):
                state = integer_state(self.trainer.model)
        seconds = time.perf_counter() - started
        work.updates.append(ClientUpdate(client_id, num_samples, self.trainer.loss, seconds, bin_idx, state))
        if self._leak_check is not None:
            self._leak_check.after_visit(order, vector)

    def _train_together(
        self, order: Order, vector: torch.Tensor, client_ids: list[int], exact: ExactSum, work: LocalWork
    ) -> None:
        """The same for clients of one step each, in pieces; one that may not fit into bin 0 is trained alone."""
        self.net.activity = f"clients {', '.join(map(str, client_ids))}, round {order.round_idx}"
        started = time.perf_counter()
        with self.net.timeline.span(*(f"client {client_id}" for client_id in client_ids)):
            num_samples = self.trainer.num_samples(np.array(client_ids)).tolist()
            steps = self.trainer.single_steps(client_ids, vector)
            fit = [i for i, largest in enumerate(steps.largest) if exact.in_range(largest)]
            weights = [order.weight_of(client_id) for client_id in client_ids]
            rows = {i: np.empty(len(vector), np.float32) for i in fit} if order.rows else {}
            for i, columns, values in steps.pieces(fit):
                if order.rows:
                    rows[i][columns] = values
                else:
                    exact.add_piece(columns, values, weights[i])
        if not order.rows:
            exact.count(len(fit))
        work.rows.extend(rows.values())
        seconds = (time.perf_counter() - started) / len(client_ids)
        for i in fit:
            update = ClientUpdate(client_ids[i], num_samples[i], steps.losses[i], seconds, 0, order.integer_state)
            work.updates.append(update)
        for i in sorted(set(range(len(client_ids))) - set(fit)):
            self._train_alone(order, vector, client_ids[i], exact, work)

    def _clients_of(self, order: Order) -> Iterator[list[int]]:
        """The clients placed on this rank, at once, or those it draws from the queue, a few at a time."""
        if len(order.ranks) and order.ranks[0] < 0:
            line = order.cohort[np.argsort(-1 - order.ranks)]
            assert self.queue is not None, "setup comes first"
            takes_one_step = self.trainer.takes_one_step
            for places in self.queue.draw(
                len(line), lambda place: _AT_LEAST if takes_one_step(int(line[place])) else 1
            ):
                yield line[places.start : places.stop].tolist()
        else:
            yield order.cohort[order.ranks == self.net.rank].tolist()

    def _evaluate(self, order: Order, vector: torch.Tensor) -> LocalWork:
        if self.evaluator is None:
            raise ConfigError("the server wants an evaluation, but this trainer was given no evaluator")
        self.net.activity = f"evaluation after round {order.round_idx}"
        model, share = self.trainer.model, (self.trainer_idx, self.net.num_trainers)
        renew = self._visits.renewal(order.round_idx, vector, order.integer_state)
        with self.net.timeline.span("evaluate"):
            metrics = self.evaluator.evaluate(model, *share, renew)
        check_views(model, self.trainer.model_parameters)
        return LocalWork(metrics=metrics)
