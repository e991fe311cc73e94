"""The rounds of a job on the server rank: play one, evaluate, tell observers, keep a checkpoint, and stop in time."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedmpi.core.coordinator import Coordinator, last_good
from fedmpi.core.evaluate import Metrics
from fedmpi.core.order import ClientUpdate, IntArray
from fedmpi.core.record import Observer, RoundRecord
from fedmpi.core.segments import Layout
from fedmpi.core.timings import RoundTimings
from fedmpi.core.views import check_views
from fedmpi.errors import EXIT_DONE, EXIT_STOPPED, DivergedError
from fedmpi.lifecycle.policies import StopPolicy
from fedmpi.mpi.comm import Comm

logger = logging.getLogger(__name__)


class ServerHalf(Protocol):
    """The server's half of an algorithm.

    Attributes:
        model: the flattened module.
        flat: (V,) float32, the model and the segments that go with it.
        layout: of `flat`.
        round_idx: rounds finished so far.
        metrics: the last evaluation; None before the first.
        reported: weighted means of what the visits of the round at hand reported.
    """

    model: nn.Module
    flat: Tensor
    layout: Layout
    round_idx: int
    metrics: Metrics | None
    reported: Mapping[str, float]

    def play_round(self) -> None:
        """Collective, as the server. Train and step the global model; `round_idx` stays."""

    def finished(self) -> bool:
        """Return True when training is over."""

    def integer_state(self) -> IntArray:
        """Return the model's integer buffers."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; nothing is copied."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""


class ServerLoop:
    """The rounds of a job.

    Attributes:
        failure: what ended the run, if it diverged.
    """

    def __init__(
        self,
        comm: Comm,
        half: ServerHalf,
        coordinator: Coordinator,
        timings: RoundTimings,
        policy: StopPolicy,
        eval_every: int = 0,
        observers: Sequence[Observer] = (),
    ) -> None:
        """Over the server's half of an algorithm.

        Args:
            comm: this rank's end of the communicator.
            half: plays the rounds.
            coordinator: of the exchanges.
            timings: of the rounds.
            policy: stops the job, and says when to write a checkpoint, between two rounds.
            eval_every: evaluate after every so many rounds and after the last; 0: never.
            observers: told of each round.
        """
        self._comm, self._half, self._coordinator, self._timings = comm, half, coordinator, timings
        self._policy, self._eval_every, self._observers = policy, eval_every, observers
        self._resumed = False
        self.failure: DivergedError | None = None

    def run(self) -> int:
        """Collective, as the server. Train to the end; return the exit code, the same on every rank."""
        self._policy.checkpoints.begin(self._half.round_idx, self.state_dict, self._resumed)
        self._timings.restart()
        code = self._run()
        self._coordinator.exit(code)
        return code

    def _run(self) -> int:
        half = self._half
        while not half.finished():
            reason = self._policy.begin_round()
            if reason is not None:
                self._policy.checkpoints.write(half.round_idx, self.state_dict, wait=True)
                self._policy.checkpoints.note_stop(reason)
                logger.warning("%s: stopping after round %d; %s", reason, half.round_idx, self._policy.how_to_go_on)
                return EXIT_STOPPED
            kept = copy.deepcopy(half.state_dict()) if self._policy.checkpoints.is_on else None
            try:
                metrics = self._round()
            except DivergedError as error:
                return self._diverged(error, kept)
            self._report(metrics)
        self._policy.checkpoints.write(half.round_idx, self.state_dict, wait=True)
        for observer in self._observers:
            observer.on_end(half)
        return EXIT_DONE

    def _round(self) -> Metrics | None:
        half, vector = self._half, self._half.flat[self._half.layout.vector]
        buffers = vector[half.layout["b"].start - half.layout.vector.start :]
        before = buffers.clone()
        self._coordinator.begin_round()
        with self._comm.timeline.span("round"):
            half.play_round()
        check_views(half.model, vector)
        finite = torch.isfinite(vector)
        finite[len(vector) - len(buffers) :] |= buffers.view(torch.int32) == before.view(torch.int32)  # a mask of -inf
        if not bool(finite.all()):
            raise DivergedError(
                f"the global model is not finite after round {half.round_idx}: lower --server-lr or --client-lr"
                f"{last_good(half.round_idx)}"
            )
        half.round_idx += 1
        self._timings.stepped()
        due = half.finished() or (self._eval_every > 0 and half.round_idx % self._eval_every == 0)
        if self._eval_every == 0 or not due:
            return None
        half.metrics = self._coordinator.evaluate(half.round_idx - 1, half.flat, half.integer_state())
        return half.metrics

    def _diverged(self, error: DivergedError, kept: dict[str, Any] | None) -> int:
        self.failure = error
        if kept is not None:
            state = {**self.state_dict(), "half": kept}
            self._policy.checkpoints.write(int(kept["round_idx"]), lambda: state, wait=True)
        logger.error("%s", error)
        return error.exit_code

    def _report(self, metrics: Metrics | None) -> None:
        half = self._half
        visits: dict[int, ClientUpdate] = {}
        for update in self._coordinator.updates:  # of several visits of a round, the last one with a loss
            if update.client_id not in visits or not math.isnan(update.loss):
                visits[update.client_id] = update
        updates = [visits[client_id] for client_id in sorted(visits)]
        num_samples = sum(update.num_samples for update in updates)
        loss = sum(u.num_samples * u.loss for u in updates if u.num_samples) / max(num_samples, 1)
        record = RoundRecord(
            round_idx=half.round_idx - 1,
            cohort=[update.client_id for update in updates],
            num_samples=num_samples,
            train_loss=loss if num_samples and math.isfinite(loss) else None,
            accuracy=metrics.accuracy if metrics else None,
            loss=metrics.loss if metrics and math.isfinite(metrics.loss) else None,
            bytes_down=self._coordinator.bytes_down,
            bytes_up=self._coordinator.bytes_up,
            timings=self._timings.timings(metrics is not None),
            reported={name: value if math.isfinite(value) else None for name, value in half.reported.items()},
        )
        for observer in self._observers:
            observer.on_round(record)
        self._policy.after_round(record.timings["round_s"])
        self._policy.checkpoints.after_round(half.round_idx, self.state_dict)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, between two rounds."""
        pace = {"ranks": self._comm.size, **self._policy.state_dict()}
        kept = {"half": self._half.state_dict(), "costs": self._coordinator.costs.moments, "pace": pace}
        return {**kept, "elapsed_s": self._timings.elapsed_s}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, before `run`."""
        self._half.load_state_dict(state["half"])
        self._timings.resume(float(state.get("elapsed_s", 0.0)))
        if state["pace"]["ranks"] == self._comm.size:
            self._coordinator.costs.moments = state["costs"]
            self._policy.load_state_dict(state["pace"])
        self._resumed = True
