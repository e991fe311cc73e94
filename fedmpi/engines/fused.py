"""Local SGD by hand for stacks of Linear, Conv2d, ReLU, MaxPool2d and Flatten under cross-entropy.

Beside the matrix products a step of a small model is a few dozen calls that each do next to nothing, so what counts is
how few they are. A Linear's weight is updated inside the very product that forms its gradient (`addmm_` with
alpha = -lr / n), results go to buffers that stay, losses are worked out once an epoch, and a ReLU in front of a pooling
acts behind it, where there is four times less to do.

Gradients here are sums over the batch; the step divides by n.

Shapes: n samples of the batch, C classes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from fedmpi.core.memory_format import needs_plain_layout
from fedmpi.engines.proof import leaves_of
from fedmpi.engines.single_step import SingleStepEngine, single_step_engine
from fedmpi.lifecycle import progress

_aten = torch.ops.aten

_CACHED = 2**18
"""Entries of a weight that a core's cache holds beside the rest."""

_MANY_CHANNELS = 8
"""From so many input channels on, a convolution on CPU is faster in the plain layout, the turning there and back
included; below, and for pooling, channels last is."""

_KEPT_BATCH_SIZES = 2
"""Batch sizes whose buffers are kept: the full one, and what was left over at a client's end."""


class _Sgd:
    """w <- w - lr (m v + g / n + d w): `torch.optim.SGD`, with g given or as a product not yet formed."""

    def __init__(self, lr: float, momentum: float, weight_decay: float, n: int, velocity: dict[int, Tensor]) -> None:
        self._lr, self._momentum, self._weight_decay = lr, momentum, weight_decay
        self._share = 1 / n
        self._alpha = -lr / n
        self._beta = 1 - lr * weight_decay
        self._velocity = velocity  # by address of the weight, the same for all batch sizes

    def add(self, weight: Tensor, gradient: Tensor) -> None:
        """The step of `weight` along -`gradient`."""
        if self._momentum:
            velocity = self._velocity_of(weight).mul_(self._momentum).add_(gradient, alpha=self._share)
            self._follow(weight, velocity)
        else:
            (weight.mul_(self._beta) if self._weight_decay else weight).add_(gradient, alpha=self._alpha)

    def add_product(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        """The step along -(`left` @ `right`), two matrices."""
        if self._momentum:
            velocity = self._velocity_of(weight).addmm_(left, right, beta=self._momentum, alpha=self._share)
            self._follow(weight, velocity)
        else:
            weight.addmm_(left, right, beta=self._beta, alpha=self._alpha)

    def add_sums(self, bias: Tensor, left: Tensor, ones: Tensor) -> None:
        """The step along -(`left` @ `ones`), a matrix and a vector."""
        if self._momentum:
            velocity = self._velocity_of(bias).addmv_(left, ones, beta=self._momentum, alpha=self._share)
            self._follow(bias, velocity)
        else:
            bias.addmv_(left, ones, beta=self._beta, alpha=self._alpha)

    def _velocity_of(self, weight: Tensor) -> Tensor:
        if weight.data_ptr() not in self._velocity:
            self._velocity[weight.data_ptr()] = torch.zeros_like(weight)
        return self._velocity[weight.data_ptr()]

    def _follow(self, weight: Tensor, velocity: Tensor) -> None:
        if self._weight_decay:
            velocity.add_(weight, alpha=self._weight_decay)
        weight.add_(velocity, alpha=-self._lr)


class _Linear:
    def __init__(self, layer: nn.Linear, sgd: _Sgd, n: int) -> None:
        weight = layer.weight.data
        self._weight, self._weight_t, self._sgd = weight, weight.t(), sgd
        self._bias = None if layer.bias is None else layer.bias.data
        rows = len(weight) if weight.device.type == "cuda" else max(1, _CACHED // layer.in_features)
        self._blocks = torch.split(weight, rows)
        self._outputs, self._dx = weight.new_empty(n, layer.out_features), weight.new_empty(n, layer.in_features)
        self._ones = weight.new_ones(n)
        self._dy = self._dy_t = self._inputs = weight

    def forward(self, x: Tensor) -> Tensor:
        self._inputs = x
        torch.mm(x, self._weight_t, out=self._outputs)
        return self._outputs if self._bias is None else self._outputs.add_(self._bias)

    def backward(self, dy: Tensor, first: bool) -> Tensor:
        if dy is not self._dy:  # the layer behind hands over the same buffer each time
            self._dy, self._dy_t = dy, dy.t()
        if len(self._blocks) == 1:
            if not first:
                torch.mm(dy, self._weight, out=self._dx)
            self._sgd.add_product(self._weight, self._dy_t, self._inputs)
        else:
            self._backward_blocks(first)
        if self._bias is not None:
            self._sgd.add_sums(self._bias, self._dy_t, self._ones)
        return self._dx

    def _backward_blocks(self, first: bool) -> None:
        """Both uses of a block of the weight while it is in the cache."""
        start = 0
        for block in self._blocks:
            stop = start + len(block)
            if not first:
                torch.addmm(self._dx, self._dy[:, start:stop], block, beta=min(start, 1), out=self._dx)
            self._sgd.add_product(block, self._dy_t[start:stop], self._inputs)
            start = stop


class _Conv2d:
    def __init__(self, layer: nn.Conv2d, sgd: _Sgd) -> None:
        self._weight, self._bias, self._sgd = layer.weight.data, None if layer.bias is None else layer.bias.data, sgd
        assert not isinstance(layer.padding, str)  # see proof.cannot
        self._where = (list(layer.stride), list(layer.padding), list(layer.dilation))
        self._groups = layer.groups
        plain = needs_plain_layout(layer) or self._weight.shape[1] >= _MANY_CHANNELS
        self._plain = plain and self._weight.device.type == "cpu"
        self._inputs = self._weight

    def forward(self, x: Tensor) -> Tensor:
        self._inputs = x.contiguous() if self._plain else x
        y = nn.functional.conv2d(self._inputs, self._weight, self._bias, *self._where, self._groups)
        return y.contiguous(memory_format=torch.channels_last) if self._plain else y

    def backward(self, dy: Tensor, first: bool) -> Tensor:
        sizes = None if self._bias is None else [len(self._bias)]
        mask = [not first, True, self._bias is not None]
        dx, dw, db = _aten.convolution_backward(
            dy.contiguous() if self._plain else dy,
            self._inputs,
            self._weight,
            sizes,
            *self._where,
            False,
            [0, 0],
            self._groups,
            mask,
        )
        self._sgd.add(self._weight, dw)
        if self._bias is not None:
            self._sgd.add(self._bias, db)
        if first:
            return dy
        return dx.contiguous(memory_format=torch.channels_last) if self._plain else dx  # type: ignore[no-any-return]  # torch.ops is untyped


class _ReLU:
    def __init__(self, in_place: bool) -> None:
        self._relu = torch.relu_ if in_place else torch.relu

    def forward(self, x: Tensor) -> Tensor:
        self._outputs = self._relu(x)
        return self._outputs

    def backward(self, dy: Tensor, first: bool) -> Tensor:
        return dy.mul_(self._outputs.sign_())  # the layer behind is done with them


class _MaxPool2d:
    def __init__(self, layer: nn.MaxPool2d) -> None:
        sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        self._how = [[each, each] if isinstance(each, int) else list(each) for each in sizes]
        self._ceil_mode = layer.ceil_mode

    def forward(self, x: Tensor) -> Tensor:
        self._inputs = x.contiguous(memory_format=torch.channels_last)
        y, self._indices = _aten.max_pool2d_with_indices(self._inputs, *self._how, self._ceil_mode)
        return y  # type: ignore[no-any-return]  # torch.ops is untyped

    def backward(self, dy: Tensor, first: bool) -> Tensor:
        return _aten.max_pool2d_with_indices_backward(  # type: ignore[no-any-return]  # torch.ops is untyped
            dy.contiguous(memory_format=torch.channels_last), self._inputs, *self._how, self._ceil_mode, self._indices
        )


class _Flatten:
    def forward(self, x: Tensor) -> Tensor:
        self._shape = x.shape
        return x.flatten(1)

    def backward(self, dy: Tensor, first: bool) -> Tensor:
        return dy.view(self._shape)


_Layer = _Linear | _Conv2d | _ReLU | _MaxPool2d | _Flatten


class Stack(Protocol):
    """A model's layers and their steps, for batches of one size."""

    def step(self, x: Tensor, targets: Tensor) -> Tensor:
        """One step; returns (n, C) log-probabilities before it. `targets`: the labels' (n, C) rows of an identity."""


class _Stack:
    """The layers, with the buffers for batches of one size."""

    def __init__(self, leaves: Sequence[nn.Module], sgd: _Sgd, n: int) -> None:
        self._layers: list[_Layer] = []
        for layer in leaves:
            self._layers.append(_by_hand(layer, sgd, n, after=self._layers[-1] if self._layers else None))
        first = next(i for i, layer in enumerate(self._layers) if isinstance(layer, _Linear | _Conv2d))
        self._way_back = [(layer, i == first) for i, layer in enumerate(self._layers)][first:][::-1]
        self._dy: Tensor | None = None

    def step(self, x: Tensor, targets: Tensor) -> Tensor:
        """See `Stack`."""
        for layer in self._layers:
            x = layer.forward(x)
        log_p = torch.log_softmax(x, 1)
        if self._dy is None:
            self._dy = torch.empty_like(log_p)
        dy = torch.exp(log_p, out=self._dy).sub_(targets)
        for layer, first in self._way_back:
            dy = layer.backward(dy, first)
        return log_p


class FusedEngine:
    """SGD with momentum and weight decay for a stack; equals `EagerEngine` up to the rounding of float32."""

    runs_model = False
    single_steps: SingleStepEngine | None

    def __init__(self, model: nn.Module, lr: float, momentum: float, weight_decay: float) -> None:
        """Over a model for which `proof.why_not` returns None, or for which a trial has shown that it fits."""
        leaves = _pool_first(leaves_of(model))
        self.single_steps = single_step_engine(leaves, lr, weight_decay)
        self._flat = isinstance(leaves[0], nn.Flatten)  # then the whole epoch's inputs are, at once
        self._leaves = leaves[self._flat :]
        self._sgd = lr, momentum, weight_decay
        self._velocity: dict[int, Tensor] = {}
        self._identity: Tensor | None = None
        self._stacks = functools.lru_cache(_KEPT_BATCH_SIZES)(self._new_stack)

    def reset(self) -> None:
        """Forget the momentum: the next step is a client's first."""
        self._velocity.clear()

    @torch.no_grad()
    def epoch(self, inputs: Tensor, labels: Tensor, batch_size: int) -> Tensor:
        """One pass over (N, ...) inputs and (N,) labels as they lie; returns each batch's mean loss before its step."""
        x, y = inputs.flatten(1) if self._flat else inputs, labels.unsqueeze(1)
        if self._identity is None:
            self._identity = torch.eye(self._num_classes(x), dtype=x.dtype, device=x.device)
        targets = self._identity.index_select(0, labels)  # scatter would wait for the GPU, or sort there
        log_p = []
        for batch, rows in zip(torch.split(x, batch_size), torch.split(targets, batch_size), strict=True):
            log_p.append(self._stack_of(len(batch)).step(batch, rows))
            progress.beat()
        losses = torch.cat(log_p).gather(1, y).neg_()
        full = len(y) - len(y) % batch_size
        means = losses[:full].view(-1, batch_size).mean(1)
        return torch.cat([means, losses[full:].mean(0)]) if full < len(y) else means

    def _num_classes(self, inputs: Tensor) -> int:
        return nn.Sequential(*self._leaves)(inputs[:1]).shape[1]  # type: ignore[no-any-return]  # any module may be there

    def _stack_of(self, n: int) -> Stack:
        return self._stacks(n)

    def _new_stack(self, n: int) -> Stack:
        return _Stack(self._leaves, _Sgd(*self._sgd, n, self._velocity), n)


def _pool_first(leaves: Sequence[nn.Module]) -> list[nn.Module]:
    """max(relu(x)) = relu(max(x)), and where they differ in what they pick the gradient is 0."""
    layers = list(leaves)
    for i in range(len(layers) - 1):
        if isinstance(layers[i], nn.ReLU) and isinstance(layers[i + 1], nn.MaxPool2d):
            layers[i], layers[i + 1] = layers[i + 1], layers[i]
    return layers


def _by_hand(layer: nn.Module, sgd: _Sgd, n: int, after: _Layer | None) -> _Layer:
    if isinstance(layer, nn.Linear):
        return _Linear(layer, sgd, n)
    if isinstance(layer, nn.Conv2d):
        return _Conv2d(layer, sgd)
    if isinstance(layer, nn.MaxPool2d):
        return _MaxPool2d(layer)
    if isinstance(layer, nn.ReLU):
        return _ReLU(in_place=isinstance(after, _Linear | _Conv2d | _MaxPool2d))  # nobody needs what those put out
    return _Flatten()
