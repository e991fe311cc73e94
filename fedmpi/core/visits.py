"""A client's visit to a trainer: nothing of the clients before it is left, as far as attributes show.

Shapes: P vector entries, B integer state entries of the model.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmpi.core.attributes import Attributes
from fedmpi.core.messages import Order
from fedmpi.core.seeding import Stream, derive_seed, seed_everything
from fedmpi.core.trainer import ClientTrainer
from fedmpi.core.vector import load_integer_state
from fedmpi.core.views import check_views
from fedmpi.errors import ConfigError

logger = logging.getLogger(__name__)


def put_back_note(names: Sequence[str]) -> str:
    """The sentence that tells a user which attributes of his model do not last."""
    return f"model: training changes {', '.join(map(repr, names))}, put back before each client (a buffer would travel)"


class Visits:
    """Trains and evaluates on one model object as if it were new each time.

    Attributes:
        trainer: whose visits these are.
    """

    def __init__(self, trainer: ClientTrainer) -> None:
        """Remember the model's attributes as they are before the first visit."""
        self.trainer = trainer
        self._attributes = None if trainer.stateless_model else Attributes(trainer.model)
        self._base = next(cls for cls in type(trainer).__mro__ if cls.__module__.startswith("fedmpi."))
        self._told = set(trainer.changed_attributes)
        self._takes_epochs = "epochs" in inspect.signature(trainer.train).parameters

    def train(
        self, round_idx: int, client_id: int, vector: Tensor, state: NDArray[np.int64], epochs: int | None = None
    ) -> Tensor:
        """Train one client.

        Args:
            round_idx: the round.
            client_id: the client.
            vector: (P,) float32, what the server sent.
            state: (B,) the model's integer buffers, from the server.
            epochs: passes over its data; None: the trainer's own number.

        Returns:
            (P,) the trained vector, the trainer's own memory.

        Raises:
            ModelError: the forward has replaced a tensor of the model.
        """
        trainer = self.trainer
        if self._attributes is not None:
            self._tell(self._attributes.changed())
            self._attributes.put_back(derive_seed(trainer.seed, Stream.CLIENT, round_idx, client_id))
        if self._base is not type(trainer):  # a user's own class, which may leave out what ours does
            self._base.begin_client(trainer, round_idx, client_id)  # type: ignore[attr-defined]  # a ClientTrainer
            trainer.model_parameters.copy_(vector)
            vector = vector.clone()  # which it may write into
            for param in trainer.model.parameters():
                param.grad = None
        trainer.begin_client(round_idx, client_id)
        if len(state):
            load_integer_state(trainer.model, state)
        if epochs is not None and self._takes_epochs:
            trainer.train(vector, epochs=epochs)
        else:
            trainer.train(vector)
        if not trainer.stateless_model:
            check_views(trainer.model, trainer.model_parameters)
        return trainer.model_parameters.detach()

    def _tell(self, names: list[str]) -> None:
        new = [name for name in names if name not in self._told]
        if new:
            logger.warning("%s", put_back_note(new))
            self._told.update(new)

    def renewal(self, round_idx: int, vector: Tensor, state: NDArray[np.int64]) -> Callable[[int], None] | None:
        """Load a model to be evaluated; what makes it new again before each chunk of the test set, if need be.

        Args:
            round_idx: the round.
            vector: (P,) float32, the model.
            state: (B,) its integer buffers.
        """
        trainer, attributes = self.trainer, self._attributes

        def load() -> None:
            trainer.model_parameters.copy_(vector)
            load_integer_state(trainer.model, state)

        load()
        if attributes is None:
            return None

        def renew(chunk: int) -> None:
            seed = derive_seed(trainer.seed, Stream.EVALUATION, round_idx, chunk)
            attributes.put_back(seed)
            seed_everything(seed)
            load()

        return renew


class LeakCheck:
    """A trial of a trainer that keeps something in its attributes: does it reach the next client?"""

    def __init__(self, visits: Visits) -> None:
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
            visit = (order.round_idx + later, client_id, start, order.integer_state)
            return self._visits.train(*visit, epochs=1).clone()

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
