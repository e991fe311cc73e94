"""State that the server of an algorithm keeps from round to round, and from job to job."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmpi.errors import ConfigError

_DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64,
)  # fmt: skip


class ServerState(dict[str, Any]):
    """Tensors, numbers, text, and lists and dicts of these, by name.

    It is in every checkpoint, and comes back from it as it was.
    """

    def check(self) -> None:
        """See that a checkpoint gives back all of it as it is.

        Raises:
            ConfigError: names what it would not.
        """
        for name, value in self.items():
            _check(value, f"s.state[{name!r}]")


def _check(value: Any, where: str) -> None:
    if isinstance(value, Tensor) and value.dtype in _DTYPES:
        return
    if type(value) is list:
        for i, item in enumerate(value):
            _check(item, f"{where}[{i}]")
    elif type(value) is dict and set(value) != {"array"} and all(isinstance(key, str) for key in value):
        for key, item in value.items():
            _check(item, f"{where}[{key!r}]")
    elif value is not None and type(value) not in (bool, int, float, str):
        found = f"{type(value).__name__} of {value.dtype}" if hasattr(value, "dtype") else type(value).__name__
        raise ConfigError(
            f"{where} is a {found}, which a checkpoint does not give back: keep tensors, numbers, text, and lists and"
            " dicts with text keys of these"
        )


def as_tensor(values: Any) -> Tensor:
    """Return an array or a tensor as a tensor."""
    return torch.from_numpy(values) if isinstance(values, np.ndarray) else torch.as_tensor(values)
