"""The server half: the global model, who takes part, and what becomes of the updates.

Shapes: P vector entries, K cohort, N clients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmpi.core import cohort as cohorts
from fedmpi.core.evaluate import Metrics
from fedmpi.core.exactsum import ExactSum, integer_weights
from fedmpi.core.seeding import Stream, derive_seed
from fedmpi.core.vector import flatten, integer_state, load_integer_state
from fedmpi.errors import ConfigError


class ParameterServerBackendHandler(ABC):
    """Holds the global model on the server rank, on CPU.

    Attributes:
        model: the module; its trainable parameters and float buffers are views into one vector.
    """

    def __init__(self, model: nn.Module) -> None:
        """Takes over `model`.

        Raises:
            ModelError: the model has entries that are not float32.
        """
        self.model = model
        self._vector = flatten(model)

    @property
    def model_parameters(self) -> Tensor:
        """(P,) float32, the global model itself and not a copy: writing to it changes the model."""
        return self._vector

    @abstractmethod
    def update_model(self, model_parameters_list: list[Tensor]) -> None:
        """Change the global model, given the cohort's (P,) vectors in the order of their client ids."""

    @abstractmethod
    def stop_condition(self) -> bool:
        """Return True when training is finished."""


class SyncParameterServerHandler(ParameterServerBackendHandler):
    """Synchronous rounds: sample a cohort, wait for all of it, step.

    What to override, from the least to the most: `step` (uses only the weighted mean update, which arrives as one exact
    sum), `aggregate` (any rule that works column by column; rows arrive in blocks, so memory stays bounded), and
    `update_model` (sees whole vectors; the server then holds the cohort's K x P at once). An override of one of the
    latter two makes rows travel instead of the sum. Whatever they do, float buffers (BatchNorm statistics) end the
    round as the weighted mean of the cohort's.

    Attributes:
        round_idx: rounds finished so far.
        cohort: (K,) the client ids of the round at hand, ascending.
        weights: (K,) their weights in the mean: the sample counts, unless `sample_clients` sets others (any numbers
            >= 0, in the order of the ids it returns).
        client_sizes: (N,) sample counts of all clients, set before the first round.
        metrics: the last evaluation of the global model, None before the first.
        own_fields: names of the attributes that fedmpi itself keeps, or makes anew in each round.
    """

    own_fields: ClassVar[frozenset[str]] = frozenset(
        {"model", "_vector", "round_idx", "cohort", "weights", "_counts", "client_sizes", "metrics"}
    )

    def __init__(
        self,
        model: nn.Module,
        num_clients: int,
        sample_ratio: float = 1.0,
        *,
        cohort_size: int | None = None,
        rounds: int = 1,
        target_accuracy: float | None = None,
        server_lr: float = 1.0,
        seed: int = 0,
    ) -> None:
        """A server over `num_clients` clients.

        Args:
            model: the initial global model.
            num_clients: N.
            sample_ratio: share of the clients in each round, in (0, 1], to the nearest count, at least one.
            cohort_size: K, instead of `sample_ratio`.
            rounds: rounds until `stop_condition` holds.
            target_accuracy: test accuracy that makes `stop_condition` hold earlier.
            server_lr: step along the mean update; 1 is FedAvg.
            seed: of the cohorts.
        """
        super().__init__(model)
        size = cohorts.cohort_size(num_clients, sample_ratio) if cohort_size is None else cohort_size
        if not 1 <= size <= num_clients:
            raise ConfigError(f"a cohort has 1 to {num_clients} clients (num_clients), got {size}")
        self.num_clients = num_clients
        self.cohort_size = size
        self.rounds = rounds
        self.target_accuracy = target_accuracy
        self.server_lr = server_lr
        self.seed = seed
        self.round_idx = 0
        self.cohort: NDArray[np.int64] = np.empty(0, np.int64)
        self.weights: NDArray[Any] = np.empty(0, np.int64)
        self._counts: NDArray[Any] = self.weights  # the weights, while nobody has set others
        self.client_sizes: NDArray[np.int64] = np.empty(0, np.int64)
        self.metrics: Metrics | None = None

    def begin_round(self) -> NDArray[np.int64]:
        """Sample the cohort of this round and see that it is one; sorts `cohort` and `weights` by client id.

        Returns:
            (K,) the weights as the integers that travel; K may be 0.

        Raises:
            ConfigError: `sample_clients` returned ids that are no clients, or one of them twice, or the weights are
                not one number >= 0 for each.
        """
        if self.weights is self._counts:
            self.weights = np.empty(0, np.int64)  # those of the round before
        rule = "sample_clients must return client ids"
        cohort, order = cohorts.checked_cohort(self.sample_clients(), self.num_clients, rule)
        weights: Any = self.weights
        if isinstance(weights, Tensor):
            weights = weights.detach().cpu().numpy()
        if not hasattr(weights, "__len__"):
            raise ConfigError(f"weights must be one number per client of the cohort, got a {type(weights).__name__}")
        untouched = weights is self._counts and np.array_equal(weights, self.client_sizes[self.cohort])
        by_default = untouched or not len(weights)
        if by_default:
            weights = self.client_sizes[cohort][np.argsort(order)]
        if len(weights) != len(cohort):
            raise ConfigError(f"weights must be one number for each of {len(cohort)} clients, got {len(weights)}")
        travel = integer_weights(weights)[order]
        self.cohort, self.weights = cohort, np.asarray(weights)[order]
        if by_default:
            self._counts = self.weights
        return travel

    def sample_clients(self) -> NDArray[np.int64]:
        """(K,) distinct client ids, ascending; uniform, and the same for a (seed, round) whatever else differs."""
        seed = derive_seed(self.seed, Stream.COHORT, self.round_idx)
        self.cohort = cohorts.sample_cohort(seed, self.num_clients, self.cohort_size)
        self.weights = self._counts = self.client_sizes[self.cohort]
        return self.cohort

    def stop_condition(self) -> bool:
        """Return True once `rounds` rounds are done, or the last evaluation reached `target_accuracy`."""
        if self.round_idx >= self.rounds:
            return True
        return (
            self.target_accuracy is not None
            and self.metrics is not None
            and (self.metrics.accuracy >= self.target_accuracy)
        )

    def step(self, mean_update: Tensor) -> None:
        """The server step: w += server_lr x mean update, computed in float64.

        Args:
            mean_update: (P,) float64, the weighted mean of w_k - w.

        Source: McMahan et al., AISTATS 2017, arXiv 1602.05629, algorithm 1; with server_lr: Reddi et al., arXiv
        2003.00295, algorithm 1.
        """
        self._vector.copy_(self._vector.to(torch.float64).add_(mean_update, alpha=self.server_lr))

    def aggregate(self, rows: Tensor, reference: Tensor) -> Tensor:
        """The new values of a block of columns.

        Args:
            rows: (K, B) float32, the cohort's values, in the order of their client ids; `self.weights` goes with it.
            reference: (B,) float32, the global model's values.

        Returns:
            (B,) float32.
        """
        raise NotImplementedError("override aggregate, or let the exact sum arrive")

    def update_model(self, model_parameters_list: list[Tensor]) -> None:
        """FedAvg over whole vectors: the same bits as the exact sum that travels by itself."""
        weights = integer_weights(self.weights)
        exact = ExactSum(self._vector, int(weights.sum()), int(weights.max(initial=0)))
        for vector, weight in zip(model_parameters_list, weights.tolist(), strict=True):
            exact.add(vector, weight)
        self.step(exact.mean())

    def needs(self) -> Literal["sum", "blocks", "rows"]:
        """Return what has to arrive from the clients: their weighted sum, blocks of columns, or whole vectors."""
        cls = type(self)
        if cls.update_model is not SyncParameterServerHandler.update_model:
            return "rows"
        if cls.aggregate is not SyncParameterServerHandler.aggregate:
            return "blocks"
        return "sum"

    def integer_state(self) -> NDArray[np.int64]:
        """(B,) the global model's integer buffers."""
        return integer_state(self.model)

    def update_integer_state(self, states: list[NDArray[np.int64]]) -> None:
        """Keep, entry by entry, the largest value that a client of the cohort came to."""
        if states and len(states[0]):
            load_integer_state(self.model, np.max(np.stack(states), 0))
