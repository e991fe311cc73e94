"""Local SGD by hand for stacks of Linear, Conv2d, ReLU, MaxPool2d and Flatten under cross-entropy.

Beside the matrix products a step of a small model is a few dozen calls that do next to nothing, so few calls are fast
steps: see `in_place` and `layers`. Losses are worked out once per epoch, and a ReLU in front of a pooling acts behind
it, where there is four times less to do.

Shapes: n samples of the batch, C classes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from fedmpi.engines.groups import group_engine
from fedmpi.engines.in_place import InPlaceSgd
from fedmpi.engines.layers import Conv2d, Layer, Linear, by_hand
from fedmpi.engines.proof import leaves_of

_KEPT_BATCH_SIZES = 2
"""Batch sizes whose buffers are kept: the full one, and what was left over at a client's end."""


class Stack(Protocol):
    """A model's layers and their steps, for batches of one size."""

    def step(self, x: Tensor, targets: Tensor) -> Tensor:
        """Take one step; return (n, C) log-probabilities before it. `targets`: (n, C) rows of an identity, by label."""


class _Stack:
    """The layers, with the buffers for batches of one size."""

    def __init__(self, leaves: Sequence[nn.Module], sgd: InPlaceSgd, n: int) -> None:
        self._layers: list[Layer] = []
        for layer in leaves:
            self._layers.append(by_hand(layer, sgd, n, after=self._layers[-1] if self._layers else None))
        first = next(i for i, layer in enumerate(self._layers) if isinstance(layer, Linear | Conv2d))
        self._way_back = [(layer, i == first) for i, layer in enumerate(self._layers)][first:][::-1]
        self._dy: Tensor | None = None
        self._sgd, self._n = sgd, n

    def step(self, x: Tensor, targets: Tensor) -> Tensor:
        """See `Stack`."""
        self._sgd.set_batch(self._n)
        for layer in self._layers:
            x = layer.forward(x)
        log_p = torch.log_softmax(x, 1)
        if self._dy is None:
            self._dy = torch.empty_like(log_p)
        dy = torch.exp(log_p, out=self._dy).sub_(targets)
        for layer, first in self._way_back:
            dy = layer.backward(dy, first)
        return log_p


class FusedEngine(InPlaceSgd):
    """SGD with momentum and weight decay for a stack; equals `EagerEngine` up to the rounding of float32."""

    runs_model = False

    def __init__(self, model: nn.Module, lr: float, momentum: float, weight_decay: float) -> None:
        """Over a flattened model for which `why_not` returns None, or for which a trial has shown that it fits."""
        super().__init__(model, lr, momentum, weight_decay)
        leaves = _pool_first(leaves_of(model))
        self.groups = group_engine(leaves, lr, weight_decay)
        self._flat = isinstance(leaves[0], nn.Flatten)  # then the whole epoch's inputs are, at once
        self._leaves = leaves[self._flat :]
        self._identity: Tensor | None = None
        self._stacks = functools.lru_cache(_KEPT_BATCH_SIZES)(self._new_stack)

    @torch.no_grad()
    def epoch(self, inputs: Tensor, labels: Tensor, batch_size: int) -> Tensor:
        """See `Engine`."""
        x, y = inputs.flatten(1) if self._flat else inputs, labels.unsqueeze(1)
        if self._identity is None:
            self._identity = torch.eye(self._num_classes(x), dtype=x.dtype, device=x.device)
        targets = self._identity.index_select(0, labels)  # scatter would wait for the GPU, or sort there
        log_p = []
        for batch, rows in zip(torch.split(x, batch_size), torch.split(targets, batch_size), strict=True):
            log_p.append(self._take(functools.partial(self._stack_of(len(batch)).step, batch, rows)))
        losses = torch.cat(log_p).gather(1, y).neg_()
        full = len(y) - len(y) % batch_size
        means = losses[:full].view(-1, batch_size).mean(1)
        return torch.cat([means, losses[full:].mean(0)]) if full < len(y) else means

    def _num_classes(self, inputs: Tensor) -> int:
        return nn.Sequential(*self._leaves)(inputs[:1]).shape[1]  # type: ignore[no-any-return]  # any module may be there

    def _stack_of(self, n: int) -> Stack:
        return self._stacks(n)

    def _new_stack(self, n: int) -> Stack:
        return _Stack(self._leaves, self, n)


def _pool_first(leaves: Sequence[nn.Module]) -> list[nn.Module]:
    """Swap ReLU and pooling: max(relu(x)) = relu(max(x)), and where they pick other entries the gradient is 0."""
    layers = list(leaves)
    for i in range(len(layers) - 1):
        if isinstance(layers[i], nn.ReLU) and isinstance(layers[i + 1], nn.MaxPool2d):
            layers[i], layers[i + 1] = layers[i + 1], layers[i]
    return layers
