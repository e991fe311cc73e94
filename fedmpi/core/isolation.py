"""One model object for many clients, as if it were new for each: nothing of the one before is left.

Shapes: V entries of a flat vector, B integer buffer entries.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fedmpi.core.attributes import Attributes
from fedmpi.core.order import IntArray
from fedmpi.core.seeding import seed_everything
from fedmpi.core.vector import load_integer_state
from fedmpi.core.views import check_views

logger = logging.getLogger(__name__)


def put_back_note(names: Sequence[str]) -> str:
    """Return the sentence that tells a user which attributes of his model do not last."""
    return f"model: training changes {', '.join(map(repr, names))}, put back before each client (a buffer would travel)"


class Isolation:
    """Keeps a model's attributes, tensors and random numbers apart from visit to visit."""

    def __init__(self, model: nn.Module, vector: Tensor, stateless: bool, told: Sequence[str] = ()) -> None:
        """Remember the model's attributes as they are before the first visit.

        Args:
            model: the flattened module.
            vector: (P,) its entries.
            stateless: True if its forward is known to keep nothing from one call to the next.
            told: names of attributes that the user knows to change.
        """
        self._model, self._vector = model, vector
        self._attributes = None if stateless else Attributes(model)
        self._told = set(told)

    def begin(self, seed: int) -> None:
        """Make the model's attributes what they were, random generators among them seeded; names those that changed."""
        if self._attributes is None:
            return
        new = [name for name in self._attributes.changed() if name not in self._told]
        if new:
            logger.warning("%s", put_back_note(new))
            self._told.update(new)
        self._attributes.put_back(seed)

    def check(self) -> None:
        """See that the forward has written to the model's tensors and replaced none.

        Raises:
            ModelError: names the tensor.
        """
        if self._attributes is not None:
            check_views(self._model, self._vector)

    def renewal(
        self, vector: Tensor, integers: IntArray, seed_of: Callable[[int], int]
    ) -> Callable[[int], None] | None:
        """Load a model to be evaluated; return what makes it new again before each chunk of the test set, if need be.

        Args:
            vector: (P,) float32, the model.
            integers: (B,) its integer buffers.
            seed_of: a chunk's number -> seed of the global random generators.
        """

        def load() -> None:
            self._vector.copy_(vector)
            load_integer_state(self._model, integers)

        load()
        attributes = self._attributes
        if attributes is None:
            return None

        def renew(chunk: int) -> None:
            attributes.put_back(seed_of(chunk))
            seed_everything(seed_of(chunk))
            load()

        return renew
