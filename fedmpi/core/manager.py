"""The round loop, and its two halves: the server's manager and the trainers'.

Shapes: P vector entries, K cohort, N clients.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fedmpi.core.clock import RoundClock
from fedmpi.core.comm import SERVER_RANK, PackageProcessor, describe
from fedmpi.core.device import capability
from fedmpi.core.errors import EXIT_DONE, ConfigError, DivergedError, FedmpiError
from fedmpi.core.evaluate import Evaluator, Metrics, metrics_of
from fedmpi.core.exactsum import ExactSum
from fedmpi.core.handler import SyncParameterServerHandler
from fedmpi.core.messages import ClientUpdate, LocalWork, MessageCode, Order, RoundRecord
from fedmpi.core.schedule import place
from fedmpi.core.trainer import ClientTrainer
from fedmpi.core.vector import integer_state, load_integer_state, model_facts

logger = logging.getLogger(__name__)


class Observer(Protocol):
    """Is told of each finished round, on the server rank."""

    def on_round(self, record: RoundRecord) -> None:
        """A round is done."""

    def on_end(self, handler: SyncParameterServerHandler) -> None:
        """Training is over and did not fail; no rank has left yet."""


class NetworkManager(ABC):
    """One rank's side of the round loop.

    Attributes:
        net: this rank's end of the communicator.
    """

    def __init__(self, net: PackageProcessor, facts: Mapping[str, object] | None = None) -> None:
        """Over `net`; nothing is sent yet. `facts`: more that must be the same on all ranks."""
        self.net = net
        self._facts = facts or {}

    def run(self) -> int:
        """Collective. Train until the server says EXIT; returns the exit code, the same on every rank."""
        self.setup()
        while True:
            order = self.net.bcast_order(self.next_order())  # A  server -> all
            if order.code is MessageCode.EXIT:
                return order.exit_code
            vector = self.net.bcast_vector(self.downlink())  # B  server -> all   (P,)
            work = self.local_work(order, vector)  #              no communication
            self.net.collect(order, work, self)  #             C  all -> server: exact sum (P,) or rows (K, P)
            self.finish_round(order, work)  #                     no communication

    @abstractmethod
    def setup(self) -> None:
        """Collective. Before the first round: check that ranks hold the same model; the server learns client sizes.

        Raises:
            DisagreementError: on every rank, if models or versions differ.
            ConfigError: on every rank, if the trainers cannot serve the server's clients.
        """

    @abstractmethod
    def on_receive(self, sender_rank: int, message_code: MessageCode, payload: Any) -> None:
        """A package has come.

        On a trainer: an order of the server, with (order, (P,) tensor).
        On the server: the `ClientUpdate`s of one rank, GRADIENT_UPDATE if a sum follows, PARAMETER_UPDATE if rows do.
        """

    def next_order(self) -> Order | None:
        """The order to broadcast; None on a rank that receives it."""
        return None

    @abstractmethod
    def downlink(self) -> NDArray[np.float32]:
        """The (P,) buffer to send the model from (server) or to receive it into (trainer)."""

    @abstractmethod
    def local_work(self, order: Order, vector: NDArray[np.float32]) -> LocalWork:
        """What this rank does for the order, without communication."""

    def on_block(self, columns: slice, rows: NDArray[np.float32]) -> None:
        """A block of columns of all rows has come, rank after rank; on the server only."""

    def finish_round(self, order: Order, work: LocalWork) -> None:
        """What follows from what has arrived; nothing on a trainer."""

    def _check_same(self, model: torch.nn.Module, device: torch.device | None) -> None:
        """`device`: where this rank trains, None if it does not."""
        self.net.require_same({"torch version": str(torch.__version__), **model_facts(model), **self._facts})
        held = self.net.on_every_rank(capability(device) if device else None)
        ranks = {value: [rank for rank, each in enumerate(held) if each == value] for value in held if value}
        if len(ranks) > 1 and self.net.is_server:
            logger.warning("%s: the bits depend on which rank trains a client", describe("CPU or GPU model", ranks))

    def _share_sizes(self, num_clients: int, trainer: ClientTrainer | None, trainer_idx: int) -> NDArray[np.int64]:
        """Collective. (N,) sample counts on the server: each trainer counts every num_trainers-th client."""
        step = self.net.num_trainers
        if self.net.max_of(int(trainer is not None and trainer.single_client)) and num_clients != step:
            error = ConfigError(
                f"each trainer rank holds one client of its own, so {num_clients} clients want {num_clients} trainer"
                f" ranks (mpirun -n {num_clients + 1}), got {step}"
            )
            error.everywhere = True
            raise error
        ids = np.arange(trainer_idx, num_clients, step) if trainer is not None else np.empty(0, np.int64)
        counts = trainer.num_samples(ids) if trainer is not None else ids
        pairs = self.net.gather_counts(np.stack([ids, counts], 1).reshape(-1))
        sizes = np.zeros(num_clients, np.int64)
        sizes[pairs[0::2]] = pairs[1::2]
        return sizes


class ClientPassiveManager(NetworkManager):
    """A trainer rank: does what the server orders."""

    def __init__(
        self,
        net: PackageProcessor,
        trainer: ClientTrainer,
        evaluator: Evaluator | None = None,
        facts: Mapping[str, object] | None = None,
    ) -> None:
        """Over a trainer.

        Args:
            net: this rank's end of the communicator.
            trainer: trains one client after the other.
            evaluator: evaluates this rank's share of the test set; None: no evaluation in this job.
            facts: more that must be the same on all ranks.
        """
        super().__init__(net, facts)
        self.trainer = trainer
        self.evaluator = evaluator
        self.trainer_idx = max(0, net.rank - 1)
        on_gpu = trainer.device.type == "cuda"
        self._received = torch.empty(trainer.model_parameters.numel(), pin_memory=on_gpu)
        self._work = LocalWork()

    def setup(self) -> None:
        """Collective. Compare models; tell the server the sample counts of a share of the clients."""
        self._check_same(self.trainer.model, self.trainer.device)
        num_clients = self.net.max_of(0)
        self.trainer.seed = self.net.max_of(0)
        self._share_sizes(num_clients, self.trainer, self.trainer_idx)

    def downlink(self) -> NDArray[np.float32]:
        """The receive buffer."""
        return self._received.numpy()

    def local_work(self, order: Order, vector: NDArray[np.float32]) -> LocalWork:
        """Act on the order, then hand over what it came to."""
        self.on_receive(SERVER_RANK, order.code, (order, torch.from_numpy(vector).to(self.trainer.device)))
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
        return work

    def _train(self, order: Order, vector: torch.Tensor) -> LocalWork:
        trainer, exact = self.trainer, ExactSum(vector, order.weight_total, order.weight_max)
        work = LocalWork(exact=None if order.rows else exact)
        mine = order.cohort[order.ranks == self.net.rank]
        for client_id, weight in zip(mine.tolist(), trainer.num_samples(mine).tolist(), strict=True):
            self.net.activity = f"client {client_id}, round {order.round_idx}"
            started = time.perf_counter()
            trainer.begin_client(order.round_idx, client_id)
            load_integer_state(trainer.model, order.integer_state)
            trainer.train(vector)
            trained = trainer.model_parameters.detach()
            bin_idx = exact.bin_of(trained) if order.rows else exact.add(trained, weight)
            if order.rows:
                work.rows.append(trained.cpu().numpy().copy())
            seconds, state = time.perf_counter() - started, integer_state(trainer.model)
            work.updates.append(ClientUpdate(client_id, weight, trainer.loss, seconds, bin_idx, state))
        self.net.activity = f"round {order.round_idx}"
        return work

    def _evaluate(self, order: Order, vector: torch.Tensor) -> LocalWork:
        if self.evaluator is None:
            raise ConfigError("the server wants an evaluation, but this trainer was given no evaluator")
        self.net.activity = f"evaluation after round {order.round_idx}"
        self.trainer.model_parameters.copy_(vector)
        load_integer_state(self.trainer.model, order.integer_state)
        return LocalWork(metrics=self.evaluator.evaluate(self.trainer.model, self.trainer_idx, self.net.num_trainers))


class ServerManager(NetworkManager):
    """The server rank: decides what happens next. Alone in the job, it has its trainer do the local work."""

    def __init__(
        self,
        net: PackageProcessor,
        handler: SyncParameterServerHandler,
        local: ClientPassiveManager | None = None,
        *,
        eval_every: int = 0,
        collect: Literal["auto", "reduce", "gather"] = "auto",
        observers: Sequence[Observer] = (),
        facts: Mapping[str, object] | None = None,
    ) -> None:
        """Over a handler.

        Args:
            net: this rank's end of the communicator.
            handler: the server half of the algorithm.
            local: the client half, needed only when this is the job's only rank.
            eval_every: evaluate after every so many rounds and after the last; 0: never.
            collect: how updates travel; "auto": as the handler needs them.
            observers: told of each round.
            facts: more that must be the same on all ranks.

        Raises:
            ConfigError: the handler needs rows but `collect` is "reduce", or a lone server has no trainer.
        """
        super().__init__(net, facts)
        self.handler = handler
        self.local = local
        self.eval_every = eval_every
        self.observers = observers
        self._needs = handler.needs()
        if self._needs != "sum" and collect == "reduce":
            raise ConfigError(
                f"--collect reduce sums updates on the way, but {type(handler).__name__} needs each client's: use gather"
            )
        if net.size == 1 and local is None:
            raise ConfigError("a job of one rank trains on it too: give ServerManager a ClientPassiveManager, or -n 2")
        self._rows_travel = self._needs != "sum" or collect == "gather"
        self._evaluation_due = False
        self._failure: FedmpiError | None = None
        self._record: RoundRecord | None = None
        self._updates: list[ClientUpdate] = []
        self._arrival: NDArray[np.int64] = np.empty(0, np.int64)  # cohort position -> place among the arriving rows
        self._result = torch.empty(0)
        self._clock = RoundClock(net)

    def setup(self) -> None:
        """Collective. Compare models; learn the sample count of every client."""
        self._check_same(self.handler.model, self.local.trainer.device if self.local else None)
        num_clients = self.net.max_of(self.handler.num_clients)
        seed = self.net.max_of(self.handler.seed)
        trainer = self.local.trainer if self.local else None
        if trainer is not None:
            trainer.seed = seed
        self.handler.client_sizes = self._share_sizes(num_clients, trainer, 0)

    def next_order(self) -> Order:
        """Evaluate if that is due, else train, else send everybody home."""
        self._clock.start()
        if self._failure is None and self._evaluation_due:
            state = self.handler.integer_state()
            return Order(MessageCode.EVALUATE_PARAMS, self.handler.round_idx - 1, integer_state=state)
        if self._failure is not None or self.handler.stop_condition():
            return self.shutdown_clients()
        return self.activate_clients()

    def activate_clients(self) -> Order:
        """The order that starts a round: who trains, and where."""
        handler = self.handler
        cohort = handler.sample_clients()
        ranks = place(cohort, handler.weights, self.net.num_trainers, handler.num_clients) + (self.net.size > 1)
        self.net.activity = f"round {handler.round_idx}"
        self._updates = []
        self._arrival = np.argsort(np.argsort(ranks, kind="stable"), kind="stable")
        return Order(
            MessageCode.PARAMETER_UPDATE,
            handler.round_idx,
            cohort,
            ranks,
            handler.integer_state(),
            weight_total=int(handler.weights.sum()),
            weight_max=int(handler.weights.max()),
            rows=int(self._rows_travel),
        )

    def shutdown_clients(self) -> Order:
        """The order that ends the job. What is to be kept is on disk before it goes out."""
        if self._failure is not None:
            logger.error("%s", self._failure)
            return Order(MessageCode.EXIT, exit_code=self._failure.exit_code)
        for observer in self.observers:
            observer.on_end(self.handler)
        return Order(MessageCode.EXIT, exit_code=EXIT_DONE)

    def downlink(self) -> NDArray[np.float32]:
        """The global model itself."""
        return self.handler.model_parameters.numpy()

    def local_work(self, order: Order, vector: NDArray[np.float32]) -> LocalWork:
        """Room for what will arrive; when alone, the trainer's work."""
        self._clock.sent()
        if self.local is not None:
            return self.local.local_work(order, vector)
        if order.code is MessageCode.PARAMETER_UPDATE and not order.rows:
            return LocalWork(exact=ExactSum(self.handler.model_parameters, order.weight_total, order.weight_max))
        return LocalWork()

    def on_receive(self, sender_rank: int, message_code: MessageCode, payload: list[ClientUpdate]) -> None:
        """Note one rank's client updates; a non-finite one ends the job."""
        self._clock.busy(sender_rank, sum(update.seconds for update in payload))
        self._updates += payload
        for update in payload:
            if update.bin_idx is None and self._failure is None:
                self._failure = DivergedError(
                    f"client {update.client_id}'s model is not finite after training in round {self.handler.round_idx}:"
                    " lower --client-lr"
                )

    def on_block(self, columns: slice, rows: NDArray[np.float32]) -> None:
        """Bring the block into cohort order and have it aggregated, or kept if the handler wants whole vectors."""
        handler, block = self.handler, torch.from_numpy(rows)[self._arrival]
        reference = handler.model_parameters[columns]
        if columns.start == 0:
            dtype = torch.float64 if self._needs == "sum" else torch.float32
            shape = (
                (len(block), len(handler.model_parameters)) if self._needs == "rows" else handler.model_parameters.shape
            )
            self._result = torch.empty(shape, dtype=dtype)
        if self._needs == "rows":
            self._result[:, columns] = block
        elif self._needs == "blocks":
            self._result[columns] = handler.aggregate(block, reference)
        else:
            bins = {update.client_id: update.bin_idx for update in self._updates}
            exact = ExactSum(reference, int(handler.weights.sum()), int(handler.weights.max()))
            for client_id, row, weight in zip(handler.cohort.tolist(), block, handler.weights.tolist(), strict=True):
                exact.add(row, weight, bins[client_id])
            self._result[columns] = exact.mean()

    def finish_round(self, order: Order, work: LocalWork) -> None:
        """The server step, or the end of an evaluation; then tell the observers."""
        if order.code is MessageCode.EVALUATE_PARAMS:
            self._evaluation_due = False
            self.handler.metrics = metrics_of(work.metrics)
            self._report(self.handler.metrics)
            return
        if self._failure is not None:
            return
        handler = self.handler
        self._clock.collected()
        if self._needs == "rows":
            handler.update_model(list(self._result))
        elif self._needs == "blocks":
            handler.model_parameters.copy_(self._result)
        else:
            mean = self._result if order.rows else work.exact.mean().cpu()
            handler.step(mean)
        self._updates.sort(key=lambda update: update.client_id)
        handler.update_integer_state([update.integer_state for update in self._updates])
        handler.round_idx += 1
        self._result = torch.empty(0)
        if not bool(torch.isfinite(handler.model_parameters).all()):
            self._failure = DivergedError(
                f"the global model is not finite after round {order.round_idx}: lower --server-lr or --client-lr"
            )
            return
        self._clock.stepped()
        due = handler.stop_condition() or (self.eval_every > 0 and handler.round_idx % self.eval_every == 0)
        self._evaluation_due = self.eval_every > 0 and due
        if not self._evaluation_due:
            self._report(None)

    def _report(self, metrics: Metrics | None) -> None:
        handler = self.handler
        num_samples = int(handler.weights.sum())
        loss = sum(u.num_samples * u.loss for u in self._updates if u.num_samples) / max(num_samples, 1)
        traffic = 4 * len(handler.cohort) * len(handler.model_parameters)
        record = RoundRecord(
            round_idx=handler.round_idx - 1,
            cohort=handler.cohort.tolist(),
            num_samples=num_samples,
            train_loss=loss if num_samples and math.isfinite(loss) else None,
            accuracy=metrics.accuracy if metrics else None,
            loss=metrics.loss if metrics else None,
            bytes_down=traffic,
            bytes_up=traffic,
            timings=self._clock.timings(metrics is not None),
        )
        for observer in self.observers:
            observer.on_round(record)
