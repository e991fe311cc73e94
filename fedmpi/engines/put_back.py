"""Restoring of a model after a trial: its values, its plain attributes and the global random generators."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedmpi.core.attributes import Attributes


@contextlib.contextmanager
def put_back(model: nn.Module) -> Iterator[Attributes]:
    """Put the model, and the global random generators, back after a trial.

    Nothing is deep-copied: that fails for pruned models, and for those that keep an activation.

    Yields:
        The model's attributes before the trial.
    """
    attributes = Attributes(model)
    undo: list[Callable[[], object]] = [_undo_tensor(tensor) for tensor in (*model.parameters(), *model.buffers())]
    for module in model.modules():
        undo.append(_undo_training(module))
        undo += [_undo_dict(value) for value in vars(module).values() if isinstance(value, dict)]
    undo += _generators()
    try:
        yield attributes
    finally:
        attributes.put_back()
        for action in undo:
            action()


def _undo_training(module: nn.Module) -> Callable[[], object]:
    training = module.training
    return lambda: setattr(module, "training", training)


def _undo_tensor(tensor: Tensor) -> Callable[[], object]:
    value, data = tensor.detach().clone(), tensor.detach()

    def undo() -> None:
        if tensor.data_ptr() != data.data_ptr():
            tensor.data = data
        if not torch.equal(data, value):
            data.copy_(value)

    return undo


def _undo_dict(value: dict[Any, Any]) -> Callable[[], object]:
    items = dict(value)

    def undo() -> None:
        if list(value) != list(items) or any(value[key] is not item for key, item in items.items()):
            value.clear()
            value.update(items)

    return undo


def _generators() -> list[Callable[[], object]]:
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    undo: list[Callable[[], object]] = [
        lambda: random.setstate(python),
        lambda: np.random.set_state(legacy),  # noqa: NPY002  # what a user's code may draw from
        lambda: torch.set_rng_state(cpu),
    ]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        cuda = torch.cuda.get_rng_state()
        undo.append(lambda: torch.cuda.set_rng_state(cuda))
    return undo
