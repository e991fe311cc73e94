"""Local SGD by hand for stacks of Linear, Conv2d, ReLU, MaxPool2d and Flatten under cross-entropy.

A step saves what autograd cannot: a Linear's weight is updated inside the very product that forms its gradient
(`addmm_` with alpha = -lr), nothing is recorded, and a ReLU in front of a pooling acts behind it, where there is four
times less to do.

Shapes: n samples of the batch, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedmpi.core.layout import needs_plain_layout

_aten = torch.ops.aten

_MEAN, _NO_LABEL = 1, -100  # cross-entropy's defaults, as aten counts them

_CACHED = 2**18
"""Entries of a weight that a core's cache holds beside the rest."""

_MANY_CHANNELS = 8
"""From so many input channels on, a convolution on CPU is faster in the plain layout, the turning there and back
included; below, and for pooling, channels last is."""


class _Sgd:
    """w <- w - lr (m v + g + d w), the arithmetic of `torch.optim.SGD`, with g given or as a product not yet formed."""

    def __init__(self, lr: float, momentum: float, weight_decay: float) -> None:
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self._velocity: dict[int, Tensor] = {}

    def reset(self) -> None:
        self._velocity.clear()

    def add(self, weight: Tensor, gradient: Tensor) -> None:
        """The step of `weight` along -`gradient`."""
        if self.momentum:
            velocity = self._velocity_of(weight).mul_(self.momentum).add_(gradient)
            self._follow(weight, velocity)
        elif self.weight_decay:
            weight.mul_(1 - self.lr * self.weight_decay).add_(gradient, alpha=-self.lr)
        else:
            weight.add_(gradient, alpha=-self.lr)

    def add_product(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        """The step along -(`left` @ `right`): a matrix, or a vector if `right` is one."""
        into = Tensor.addmv_ if right.dim() == 1 else Tensor.addmm_
        if self.momentum:
            velocity = into(self._velocity_of(weight), left, right, beta=self.momentum)
            self._follow(weight, velocity)
        else:
            into(weight, left, right, beta=1 - self.lr * self.weight_decay, alpha=-self.lr)

    def _velocity_of(self, weight: Tensor) -> Tensor:
        if id(weight) not in self._velocity:
            self._velocity[id(weight)] = torch.zeros_like(weight)
        return self._velocity[id(weight)]

    def _follow(self, weight: Tensor, velocity: Tensor) -> None:
        if self.weight_decay:
            velocity.add_(weight, alpha=self.weight_decay)
        weight.add_(velocity, alpha=-self.lr)


class _Linear:
    def __init__(self, layer: nn.Linear, sgd: _Sgd) -> None:
        self._weight, self._bias, self._sgd = layer.weight.data, None if layer.bias is None else layer.bias.data, sgd
        rows = len(self._weight) if self._weight.device.type == "cuda" else max(1, _CACHED // layer.in_features)
        self._blocks = torch.split(self._weight, rows)
        self._ones = self._weight.new_ones(0)
        self._inputs = self._weight

    def forward(self, x: Tensor) -> Tensor:
        self._inputs = x
        return nn.functional.linear(x, self._weight, self._bias)

    def backward(self, dy: Tensor, first: bool) -> Tensor:
        dy_t = dy.t()
        if len(self._blocks) == 1:
            dx = dy if first else dy.mm(self._weight)
            self._sgd.add_product(self._weight, dy_t, self._inputs)
        else:
            dx = self._backward_blocks(dy, dy_t, first)
        if self._bias is not None:
            if len(self._ones) != len(dy):
                self._ones = dy.new_ones(len(dy))
            self._sgd.add_product(self._bias, dy_t, self._ones)
        return dx

    def _backward_blocks(self, dy: Tensor, dy_t: Tensor, first: bool) -> Tensor:
        """Both uses of a block of the weight while it is in the cache."""
        dx, start = dy, 0
        for block in self._blocks:
            stop = start + len(block)
            if not first:
                dx = dx.addmm_(dy[:, start:stop], block) if start else dy[:, start:stop].mm(block)
            self._sgd.add_product(block, dy_t[start:stop], self._inputs)
            start = stop
        return dx


class _Conv2d:
    def __init__(self, layer: nn.Conv2d, sgd: _Sgd) -> None:
        self._weight, self._bias, self._sgd = layer.weight.data, None if layer.bias is None else layer.bias.data, sgd
        assert not isinstance(layer.padding, str)  # see why_not
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
        return _aten.threshold_backward(dy, self._outputs, 0)  # type: ignore[no-any-return]  # torch.ops is untyped


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


class FusedEngine:
    """SGD with momentum and weight decay for a stack; equals `EagerEngine` up to the rounding of float32."""

    def __init__(self, model: nn.Module, lr: float, momentum: float, weight_decay: float) -> None:
        """Over a model for which `why_not` returns None."""
        self._sgd = _Sgd(lr, momentum, weight_decay)
        self._layers: list[_Layer] = []
        for layer in _pool_first(_leaves(model)):
            self._layers.append(_by_hand(layer, self._sgd, after=self._layers[-1] if self._layers else None))
        weighted = [i for i, layer in enumerate(self._layers) if isinstance(layer, _Linear | _Conv2d)]
        self._one = next(model.parameters()).new_ones(())
        self._first = weighted[0]  # below it no gradient is wanted

    def reset(self) -> None:
        """Forget the momentum: the next step is a client's first."""
        self._sgd.reset()

    @torch.no_grad()
    def step(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """One SGD step on (n, ...) inputs and (n,) labels; returns the batch's mean loss before the step, 0-dim."""
        x = inputs
        for layer in self._layers:
            x = layer.forward(x)
        log_p = torch.log_softmax(x, 1)
        loss, weight = _aten.nll_loss_forward(log_p, labels, None, _MEAN, _NO_LABEL)
        dy = _aten.nll_loss_backward(self._one, log_p, labels, None, _MEAN, _NO_LABEL, weight)
        dy = _aten._log_softmax_backward_data(dy, log_p, 1, x.dtype)
        for i in range(len(self._layers) - 1, self._first - 1, -1):
            dy = self._layers[i].backward(dy, i == self._first)
        return loss  # type: ignore[no-any-return]  # torch.ops is untyped


def why_not(model: nn.Module) -> str | None:
    """Why `FusedEngine` cannot take `model`, as far as its layers tell; None if it can."""
    leaves = _leaves(model)
    if not any(isinstance(layer, nn.Linear | nn.Conv2d) for layer in leaves):
        return "it has no Linear or Conv2d"
    for layer in leaves:
        name = type(layer).__name__
        if type(layer) not in (nn.Linear, nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Flatten):
            return f"it has a {name}"
        if isinstance(layer, nn.Conv2d) and (isinstance(layer.padding, str) or layer.padding_mode != "zeros"):
            return f"it has a Conv2d with padding {layer.padding!r}, {layer.padding_mode!r}"
        if isinstance(layer, nn.MaxPool2d) and layer.return_indices:
            return "it has a MaxPool2d that returns indices"
        if isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) != (1, -1):
            return "it has a Flatten of other dimensions than all but the first"
    held = [param for layer in leaves for param in layer.parameters()]
    if len({id(param) for param in held}) != len(held):
        return "it has tied parameters"
    if {id(param) for param in held} != {id(param) for param in model.parameters()}:
        return "it has parameters outside its layers"
    if not all(param.requires_grad for param in held):
        return "it has frozen parameters"
    return None


def _leaves(model: nn.Module) -> list[nn.Module]:
    """Its layers in the order of registration; whether `forward` runs them so is for a trial to tell."""
    return [layer for layer in model.modules() if not list(layer.children())]


def _pool_first(leaves: Sequence[nn.Module]) -> list[nn.Module]:
    """max(relu(x)) = relu(max(x)), and where they differ in what they pick the gradient is 0."""
    layers = list(leaves)
    for i in range(len(layers) - 1):
        if isinstance(layers[i], nn.ReLU) and isinstance(layers[i + 1], nn.MaxPool2d):
            layers[i], layers[i + 1] = layers[i + 1], layers[i]
    return layers


def _by_hand(layer: nn.Module, sgd: _Sgd, after: _Layer | None) -> _Layer:
    if isinstance(layer, nn.Linear):
        return _Linear(layer, sgd)
    if isinstance(layer, nn.Conv2d):
        return _Conv2d(layer, sgd)
    if isinstance(layer, nn.MaxPool2d):
        return _MaxPool2d(layer)
    if isinstance(layer, nn.ReLU):
        return _ReLU(in_place=isinstance(after, _Linear | _Conv2d | _MaxPool2d))  # nobody needs what those put out
    return _Flatten()
