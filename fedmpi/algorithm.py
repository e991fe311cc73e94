"""The interface of an algorithm: a class with the server's round and the client's visit, as in its paper.

    class FedAvg(Algorithm[RunConfig]):
        def round(self, s):
            mean = s.mean(s.sample(self.config.clients_per_round), self.client_update)
            s.step("w", mean.w, self.config.server_lr)
            s.step("b", mean.b)

        def client_update(self, k):
            k.sgd()

`s` is a `Server`, `k` a `Client`; nothing else needs to be known. An algorithm object is read-only once it is made:
there is one on every rank, and what one of them noted the others would not know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch

from fedmpi.config import RunConfig
from fedmpi.core.segments import Extra, Segments
from fedmpi.engines.steps import Steps
from fedmpi.errors import ConfigError
from fedmpi.halves.client import Batch, Client
from fedmpi.halves.server import Result, Server
from fedmpi.halves.server_state import ServerState

__all__ = ["Algorithm", "Batch", "Client", "Clip", "Result", "Segments", "Server", "ServerState", "Steps", "Transform"]

C = TypeVar("C", bound=RunConfig)


class Transform:
    """A change of what a client sends, undone or completed on the server."""

    def encode(self, k: Client) -> None:
        """Change `k.back` in place, after the visit."""

    def decode(self, s: Server, result: Result) -> None:
        """Change in place what the server has made of all updates."""


class Clip(Transform):
    """Scales a client's update of `w` down to a largest length.

    Source: Geyer et al., "Differentially private federated learning", 2017, arXiv 1712.07557, algorithm 1.
    """

    def __init__(self, largest: float) -> None:
        """`largest`: Euclidean length, > 0."""
        if not largest > 0:
            raise ConfigError(f"a clip's largest length must be > 0, got {largest}")
        self.largest = largest

    def encode(self, k: Client) -> None:
        """Write w <- sent + update x min(1, largest / |update|), in float64, rounded once."""
        sent = k.sent.w.to(torch.float64)
        update = k.back.w.to(torch.float64).sub_(sent)
        length = float(torch.linalg.vector_norm(update))
        if length > self.largest:
            k.back.w.copy_(sent.add_(update, alpha=self.largest / length))


class Algorithm(Generic[C]):
    """A federated algorithm; every rank makes an object of it, a lone rank two.

    Attributes:
        Config: its options, a `RunConfig` or a class derived from it.
        extra: further segments that travel with the model: name -> (entries or "T", "down", "up" or "both").
        transforms: applied in this order to what a client sends, in reverse on the server.
        config: the options of this job.
    """

    Config: type[Any] = RunConfig
    extra: Extra = MappingProxyType({})
    transforms: Sequence[Transform] = ()
    config: C

    def __init__(self, config: C) -> None:
        """An author's own `__init__` calls this one; it may set attributes, nothing else may."""
        self.config = config

    def round(self, s: Server) -> None:
        """Run one round on the server: what the paper's "server executes" says."""
        raise NotImplementedError(f"{type(self).__name__} must define round(self, s)")

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse to change an algorithm that is in use.

        Raises:
            ConfigError: names what to use instead.
        """
        if self.__dict__.get("_sealed"):
            raise ConfigError(
                f"{type(self).__name__}.{name} cannot be set: an algorithm is read-only, since every rank has its own;"
                " keep what the server needs in s.state, and send clients more by `extra`"
            )
        object.__setattr__(self, name, value)


def make(cls: Callable[[C], Algorithm[C]], config: C) -> Algorithm[C]:
    """Return an algorithm object, read-only from now on."""
    algorithm = cls(config)
    object.__setattr__(algorithm, "_sealed", True)
    return algorithm
