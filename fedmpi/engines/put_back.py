"""A model as it was before a trial: values, attributes and random generators are put back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from fedmpi.core.attributes import Attributes


@contextlib.contextmanager
def put_back(model: nn.Module) -> Iterator[Attributes]:
    """Around a trial: afterwards the model, and the global random generators, are as before.

    Nothing is deep-copied: that fails for models that keep an activation, and for pruned ones.

    Yields:
        The model's attributes as they were.
    """
    attributes = Attributes(model)
    modes = [(module, module.training) for module in model.modules()]
    registries: list[dict[str, Any]] = [
        registry for module in model.modules() for registry in (module._parameters, module._buffers, module._modules)
    ]
    parts = [(registry, dict(registry)) for registry in registries]
    values = [(each, each.data, each.detach().clone()) for each in (*model.parameters(), *model.buffers())]
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]  # torch leaves it untyped
    try:
        yield attributes
    finally:
        attributes.put_back()
        for module, mode in modes:
            module.training = mode
        for registry, before in parts:
            registry.clear()
            registry.update(before)
        for tensor, data, value in values:
            if tensor.data_ptr() != data.data_ptr():
                tensor.data = data
            data.copy_(value)
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002  # the global generator that a user's code may draw from
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
