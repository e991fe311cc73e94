"""The server rank's half of the round loop.

Shapes: P vector entries, K cohort, N clients.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmpi.core.attributes import Attributes
from fedmpi.core.client_manager import ClientPassiveManager
from fedmpi.core.evaluate import Metrics, metrics_of
from fedmpi.core.exactsum import ExactSum
from fedmpi.core.handler import SyncParameterServerHandler
from fedmpi.core.manager import Buffer, NetworkManager, Observer
from fedmpi.core.messages import ClientUpdate, LocalWork, MessageCode, Order, RoundRecord
from fedmpi.core.schedule import CostModel, is_pinned, place, queue
from fedmpi.core.timings import RoundClock
from fedmpi.core.vector import num_trainable
from fedmpi.core.views import check_views
from fedmpi.errors import EXIT_DONE, EXIT_STOPPED, ConfigError, DivergedError, FedmpiError
from fedmpi.lifecycle import progress
from fedmpi.lifecycle.policies import Boundary
from fedmpi.mpi.comm import Comm
from fedmpi.mpi.work_queue import WorkQueue

logger = logging.getLogger(__name__)


class ServerManager(NetworkManager):
    """The server rank: decides what happens next. Alone in the job, it has its trainer do the local work."""

    def __init__(
        self,
        net: Comm,
        handler: SyncParameterServerHandler,
        local: ClientPassiveManager | None = None,
        *,
        eval_every: int = 0,
        collect: Literal["auto", "reduce", "gather"] = "auto",
        schedule: Literal["auto", "static", "dynamic"] = "auto",
        observers: Sequence[Observer] = (),
        facts: Mapping[str, object] | None = None,
        boundary: Boundary | None = None,
    ) -> None:
        """Over a handler.

        Args:
            net: this rank's end of the communicator.
            handler: the server half of the algorithm.
            local: the client half, needed only when this is the job's only rank.
            eval_every: evaluate after every so many rounds and after the last; 0: never.
            collect: how updates travel; "auto": as the handler needs them.
            schedule: static: clients are placed before the round; dynamic: idle trainers draw the next; auto: dynamic
                within one node.
            observers: told of each round.
            facts: more that must be the same on all ranks.
            boundary: what is kept, and what stops the job, between two rounds; None: nothing.

        Raises:
            ConfigError: the handler needs rows but `collect` is "reduce", or a lone server has no trainer.
        """
        super().__init__(net, facts)
        self.handler = handler
        self.local = local
        self.eval_every = eval_every
        self.observers = observers
        self.boundary = boundary or Boundary()
        self._resumed = False
        self._elapsed_s = 0.0
        self._needs = handler.needs()
        if self._needs != "sum" and collect == "reduce":
            raise ConfigError(
                f"--collect reduce sums updates on the way, but {type(handler).__name__} needs each one: use gather"
            )
        if net.size == 1 and local is None:
            raise ConfigError("a job of one rank trains on it too: give ServerManager a ClientPassiveManager, or -n 2")
        self._rows_travel = self._needs != "sum" or collect == "gather"
        self._draws = schedule == "dynamic" or (schedule == "auto" and net.one_node and net.num_trainers > 1)
        self._costs = CostModel()
        self._evaluation_due = False
        self._failure: FedmpiError | None = None
        self._record: RoundRecord | None = None
        self._updates: list[ClientUpdate] = []
        self._result = torch.empty(0, device="cpu")
        self._weights = np.empty(0, np.int64)
        self._num_trainable = num_trainable(handler.model)
        self._before: Attributes | None = None
        self._last_good: dict[str, Any] | None = None
        self._clock = RoundClock(net)

    @property
    def failure(self) -> FedmpiError | None:
        """What ended the run, if it diverged."""
        return self._failure

    def setup(self) -> None:
        """Collective. Compare models; learn the sample count of every client."""
        for model in (self.handler.model, *([self.local.trainer.model] if self.local else [])):
            progress.watch(model)
        self._check_same(self.handler.model, self.local.trainer.device if self.local else None)
        num_clients = self.net.max_of(self.handler.num_clients)
        seed = self.net.max_of(self.handler.seed)
        trainer = self.local.trainer if self.local else None
        if trainer is not None:
            trainer.seed = seed
        if self.local is not None:
            self.local.begin(num_clients)
        self.handler.client_sizes = self._share_sizes(num_clients, trainer, 0)
        if self.net.max_of(int(self._draws)):
            self.queue = WorkQueue(self.net)
            if self.local is not None:
                self.local.queue = self.queue
        if self.boundary.keeps:
            self._before = Attributes(self.handler.model, self.handler, self.handler.own_fields)
        self.boundary.begin(self.handler.round_idx, self.state_dict, self._resumed)
        self._clock = RoundClock(self.net, self._elapsed_s)  # the first round starts now

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, between two rounds."""
        pace = {"ranks": self.net.size, **self.boundary.state_dict()}
        held = {"handler": self.handler.state_dict(), "costs": self._costs.moments, "pace": pace}
        return {**held, "elapsed_s": self._clock.elapsed_s}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, before `run`."""
        self.handler.load_state_dict(state["handler"])
        self._elapsed_s = float(state.get("elapsed_s", 0.0))
        if state["pace"]["ranks"] == self.net.size:
            self._costs.moments = state["costs"]
            self.boundary.load_state_dict(state["pace"])
        self._resumed = True

    def next_order(self) -> Order:
        """Evaluate if that is due, else train, else send everybody home."""
        self._clock.start()
        if self._failure is None and self._evaluation_due:
            state = self.handler.integer_state()
            return Order(MessageCode.EVALUATE_PARAMS, self.handler.round_idx - 1, integer_state=state)
        if self._failure is not None or self.handler.stop_condition():
            return self.shutdown_clients()
        reason = self.boundary.stop_because()
        if reason is not None:
            return self._stop_early(reason)
        return self.activate_clients()

    def activate_clients(self) -> Order:
        """The order that starts a round: who trains, and where."""
        handler = self.handler
        self._last_good = copy.deepcopy(handler.state_dict()) if self.boundary.keeps else None
        self._weights = handler.begin_round()
        cohort = handler.cohort
        sizes = handler.client_sizes[cohort]
        costs, num_trainers = self._costs.costs(sizes), self.net.num_trainers
        if self._draws and not is_pinned(len(cohort), num_trainers, handler.num_clients):
            ranks = -1 - queue(costs)
            assert self.queue is not None, "setup comes first"
            self.queue.begin()
        else:
            ranks = place(cohort, costs, num_trainers, handler.num_clients) + (self.net.size > 1)
        self.net.activity = f"round {handler.round_idx}"
        a_sample_s = max((update.seconds / max(1, update.num_samples) for update in self._updates), default=0.0)
        longest_s = max(self.boundary.longest_client_s, a_sample_s * float(sizes.max(initial=0)))
        self.boundary.longest_client_s = longest_s
        self._updates = []
        return Order(
            MessageCode.PARAMETER_UPDATE,
            handler.round_idx,
            cohort,
            ranks,
            self._weights,
            handler.integer_state(),
            rows=int(self._rows_travel),
            longest_client_ms=math.ceil(1e3 * longest_s),
        )

    def shutdown_clients(self) -> Order:
        """The order that ends the job. What is to be kept is on disk before it goes out."""
        if self._failure is not None:
            if self._last_good is not None:
                state = {**self.state_dict(), "handler": self._last_good}
                self.boundary.keep(int(self._last_good["round_idx"]), lambda: state, wait=True)
            logger.error("%s", self._failure)
            return Order(MessageCode.EXIT, exit_code=self._failure.exit_code)
        self.boundary.keep(self.handler.round_idx, self.state_dict, wait=True)
        for observer in self.observers:
            observer.on_end(self.handler)
        return Order(MessageCode.EXIT, exit_code=EXIT_DONE)

    def _stop_early(self, reason: str) -> Order:
        self.boundary.keep(self.handler.round_idx, self.state_dict, wait=True)
        self.boundary.note_stop(reason)
        done = self.handler.round_idx
        logger.warning("%s: stopping after round %d; %s", reason, done, self.boundary.how_to_go_on)
        return Order(MessageCode.EXIT, exit_code=EXIT_STOPPED)

    def downlink(self) -> NDArray[np.float32]:
        """The global model itself."""
        return self.handler.model_parameters.numpy()

    def local_work(self, order: Order, vector: Buffer) -> LocalWork:
        """Room for what will arrive; when alone, the trainer's work."""
        self._clock.sent()
        if self.local is not None:
            return self.local.local_work(order, vector)
        if order.code is MessageCode.PARAMETER_UPDATE and not order.rows:
            return LocalWork(exact=ExactSum(self.handler.model_parameters, order.weight_total, order.weight_max))
        return LocalWork()

    def on_receive(self, sender_rank: int, message_code: MessageCode, payload: Any) -> None:
        """Note one rank's client updates, or that it was sent a signal; a non-finite update ends the job."""
        if message_code is MessageCode.EXIT:
            self.boundary.on_stop_wanted(payload, sender_rank)
            return
        self._clock.busy(sender_rank, sum(update.seconds for update in payload))
        self._updates += payload

    def on_block(self, columns: slice, rows: NDArray[np.float32]) -> None:
        """Bring the block into cohort order and have it aggregated, or kept if the handler wants whole vectors."""
        if any(update.bin_idx is None for update in self._updates):
            return  # a client has diverged: nothing is made of this round
        arrived = np.array([update.client_id for update in self._updates])
        handler, block = self.handler, torch.from_numpy(rows)[np.argsort(arrived)]
        size = len(handler.model_parameters)
        if columns.start == 0:
            shape = (len(block), size) if self._needs == "rows" else (size,)
            dtype = torch.float64 if self._needs == "sum" else torch.float32
            self._result = torch.empty(shape, dtype=dtype, device="cpu")
        if self._needs == "rows":
            self._result[:, columns] = block
        elif self._needs == "blocks":
            split = min(columns.stop, max(columns.start, self._num_trainable)) - columns.start
            new, reference = self._result[columns], handler.model_parameters[columns]
            if split:
                new[:split] = _checked(handler.aggregate(block[:, :split].contiguous(), reference[:split]), split)
            if split < len(new):
                new[split:] = self._mean_of(block[:, split:], reference[split:]).add_(reference[split:])
        else:
            self._result[columns] = self._mean_of(block, handler.model_parameters[columns])

    def _mean_of(self, rows: Tensor, reference: Tensor) -> Tensor:
        """(B,) float64: the weighted mean update of (K, B) rows in cohort order, with the bits of the exact sum."""
        exact = ExactSum(reference, int(self._weights.sum()), int(self._weights.max(initial=0)))
        bins = {update.client_id: update.bin_idx for update in self._updates}
        for client_id, row, weight in zip(self.handler.cohort.tolist(), rows, self._weights.tolist(), strict=True):
            exact.add(row, weight, bins[client_id])
        return exact.mean()

    def finish_round(self, order: Order, work: LocalWork) -> None:
        """The server step, or the end of an evaluation; then tell the observers."""
        with self.net.timeline.span("server step"):
            self._finish_round(order, work)

    def _finish_round(self, order: Order, work: LocalWork) -> None:
        if order.code is MessageCode.EVALUATE_PARAMS:
            self._evaluation_due = False
            self.handler.metrics = metrics_of(work.metrics)
            self._report(self.handler.metrics)
            return
        self._clock.collected()
        handler = self.handler
        self._updates.sort(key=lambda update: update.client_id)
        if self._updates:
            self._failure = self._diverged_clients(order.round_idx) or self._server_step(order.round_idx, work)
        if self._failure is not None:
            return
        handler.round_idx += 1
        self._clock.stepped()
        self._tell_unkept()
        due = handler.stop_condition() or (self.eval_every > 0 and handler.round_idx % self.eval_every == 0)
        self._evaluation_due = self.eval_every > 0 and due
        if not self._evaluation_due:
            self._report(None)

    def _tell_unkept(self) -> None:
        """After the first round of this job: what a handler keeps that no checkpoint holds, in a line."""
        before, self._before = self._before, None
        if before is None or type(self.handler).state_dict is not SyncParameterServerHandler.state_dict:
            return
        names = before.changed()
        if names:
            logger.warning(
                "%s keeps %s from round to round, which no checkpoint holds, so that it begins anew after a resume: if"
                " it decides anything, add it to state_dict and load_state_dict",
                type(self.handler).__name__,
                ", ".join(map(repr, names)),
            )

    def _diverged_clients(self, round_idx: int) -> DivergedError | None:
        """The error that names the clients whose model is not finite, if there are any."""
        bad = [update.client_id for update in self._updates if update.bin_idx is None]
        if not bad:
            return None
        who = (
            f"client {bad[0]}'s model is" if len(bad) == 1 else f"the models of clients {', '.join(map(str, bad))} are"
        )
        return DivergedError(
            f"{who} not finite after training in round {round_idx}: lower --client-lr{_last_good(round_idx)}"
        )

    def _server_step(self, round_idx: int, work: LocalWork) -> DivergedError | None:
        """Make the global model of what has arrived; the error to end with if that is not finite."""
        handler, vector = self.handler, self.handler.model_parameters
        buffers = vector[self._num_trainable :]
        before = buffers.clone()
        mean = work.exact.mean().cpu() if work.exact is not None else self._result
        if self._needs == "rows":
            averaged = self._mean_of(self._result[:, self._num_trainable :], before).add_(before)
            handler.update_model(list(self._result))
        elif self._needs == "blocks":
            averaged = self._result[self._num_trainable :]
            vector.copy_(self._result)
        else:
            averaged = mean[self._num_trainable :] + before
            handler.step(mean)
        buffers.copy_(averaged)
        self._result = torch.empty(0, device="cpu")
        trained = [(update.num_samples, update.seconds) for update in self._updates]
        self._costs.observe(*(np.array(column) for column in zip(*trained, strict=True)))
        check_views(handler.model, vector)
        handler.update_integer_state([update.integer_state for update in self._updates])
        finite = torch.isfinite(vector)
        finite[self._num_trainable :] |= buffers.view(torch.int32) == before.view(torch.int32)  # a mask of -inf
        if bool(finite.all()):
            return None
        return DivergedError(
            f"the global model is not finite after round {round_idx}: lower --server-lr or --client-lr"
            f"{_last_good(round_idx)}"
        )

    def _report(self, metrics: Metrics | None) -> None:
        handler = self.handler
        num_samples = int(handler.client_sizes[handler.cohort].sum())
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
        self.boundary.after_round(handler.round_idx, record.timings["round_s"], self.state_dict)


def _last_good(round_idx: int) -> str:
    return f"; the last good round is {round_idx - 1}" if round_idx else "; no round was good"


def _checked(values: object, size: int) -> Tensor:
    if isinstance(values, Tensor) and values.shape == (size,):
        return values
    found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
    raise ConfigError(f"aggregate must return a tensor of shape ({size},), got {found}")
