"""Visits by a `ClientTrainer`: nothing of the clients before it is left, as far as attributes show.

Shapes: P vector entries, B integer buffer entries of the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedmpi.core.attributes import Attributes
from fedmpi.core.isolation import Isolation
from fedmpi.core.order import IntArray, Order
from fedmpi.core.seeding import Stream, derive_seed
from fedmpi.core.vector import layout_of, load_integer_state
from fedmpi.core.worker import Visit
from fedmpi.errors import ConfigError
from fedmpi.fedlab.trainer import ClientTrainer


class TrainerVisitor:
    """Visits clients with a trainer's `begin_client` and `train`; see `core.worker.Visitor`."""

    def __init__(self, trainer: ClientTrainer, leak_check: bool = True) -> None:
        """Over a trainer; with `leak_check` what it keeps is tried for whether it reaches other clients."""
        self.trainer, self.model, self.layout = trainer, trainer.model, layout_of(trainer.model)
        self.back = trainer.model_parameters.detach()
        self.isolation = Isolation(trainer.model, trainer.model_parameters, stateless=False)
        self._base = next(cls for cls in type(trainer).__mro__ if cls.__module__.startswith("fedmpi."))
        self._takes_epochs = "epochs" in inspect.signature(trainer.train).parameters
        self._leak_check = LeakCheck(self) if leak_check and not trainer.single_client else None

    @property
    def seed(self) -> int:
        """The run's seed, which is the trainer's."""
        return self.trainer.seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self.trainer.seed = seed

    def each_has_a_rank(self) -> None:
        """Each client has a rank of its own, so nothing can reach another."""
        self._leak_check = None

    def visit(self, order: Order, client_id: int, sent: Tensor, may_defer: bool) -> Visit:
        """Train a client."""
        (num_samples,) = self.trainer.num_samples(np.array([client_id])).tolist()
        self.train(order.round_idx, client_id, sent, order.integers)
        return Visit(num_samples, self.trainer.loss)

    def step_together(self, order: Order, client_ids: Sequence[int], sent: Tensor) -> tuple[Tensor, list[float], bool]:
        """Never called: no visit is deferred."""
        raise AssertionError("a trainer's step is not put off")

    def end_order(self, order: Order, sent: Sequence[Tensor]) -> None:
        """Try what the trainer keeps, after its first visits."""
        if self._leak_check is not None and len(order.cohort):
            self._leak_check.after_visit(order, sent[0])

    def train(
        self, round_idx: int, client_id: int, vector: Tensor, integers: IntArray, epochs: int | None = None
    ) -> None:
        """Train one client; the result is in the trainer's `model_parameters`.

        Args:
            round_idx: the round.
            client_id: the client.
            vector: (P,) float32, what the server sent.
            integers: (B,) the model's integer buffers, from the server.
            epochs: passes over its data; None: the trainer's own number.

        Raises:
            ModelError: the forward has replaced a tensor of the model.
        """
        trainer = self.trainer
        self.isolation.begin(derive_seed(trainer.seed, Stream.CLIENT, round_idx, client_id))
        if self._base is not type(trainer):  # a user's own class, which may leave out what ours does
            self._base.begin_client(trainer, round_idx, client_id)  # type: ignore[attr-defined]  # a ClientTrainer
            trainer.model_parameters.copy_(vector)
            vector = vector.clone()  # which it may write into
            for param in trainer.model.parameters():
                param.grad = None
        trainer.begin_client(round_idx, client_id)
        if len(integers):
            load_integer_state(trainer.model, integers)
        if epochs is not None and self._takes_epochs:
            trainer.train(vector, epochs=epochs)
        else:
            trainer.train(vector)
        self.isolation.check()


class LeakCheck:
    """A trial of a trainer that keeps something in its attributes: does it reach the next client?"""

    def __init__(self, visits: TrainerVisitor) -> None:
        """Remember the trainer's own attributes as they are before the first visit."""
        self._visits = visits
        self._before = self._attributes()
        self._tried: set[str] = set()

    def _attributes(self) -> Attributes:
        trainer = self._visits.trainer
        return Attributes(trainer.model, trainer, trainer.own_fields)

    def after_visit(self, order: Order, vector: Tensor) -> None:
        """If further attributes have changed, train the smallest client of the cohort twice, others in between.

        Those start from another vector and in another round, so that what is kept of them is not what comes again.

        Args:
            order: of the round at hand.
            vector: (P,) float32, what the server sent.

        Raises:
            ConfigError: the client came to other bits; names the attributes.
        """
        names = [name for name in self._before.changed() if name not in self._tried]
        if not names:
            return
        self._tried.update(names)
        trainer, after = self._visits.trainer, self._attributes()
        sizes = np.asarray(trainer.num_samples(order.cohort))
        small = int(order.cohort[np.argmin(np.where(sizes > 0, sizes, np.iinfo(np.int64).max))])
        other = next((k for k in order.cohort.tolist() if k != small), small + 1 if small == 0 else small - 1)
        elsewhere = vector * 1.01 + 0.01

        def train(client_id: int, start: Tensor, later: int) -> Tensor:
            self._visits.train(order.round_idx + later, client_id, start, order.integers, epochs=1)
            return trainer.model_parameters.detach().clone()

        self._before.put_back()
        first = train(small, vector, 0)
        train(other, elsewhere, 1)
        train(small, elsewhere, 1)
        second = train(small, vector, 0)
        after.put_back()
        if not torch.equal(first.view(torch.int32), second.view(torch.int32)):
            raise ConfigError(
                f"{type(trainer).__name__} keeps {', '.join(map(repr, names))} from client to client: client {small}"
                f" trained after client {other} comes to another model than before it. Make it afresh in begin_client;"
                " or give each client a rank of its own; or --leak-check off, if that is meant"
            )
