"""FedLab's managers: the rounds of a script's own handler and trainer.

Shapes: P vector entries, K clients in the cohort.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fedmpi.core.columns import apply_rule, whole_rows
from fedmpi.core.coordinator import Coordinator
from fedmpi.core.evaluate import Evaluator, Metrics
from fedmpi.core.order import Collect, IntArray
from fedmpi.core.record import Observer
from fedmpi.core.session import Session
from fedmpi.core.vector import layout_of
from fedmpi.errors import ConfigError, FedmpiError
from fedmpi.fedlab.handler import SyncParameterServerHandler
from fedmpi.fedlab.trainer import ClientTrainer
from fedmpi.fedlab.visits import TrainerVisitor
from fedmpi.lifecycle.policies import StopPolicy
from fedmpi.lifecycle.signals import StopSignals
from fedmpi.mpi.comm import Comm


class NetworkManager(ABC):
    """One rank's side of the rounds.

    Attributes:
        net: this rank's end of the communicator.
    """

    def __init__(self, net: Comm) -> None:
        """Over `net`; nothing is sent yet."""
        self.net = net
        self._session: Session | None = None

    def run(self) -> int:
        """Collective. Train until the handler's `stop_condition`; return the exit code, the same on every rank."""
        self.setup()
        assert self._session is not None
        return self._session.run()

    @abstractmethod
    def setup(self) -> None:
        """Collective. Check that ranks hold the same model; the server learns client sizes.

        Raises:
            DisagreementError: on every rank, if models or versions differ.
            ConfigError: on every rank, if the trainers cannot serve the server's clients.
        """


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
        super().__init__(net)
        self.trainer, self.evaluator, self.facts, self.signals = trainer, evaluator, facts, signals
        self.visitor = TrainerVisitor(trainer, leak_check)
        self._cuda_aware = cuda_aware

    def setup(self) -> None:
        """Collective. See `NetworkManager.setup`."""
        self._session = Session(
            self.net, None, self.visitor, device=self.trainer.device, evaluator=self.evaluator, facts=self.facts,
            signals=self.signals, cuda_aware=self._cuda_aware,
        )  # fmt: skip
        self.begin(self._session.set_up(0, 0, self.trainer.num_samples, self.trainer.single_client))

    def begin(self, num_clients: int) -> None:
        """Make ready for a job with so many clients in all."""
        if num_clients <= self.net.num_trainers:
            self.visitor.each_has_a_rank()


class ServerManager(NetworkManager):
    """The server rank: decides what happens next. Alone in the job, it has its trainer do the local work."""

    def __init__(
        self,
        net: Comm,
        handler: SyncParameterServerHandler,
        local: ClientPassiveManager | None = None,
        *,
        eval_every: int = 0,
        schedule: Literal["auto", "static", "dynamic"] = "auto",
        observers: Sequence[Observer] = (),
        facts: Mapping[str, object] | None = None,
        policy: StopPolicy | None = None,
        block_bytes: int = 2**24,
    ) -> None:
        """Over a handler.

        Args:
            net: this rank's end of the communicator.
            handler: the server half of the algorithm.
            local: the client half, needed only when this is the job's only rank.
            eval_every: evaluate after every so many rounds and after the last; 0: never.
            schedule: static: clients are placed before the round; dynamic: idle trainers draw the next; auto: dynamic
                within one node.
            observers: told of each round.
            facts: more that must be the same on all ranks.
            policy: what stops the job between two rounds; None: nothing.
            block_bytes: the server holds this much of a cohort's rows at a time.

        Raises:
            ConfigError: a lone server has no trainer.
        """
        super().__init__(net)
        if net.size == 1 and local is None:
            raise ConfigError("a job of one rank trains on it too: give ServerManager a ClientPassiveManager, or -n 2")
        self.handler, self.local = handler, local
        self._half = _HandlerHalf(handler)
        visitor, device = (local.visitor, local.trainer.device) if local is not None else (None, None)
        self._session = Session(
            net, self._half, visitor, device=device, evaluator=local.evaluator if local is not None else None,
            facts=facts, schedule=schedule, eval_every=eval_every, observers=observers, policy=policy,
            signals=local.signals if local is not None else None, block_bytes=block_bytes,
        )  # fmt: skip

    @property
    def failure(self) -> FedmpiError | None:
        """The error that ended the run, if it diverged."""
        return self._session.loop.failure if self._session and self._session.loop else None

    def setup(self) -> None:
        """Collective. See `NetworkManager.setup`."""
        assert self._session is not None
        trainer = self.local.trainer if self.local is not None else None
        count, single = (trainer.num_samples, trainer.single_client) if trainer is not None else (None, False)
        num_clients = self._session.set_up(self.handler.num_clients, self.handler.seed, count, single)
        if self.local is not None:
            self.local.begin(num_clients)
        self.handler.client_sizes = self._session.client_sizes
        self._half.coordinator = self._session.coordinator


class _HandlerHalf:
    """A handler as the server's half of a session; see `core.server_loop.ServerHalf`."""

    reported: Mapping[str, float] = {}

    def __init__(self, handler: SyncParameterServerHandler) -> None:
        self.handler, self.model, self.layout = handler, handler.model, layout_of(handler.model)
        self.flat = handler.model_parameters
        self.coordinator: Coordinator | None = None

    @property
    def round_idx(self) -> int:
        return self.handler.round_idx

    @round_idx.setter
    def round_idx(self, round_idx: int) -> None:
        self.handler.round_idx = round_idx

    @property
    def metrics(self) -> Metrics | None:
        return self.handler.metrics

    @metrics.setter
    def metrics(self, metrics: Metrics | None) -> None:
        self.handler.metrics = metrics

    def play_round(self) -> None:
        """Collective, as the server. Train the handler's cohort, and have it step."""
        handler, layout, flat = self.handler, self.layout, self.flat
        assert self.coordinator is not None
        weights, needs = handler.begin_round(), handler.needs()
        collect = Collect.SUM if needs == "sum" else Collect.ROWS
        arrived = self.coordinator.train(
            handler.round_idx, handler.cohort, weights[None], [flat], handler.integer_state(), collect=collect
        )
        assert arrived.sums is not None
        if not arrived.updates:
            return
        mean = arrived.sums.mean(0)
        buffers = mean.b + flat[layout["b"].columns]
        if needs == "rows":
            handler.update_model(list(whole_rows(arrived.blocks, layout, len(weights))))
        elif needs == "blocks":
            flat.copy_(apply_rule(arrived.blocks, layout, flat, handler.aggregate, "aggregate"))
        else:
            handler.step(mean.vector)
        flat[layout["b"].columns].copy_(buffers)
        handler.update_integer_state([arrived.integers])

    def finished(self) -> bool:
        return self.handler.stop_condition()

    def integer_state(self) -> IntArray:
        return self.handler.integer_state()

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError("a script's handler is in no checkpoint")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError("a script's handler is in no checkpoint")
