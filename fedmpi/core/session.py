"""One rank's part in a run of rounds: the set-up that all ranks share, then the server's loop or a trainer's.

Shapes: N clients.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedmpi.core.coordinator import Coordinator, Grouping
from fedmpi.core.evaluate import Evaluator
from fedmpi.core.exchange import Exchange, LocalWork
from fedmpi.core.order import IntArray, MessageCode, Order
from fedmpi.core.record import Observer
from fedmpi.core.segments import Layout
from fedmpi.core.server_loop import ServerHalf, ServerLoop
from fedmpi.core.timings import RoundTimings
from fedmpi.core.vector import model_facts
from fedmpi.core.worker import Visitor, Worker
from fedmpi.errors import ConfigError
from fedmpi.lifecycle import progress
from fedmpi.lifecycle.policies import StopPolicy
from fedmpi.lifecycle.signals import StopSignals
from fedmpi.machine.device import capability
from fedmpi.mpi.comm import Comm
from fedmpi.mpi.setup import describe, on_every_rank, require_same
from fedmpi.mpi.tree import gather_counts
from fedmpi.mpi.work_queue import WorkQueue

logger = logging.getLogger(__name__)


class Session:
    """The rounds of a job on this rank. A rank has the server's half, a trainer's, or, alone, both.

    Attributes:
        comm: this rank's end of the communicator.
        client_sizes: (N,) sample counts, on the server, after `set_up`.
    """

    def __init__(
        self,
        comm: Comm,
        half: ServerHalf | None,
        visitor: Visitor | None,
        *,
        device: torch.device | None = None,
        evaluator: Evaluator | None = None,
        facts: Mapping[str, object] | None = None,
        schedule: Literal["auto", "static", "dynamic"] = "auto",
        eval_every: int = 0,
        observers: Sequence[Observer] = (),
        policy: StopPolicy | None = None,
        signals: StopSignals | None = None,
        cuda_aware: bool = False,
        grouping: Grouping | None = None,
        block_bytes: int = 2**24,
    ) -> None:
        """Over this rank's halves.

        Args:
            comm: this rank's end of the communicator.
            half: the server's half; None on a trainer.
            visitor: visits clients; None on a server that is not alone.
            device: of the visitor; None: CPU.
            evaluator: evaluates this rank's share of the test set; None: no evaluation in this job.
            facts: more that must be the same on all ranks.
            schedule: static: clients are placed before the round; dynamic: idle trainers draw the next; auto: dynamic
                within one node.
            eval_every: evaluate after every so many rounds and after the last; 0: never.
            observers: told of each round.
            policy: stops the job, and says when to write a checkpoint, between two rounds; None: never.
            signals: of this process, to be told to the server.
            cuda_aware: MPI writes the model straight to the device.
            grouping: of clients of one step; None: each is trained by itself.
            block_bytes: the server holds this much of a cohort's rows at a time.
        """
        self.comm, self._half, self._visitor, self._device = comm, half, visitor, device
        self._facts, self._schedule, self._eval_every = facts or {}, schedule, eval_every
        self._observers, self._policy, self._grouping = observers, policy or StopPolicy(), grouping
        self._timings, self._block_bytes = RoundTimings(comm), block_bytes
        self._worker = Worker(comm, visitor, evaluator, signals) if visitor is not None else None
        part = half or visitor
        assert part is not None, "a rank has a half"
        self._layout: Layout = part.layout
        work = self._server_work if half is not None else self._trainer_work
        self._exchange = Exchange(comm, self._layout, work, device, cuda_aware)
        self._loop: ServerLoop | None = None
        self.coordinator: Coordinator | None = None
        self.client_sizes = np.empty(0, np.int64)

    def set_up(self, num_clients: int, seed: int, count: Callable[[IntArray], IntArray] | None, single: bool) -> int:
        """Collective. Check that ranks hold the same model; the server learns the sample count of every client.

        Args:
            num_clients: N, on the server; 0 elsewhere.
            seed: the run's, on the server; 0 elsewhere.
            count: client ids -> their sample counts, on a trainer.
            single: True if this trainer has one client of its own, and can train no other.

        Returns:
            N.

        Raises:
            DisagreementError: on every rank, if models or versions differ.
            ConfigError: on every rank, if the trainers cannot serve the server's clients.
        """
        comm, parts = self.comm, [part for part in (self._half, self._visitor) if part is not None]
        for part in parts:
            progress.watch(part.model)
        segments = str([(s.name, s.size, s.direction) for s in self._layout.segments])
        facts = {"torch version": str(torch.__version__), **model_facts(parts[0].model), "segments": segments}
        require_same(comm, {**facts, **self._facts})
        self._compare_devices()
        num_clients, seed = comm.max_of(num_clients), comm.max_of(seed)
        if self._visitor is not None:
            self._visitor.seed = seed
        self.client_sizes = self._share_sizes(num_clients, count, single)
        draws = self._schedule == "dynamic" or (self._schedule == "auto" and comm.one_node and comm.num_trainers > 1)
        queue = WorkQueue(comm) if comm.max_of(int(draws and comm.is_server)) else None
        if self._worker is not None:
            self._worker.queue = queue
        if self._half is not None:
            self.coordinator = Coordinator(
                self._exchange, self._layout, self.client_sizes, queue, self._policy, self._timings, self._grouping,
                self._block_bytes,
            )  # fmt: skip
            self._loop = ServerLoop(
                comm, self._half, self.coordinator, self._timings, self._policy, self._eval_every, self._observers
            )
        return num_clients

    @property
    def loop(self) -> ServerLoop | None:
        """The server's loop, after `set_up`; None on a trainer."""
        return self._loop

    def run(self) -> int:
        """Collective, after `set_up`. Train to the end; return the exit code, the same on every rank."""
        if self._loop is not None:
            return self.comm.leave(self._loop.run())
        while True:
            order, _ = self._exchange()
            if order.code == MessageCode.EXIT:
                return self.comm.leave(order.exit_code)

    def _trainer_work(self, order: Order, sent: list[Tensor]) -> LocalWork:
        assert self._worker is not None
        return self._worker.local_work(order, sent)

    def _server_work(self, order: Order, sent: list[Tensor]) -> LocalWork:
        """Return room for what will arrive; when alone, the trainer's work."""
        self._timings.sent()
        if self._worker is not None:
            return self._worker.local_work(order, sent)
        return LocalWork.empty(self._layout, sent, order)

    def _compare_devices(self) -> None:
        device = self._device or torch.device("cpu")
        trains = self._visitor is not None
        told = on_every_rank(self.comm, (capability(device if trains else None), trains, device.type == "cpu"))
        # the server's CPU made the initial weights; beside trainers on GPUs there is nothing to compare it with
        of_server = all(on_cpu for _, _, on_cpu in told)
        models = [model if trained or of_server else None for model, trained, _ in told]
        ranks = {value: [rank for rank, one in enumerate(models) if one == value] for value in models if value}
        if len(ranks) > 1 and self.comm.is_server:
            logger.warning(
                "%s: the bits depend on which rank trains a client, and on which makes the initial weights (rank 0)",
                describe("CPU or GPU model", ranks),
            )

    def _share_sizes(self, num_clients: int, count: Callable[[IntArray], IntArray] | None, single: bool) -> IntArray:
        """Collective. (N,) sample counts on the server: each trainer counts every num_trainers-th client."""
        step = self.comm.num_trainers
        if self.comm.max_of(int(single)) and num_clients != step:
            error = ConfigError(
                f"each trainer rank holds one client of its own, so {num_clients} clients want {num_clients} trainer"
                f" ranks (mpirun -n {num_clients + 1}), got {step}"
            )
            error.everywhere = True
            raise error
        none = np.empty(0, np.int64)
        ids = none if count is None else np.arange(max(0, self.comm.rank - 1), num_clients, step)
        counts = none if count is None else count(ids)
        pairs = gather_counts(self.comm, np.stack([ids, counts], 1).reshape(-1))
        sizes = np.zeros(num_clients, np.int64)
        sizes[pairs[0::2]] = pairs[1::2]
        return sizes
