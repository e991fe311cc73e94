"""One client's visit to a trainer, as an author sees it, and the visitor that makes it.

Shapes: V entries of a flat vector, T trainable entries, n samples of the client.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedmpi.config import RunConfig
from fedmpi.core.attributes import Attributes
from fedmpi.core.evaluate import Evaluator, Metrics, metrics_of
from fedmpi.core.isolation import Isolation
from fedmpi.core.memory_format import laid_out, memory_format_of
from fedmpi.core.model_checks import check_model
from fedmpi.core.order import IntArray, Order
from fedmpi.core.seeding import Stream, derive_seed, seed_everything
from fedmpi.core.segments import Extra, Segments
from fedmpi.core.vector import flatten, integer_state, layout_of, load_integer_state
from fedmpi.core.worker import Visit
from fedmpi.data.client_data import ClientData
from fedmpi.engines.choose import choose_engine
from fedmpi.engines.gradients import loss, loss_and_gradient
from fedmpi.engines.proof import why_not
from fedmpi.engines.rehearsal import rehearse
from fedmpi.engines.steps import Steps, batch_slices
from fedmpi.errors import ConfigError, ModelError

_TRIAL_SIZE = 256
"""Most samples of the trial before the first round."""


class AnyAlgorithm(Protocol):
    """An `Algorithm`, as both of its halves use it."""

    extra: Extra
    transforms: Sequence[Any]

    def round(self, s: Any) -> None:
        """Run one round on the server."""


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
        with _Elsewhere(self, w):
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
        for _ in range(count if self.num_samples else 0):
            order = torch.randperm(self.num_samples, generator=shuffles, device="cpu").numpy()
            in_order = one_step and visitor.engine.groups is not None  # as a group takes them
            inputs, labels = visitor.data.load(self.id, None if in_order else order)
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


class ClientVisitor:
    """Visits one client after the other, as a method of the algorithm says.

    Attributes:
        algorithm: this rank's.
        data: the training set and its split.
        config: the options.
        model: the module; its trainable parameters and float buffers are views into `back`.
        engine: takes the steps of SGD.
        engine_note: which one, and why.
        smallest_batch: samples that the model needs in training.
        groups: takes the steps of clients of one step together; None: each takes its own.
        changed_attributes: names of the model's attributes that were seen to change in trial steps.
    """

    def __init__(
        self, algorithm: AnyAlgorithm, model: nn.Module, data: ClientData, config: RunConfig, device: torch.device
    ) -> None:
        """Over all clients' data.

        Raises:
            ModelError: the model cannot be trained.
        """
        self.algorithm, self.data, self.config, self.seed = algorithm, data, config, config.seed
        check_model(model)  # memory that two tensors share comes apart when they are moved
        self.model = model.to(device)
        self.layout = layout_of(self.model, algorithm.extra)
        self.back = flatten(self.model, self.layout)
        sgd = config.client_lr, config.client_momentum, config.client_weight_decay
        self.smallest_batch, self.changed_attributes = self._rehearse(sgd)
        self.engine, self.engine_note = choose_engine(
            config.engine, self.model, data.input_shape, *sgd, self.smallest_batch
        )
        self.memory_format = memory_format_of(self.model)
        self._visits = visits_of(type(algorithm))
        self._own = type(algorithm).__module__.partition(".")[0] == "fedmpi"
        stateless = why_not(self.model) is None
        self.isolation = Isolation(self.model, self.back[self.layout.vector], stateless, self.changed_attributes)
        self._attributes = None if self._own or config.leak_check == "off" else Attributes(self.model, algorithm)
        only_w = self.layout.up == self.layout["w"].columns
        grouped = config.group_clients > 1 and not algorithm.transforms and only_w
        self.groups = self.engine.groups if grouped else None
        self._checked_round = -1
        self._names = [(name, p.numel()) for name, p in self.model.named_parameters() if p.requires_grad]

    def num_samples(self, client_ids: IntArray) -> IntArray:
        """Return the sample counts of clients."""
        return self.data.num_samples(client_ids)

    def visit(self, order: Order, client_id: int, sent: Tensor, may_defer: bool) -> Visit:
        """Visit a client; what it sends back is then in `back`, unless its step was put off."""
        version = sent._version
        k = Client(self, order, client_id, sent, may_defer and self.groups is not None)
        if not self._own:
            self.seed_global(order, client_id)
        getattr(self.algorithm, self._visits[order.visit_idx])(k)
        if not k.deferred:
            k.settle()
            for transform in self.algorithm.transforms:
                transform.encode(k)
            self.isolation.check()
        if sent._version != version:
            raise ModelError(
                f"{type(self.algorithm).__name__} writes into k.sent, which other clients read: copy it first"
            )
        return Visit(k.num_samples, math.nan if k.deferred else k.loss_value, k.reported, k.deferred)

    def step_together(self, order: Order, client_ids: Sequence[int], sent: Tensor) -> tuple[Tensor, list[float], bool]:
        """Take the one step of clients that put it off; see `core.worker.Visitor`."""
        assert self.groups is not None
        self.check_model(order.round_idx)
        indices = [self.data.partition[client_id] for client_id in client_ids]
        inputs, labels = self.data.take(np.concatenate(indices))
        weights = order.weight_rows()[0][[order.place_of(client_id) for client_id in client_ids]].tolist()
        step = self.groups.run(sent[self.layout.vector], inputs, labels, [len(part) for part in indices], weights)
        return step.update, step.losses, step.finite

    def end_order(self, order: Order, sent: Sequence[Tensor]) -> None:
        """See that the algorithm's object is what it was.

        Raises:
            ConfigError: names the attributes that visits have changed.
        """
        if self._attributes is not None:
            refuse_changes(self.algorithm, self._attributes)

    def begin(self, order: Order, client_id: int, sent: Tensor) -> None:
        """Make the model new for a client, and load what was sent."""
        seed = derive_seed(self.seed, Stream.CLIENT, order.round_idx, client_id, order.exchange_idx)
        self.isolation.begin(seed)
        if self.engine.runs_model:
            self.seed_global(order, client_id)
        self.model.train()
        self.back[: self.layout.down.stop].copy_(sent[: self.layout.down.stop])
        self.back[self.layout.down.stop :].zero_()
        if len(order.integers):
            load_integer_state(self.model, order.integers)

    def seed_global(self, order: Order, client_id: int) -> None:
        """Seed the global random generators for a client alone."""
        seed_everything(derive_seed(self.seed, Stream.CLIENT, order.round_idx, client_id, order.exchange_idx))

    def evaluate(self, client_id: int) -> Metrics:
        """Return the metrics of the model at hand on a client's own samples; its buffers stay."""
        indices = self.data.partition[client_id]

        def load(start: int, stop: int) -> tuple[Tensor, Tensor]:
            inputs, labels = self.data.take(indices[start:stop])
            return laid_out(inputs, self.memory_format), labels

        kept, integers = self.back[self.layout.vector].clone(), integer_state(self.model)
        sums = Evaluator(len(indices), load).evaluate(self.model, 0, 1)
        self.back[self.layout.vector].copy_(kept)
        load_integer_state(self.model, integers)
        return metrics_of(sums)

    def named(self, pattern: str) -> list[slice]:
        """Return the ranges of (T,) that belong to parameters of matching names.

        Raises:
            ModelError: none matches.
        """
        found, start = [], 0
        for name, size in self._names:
            if fnmatch.fnmatchcase(name, pattern):
                found.append(slice(start, start + size))
            start += size
        if not found:
            names = ", ".join(name for name, _ in self._names[:5])
            raise ModelError(f"only={pattern!r} matches no trainable parameter of the model ({names}, ...)")
        return found

    def check_model(self, round_idx: int) -> None:
        """See, once per round, that the model is still the stack for which the engine was chosen.

        Raises:
            ModelError: it is not.
        """
        if self.config.engine != "auto" or self.engine.runs_model or self._checked_round == round_idx:
            return
        reason = why_not(self.model)
        if reason is not None:
            raise ModelError(
                f"the model is not the one any more for which --engine auto chose fused: {reason}; change it in its own"
                " function, or take --engine eager"
            )
        self._checked_round = round_idx if self._own else -1

    def _rehearse(self, sgd: tuple[float, float, float]) -> tuple[int, list[str]]:
        """Return the samples that the model needs in training, and attributes that a trial step changes.

        Raises:
            ModelError: it cannot train, or a client or --batch-size gives it less.
        """
        sizes, name = self.data.partition.sizes, self.config.model
        largest = int(sizes.argmax())
        n = min(int(sizes[largest]), self.config.batch_size or _TRIAL_SIZE, _TRIAL_SIZE)
        if not n:
            return 1, []
        samples = self.data.take(self.data.partition[largest][: max(n, 2)])
        smallest, changed = rehearse(self.model, *samples, self.data.num_classes, name, sgd)
        single = np.flatnonzero(sizes == 1)
        if smallest > 1 and self.config.batch_size == 1:
            raise ModelError(f"--batch-size must be 0 or >= 2, got 1: --model {name} cannot train on one sample")
        if smallest > 1 and len(single):
            first = ", ".join(map(str, single[:5])) + (f" and {len(single) - 5} more" * (len(single) > 5))
            raise ModelError(
                f"--model {name} cannot train on one sample, and that is all that client {first} has:"
                " --min-samples 2 (with --partition dirichlet), or fewer --num-clients"
            )
        return smallest, changed


def visits_of(cls: type[Any]) -> list[str]:
    """Return the names of an algorithm's methods, sorted: the place of one in this list travels in an order."""
    names = (name for name in dir(cls) if not name.startswith("__") and name != "round")
    return sorted(name for name in names if callable(getattr(cls, name)))


def refuse_changes(algorithm: object, before: Attributes) -> None:
    """See that an algorithm's object is what it was.

    Raises:
        ConfigError: names the attributes that have changed.
    """
    names = before.changed()
    if names:
        raise ConfigError(
            f"{type(algorithm).__name__} has changed its {', '.join(map(repr, names))}: an algorithm is read-only,"
            " since every rank has its own; keep what the server needs in s.state, and send clients more by `extra`"
        )
