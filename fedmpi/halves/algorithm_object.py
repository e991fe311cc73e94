"""The algorithm object that each half has of its own: its visits by name, and the proof that nobody has changed it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from fedmpi.config import RunConfig
from fedmpi.core.attributes import Attributes
from fedmpi.core.segments import Extra
from fedmpi.errors import ConfigError


class AnyAlgorithm(Protocol):
    """An `Algorithm`, as both of its halves use it."""

    extra: Extra
    transforms: Sequence[Any]

    def round(self, s: Any) -> None:
        """Run one round on the server."""


def is_own(algorithm: AnyAlgorithm) -> bool:
    """Return True for an algorithm that comes with fedmpi."""
    return type(algorithm).__module__.partition(".")[0] == "fedmpi"


def visits_of(cls: type[Any]) -> list[str]:
    """Return the names of an algorithm's methods, sorted: the place of one in this list travels in an order."""
    names = (name for name in dir(cls) if not name.startswith("__") and name != "round")
    return sorted(name for name in names if callable(getattr(cls, name)))


class ReadOnlyCheck:
    """Finds an algorithm object that has changed itself; those that come with fedmpi do not."""

    def __init__(self, algorithm: AnyAlgorithm, model: nn.Module, config: RunConfig) -> None:
        """Remember the attributes of `algorithm` as they are now, unless --leak-check is off."""
        self._algorithm = algorithm
        self._before = None if is_own(algorithm) or config.leak_check == "off" else Attributes(model, algorithm)

    def check(self) -> None:
        """See that the object is what it was.

        Raises:
            ConfigError: names the attributes that have changed.
        """
        names = self._before.changed() if self._before is not None else []
        if names:
            raise ConfigError(
                f"{type(self._algorithm).__name__} has changed its {', '.join(map(repr, names))}: an algorithm is"
                " read-only, since every rank has its own; keep what the server needs in s.state, and send clients more"
                " by `extra`"
            )
