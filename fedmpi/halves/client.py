"""One client's visit to a trainer, as an author sees it.

Shapes: T trainable entries, n samples of the client.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fedmpi.core.evaluate import Metrics
from fedmpi.core.memory_format import laid_out
from fedmpi.core.order import Order
from fedmpi.core.seeding import Stream, derive_seed
from fedmpi.core.segments import Segments
from fedmpi.core.vector import integer_state, load_integer_state
from fedmpi.engines.gradients import loss, loss_and_gradient
from fedmpi.engines.steps import Steps, batch_slices
from fedmpi.errors import ConfigError

if TYPE_CHECKING:
    from fedmpi.halves.visitor import ClientVisitor


class Batch(NamedTuple):
    """Samples of one step."""

    inputs: Tensor
    labels: Tensor


class Client:
    """One visit to a client.

    Attributes:
        id: the client, in [0, num_clients).
        round_idx: the round.
        num_samples: n.
        sent: what the server sent; read-only.
    """

    def __init__(self, visitor: ClientVisitor, order: Order, client_id: int, sent: Tensor, may_defer: bool) -> None:
        """See `ClientVisitor.visit`."""
        self.id, self.round_idx = client_id, order.round_idx
        self.num_samples = len(visitor.data.partition[client_id])
        self.sent = Segments(sent, visitor.layout)
        self.reported: dict[str, float] = {}
        self.deferred = False
        self._losses: list[float] = []  # of the steps of the first `sgd`
        self._step_losses: list[Tensor] = []  # of gradients at `back.w`
        self._visitor, self._order, self._may_defer = visitor, order, may_defer
        self._begun, self._fresh, self._passes = False, False, 0
        self._back = Segments(visitor.back, visitor.layout)

    @property
    def back(self) -> Segments:
        """The vector that goes back to the server: begins as `sent`, with zeros in segments that only go up."""
        self.settle()
        self._fresh = False
        return self._back

    def sgd(
        self,
        start: Tensor | None = None,
        *,
        prox: float = 0.0,
        anchor: Tensor | None = None,
        drift: Tensor | None = None,
        epochs: int | None = None,
        lr: float | None = None,
        only: str | None = None,
    ) -> Steps:
        """Take the steps of local SGD along the gradient g + prox (w - anchor) + drift; the result is in `back.w`.

        The step is put off, and taken together with other clients', where the client takes one only and nothing needs
        its result before.

        Args:
            start: (T,) where to begin; None: `sent.w`.
            prox: pull towards the anchor, >= 0.
            anchor: (T,); None: `sent.w`.
            drift: (T,) added to every gradient.
            epochs: passes over the client's samples; None: --local-epochs.
            lr: step size; None: --client-lr.
            only: a pattern of parameter names, e.g. "head.*": the others keep their bits.

        Returns:
            How many steps there were, and the sum of the coefficients with which gradients enter them.

        Raises:
            ConfigError: a vector is not (T,).
        """
        config, sent = self._visitor.config, self.sent.w
        for name, vector in {"start": start, "anchor": anchor, "drift": drift}.items():
            _check_size(name, vector, sent)
        start, anchor = (None if _is_same(vector, sent) else vector for vector in (start, anchor))
        passes = config.local_epochs if epochs is None else epochs
        one_step = passes == 1 and 0 < self.num_samples <= (config.batch_size or self.num_samples)
        if one_step and start is None and anchor is None:
            prox = 0.0  # there is no pull where the only step begins
        plain = start is None and drift is None and lr is None and only is None and not prox
        if self._may_defer and plain and one_step and not self._begun and not self._passes:
            self.deferred, self._passes = True, 1
            return Steps(1, 1.0)
        self.settle()
        return self._steps(start, prox, anchor, drift, passes, lr, only)

    def batches(self, epochs: int | None = None) -> Iterator[Batch]:
        """Yield the batches that `sgd` would take, with the same seeds."""
        self.settle()
        visitor = self._visitor
        size, smallest = visitor.config.batch_size or self.num_samples, visitor.smallest_batch
        for inputs, labels in self._epochs(visitor.config.local_epochs if epochs is None else epochs):
            for part in batch_slices(self.num_samples, min(size, self.num_samples), smallest):
                yield Batch(inputs[part], labels[part])

    @property
    def loss_value(self) -> float:
        """Mean training loss of its steps, else of its gradients at `back.w`; NaN when there was neither."""
        self.settle()
        losses = self._losses or [float(value) for value in self._step_losses]
        return math.fsum(losses) / len(losses) if losses else math.nan

    def gradient(self, batch: Batch, at: Tensor | None = None) -> Tensor:
        """(T,) the gradient of the mean loss over a batch, at `back.w` or at a (T,) vector.

        Only the former moves float buffers, and counts for the client's training loss.
        """
        with _Elsewhere(self, at):
            self._visitor.check_model(self.round_idx)
            value, result = loss_and_gradient(self._visitor.model, batch.inputs, batch.labels)
        if at is None:
            self._step_losses.append(value)
        return result

    def loss(self, batch: Batch, at: Tensor | None = None) -> float:
        """Return the mean loss over a batch, in training mode; see `gradient`."""
        with _Elsewhere(self, at):
            return float(loss(self._visitor.model, batch.inputs, batch.labels))

    def evaluate(self, w: Tensor | None = None) -> Metrics:
        """Return accuracy and loss on this client's own samples, at `back.w` or at another (T,) vector."""
        with _Elsewhere(self, self.back.w if w is None else w):
            return self._visitor.evaluate(self.id)

    def report(self, **numbers: float) -> None:
        """Tell the server numbers; their weighted means are in the history.

        Raises:
            ConfigError: one is no number.
        """
        for name, number in numbers.items():
            try:
                self.reported[name] = float(number)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"report({name}=...) takes a number, got a {type(number).__name__}") from error

    def generator(self, purpose: str) -> torch.Generator:
        """Return random numbers of this client, round and exchange alone, for one purpose."""
        return torch.Generator("cpu").manual_seed(self._seed(Stream.PURPOSE, purpose))

    def settle(self) -> None:
        """Take a step that was put off, and make `back` what it is to be."""
        if not self._begun:
            self._begun = self._fresh = True
            self._visitor.begin(self._order, self.id, self.sent.flat)
        if self.deferred:
            self.deferred, self._passes = False, 0
            self._steps(None, 0.0, None, None, 1, None, None)

    def _seed(self, stream: Stream, purpose: str = "") -> int:
        order = self._order
        return derive_seed(self._visitor.seed, stream, order.round_idx, self.id, order.exchange_idx, purpose)

    def _epochs(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the client's samples in a new order per pass."""
        again = f"pass {self._passes}" if self._passes else ""
        shuffles = torch.Generator("cpu").manual_seed(self._seed(Stream.BATCHES, again))
        self._passes += 1
        visitor = self._visitor
        one_step = count == 1 and self.num_samples <= (visitor.config.batch_size or self.num_samples)
        in_order = one_step and visitor.engine.groups is not None  # as a group takes them
        for _ in range(count if self.num_samples else 0):
            order = None if in_order else torch.randperm(self.num_samples, generator=shuffles, device="cpu").numpy()
            inputs, labels = visitor.data.load(self.id, order)
            yield laid_out(inputs, visitor.memory_format), labels

    def _steps(
        self, start: Tensor | None, prox: float, anchor: Tensor | None, drift: Tensor | None, passes: int,
        lr: float | None, only: str | None,
    ) -> Steps:  # fmt: skip
        visitor = self._visitor
        visitor.check_model(self.round_idx)
        w = self._back.w
        constant = None
        if prox or drift is not None:
            constant = torch.zeros_like(w, dtype=torch.float64) if drift is None else drift.to(torch.float64)
            constant = constant.sub(self.sent.w if anchor is None else anchor, alpha=prox).to(torch.float32)
        if start is not None or not self._fresh:
            w.copy_(self.sent.w if start is None else start)
        self._fresh = False
        visitor.engine.begin(lr=lr, prox=prox, constant=constant, only=None if only is None else visitor.named(only))
        size = min(visitor.config.batch_size or self.num_samples, self.num_samples)
        losses: list[float] = []
        for inputs, labels in self._epochs(passes):
            losses += visitor.engine.epoch(inputs, labels, size).tolist()
        self._losses = self._losses or losses
        return visitor.engine.steps()


def _check_size(name: str, vector: Tensor | None, w: Tensor) -> None:
    if vector is not None and vector.shape != w.shape:
        raise ConfigError(f"{name} must have the shape of k.sent.w, {tuple(w.shape)}, got {tuple(vector.shape)}")


def _is_same(vector: Tensor | None, w: Tensor) -> bool:
    return vector is not None and vector.data_ptr() == w.data_ptr() and vector.dtype == w.dtype


class _Elsewhere:
    """A client's model with other trainable parameters for a while; then it is what it was, its buffers too."""

    def __init__(self, client: Client, w: Tensor | None) -> None:
        _check_size("at", w, client.sent.w)
        self._back, self._model, self._w = client.back, client._visitor.model, w

    def __enter__(self) -> None:
        if self._w is not None:
            self._kept = self._back.vector.clone(), integer_state(self._model)
            self._back.w.copy_(self._w)

    def __exit__(self, *_: object) -> None:
        if self._w is not None:
            self._back.vector.copy_(self._kept[0])
            load_integer_state(self._model, self._kept[1])
