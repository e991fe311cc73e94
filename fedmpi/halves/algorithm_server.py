"""The server's half of an algorithm over the rounds of a run, and what a checkpoint keeps of it.

Shapes: V entries of a flat vector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from fedmpi.config import RunConfig
from fedmpi.core.coordinator import Coordinator
from fedmpi.core.evaluate import Metrics
from fedmpi.core.order import IntArray
from fedmpi.core.vector import flatten, integer_state, layout_of, load_integer_state
from fedmpi.errors import CheckpointError
from fedmpi.halves.algorithm_object import AnyAlgorithm, ReadOnlyCheck
from fedmpi.halves.server import Server
from fedmpi.halves.server_state import ServerState


class AlgorithmServer:
    """The server's half of an algorithm over the rounds of a run; see `core.server_loop.ServerHalf`."""

    def __init__(self, algorithm: AnyAlgorithm, model: nn.Module, config: RunConfig) -> None:
        """Take over `model`, the initial global model."""
        self.algorithm, self.model, self.config, self.seed = algorithm, model, config, config.seed
        self.layout = layout_of(model, algorithm.extra)
        self.flat = flatten(model, self.layout)
        self.state = ServerState()
        self.round_idx = 0
        self.metrics: Metrics | None = None
        self.reported: Mapping[str, float] = {}
        self.coordinator: Coordinator | None = None
        self._read_only = ReadOnlyCheck(algorithm, model, config)

    def play_round(self) -> None:
        """Collective, as the server. Run the algorithm's round."""
        assert self.coordinator is not None
        self.reported = {}
        self.algorithm.round(Server(self, self.coordinator))
        self.check_algorithm()

    def check_algorithm(self) -> None:
        """See that the algorithm's object is what it was: before visits, which find another rank's.

        Raises:
            ConfigError: names the attributes that have changed.
        """
        self._read_only.check()
        self.state.check()

    def finished(self) -> bool:
        """Return True once --rounds are done, or the last evaluation reached --target-accuracy."""
        target = self.config.target_accuracy
        reached = target is not None and self.metrics is not None and self.metrics.accuracy >= target
        return self.round_idx >= self.config.rounds or reached

    def integer_state(self) -> IntArray:
        """Return the global model's integer buffers."""
        return integer_state(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the server's half; nothing is copied."""
        return {
            "round_idx": self.round_idx,
            "vector": self.flat,
            "integers": self.integer_state(),
            "metrics": dataclasses.astuple(self.metrics) if self.metrics else None,
            "state": dict(self.state),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            CheckpointError: it is of another model.
        """
        vector = state["vector"]
        if vector.shape != self.flat.shape or len(state["integers"]) != len(self.integer_state()):
            raise CheckpointError(
                f"the checkpoint holds {len(vector):,} vector entries, this model has {len(self.flat):,}"
            )
        self.round_idx = int(state["round_idx"])
        self.flat.copy_(vector)
        load_integer_state(self.model, np.asarray(state["integers"]))
        self.metrics = Metrics(*state["metrics"]) if state["metrics"] else None
        self.state.clear()
        self.state.update(state["state"])
