"""Layers whose passes, and steps, are taken by hand: Linear, Conv2d, ReLU, MaxPool2d and Flatten.

Results go to buffers that stay. `backward` takes the gradient of a layer's outputs, steps its parameters and returns
the gradient of its inputs, which is formed with the weights before the step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedmpi.core.memory_format import needs_plain_layout
from fedmpi.engines.in_place import InPlaceSgd

_aten = torch.ops.aten

_MANY_CHANNELS = 8
"""From so many input channels on, a convolution on CPU is faster in the plain layout, the turning there and back
included; below, and for pooling, channels last is."""


class Linear:
    """x @ W.t() + b."""

    def __init__(self, layer: nn.Linear, sgd: InPlaceSgd, n: int) -> None:
        weight = layer.weight.data
        self._weight, self._weight_t, self._sgd = weight, weight.t(), sgd
        self._bias = None if layer.bias is None else layer.bias.data
        rows = len(weight) if weight.device.type == "cuda" else max(1, sgd.block_entries // layer.in_features)
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
            self._sgd.add_product(self._bias, self._dy_t, self._ones)
        return self._dx

    def _backward_blocks(self, first: bool) -> None:
        """Use a block of the weight twice while it is in the cache."""
        start = 0
        for block in self._blocks:
            stop = start + len(block)
            if not first:
                torch.addmm(self._dx, self._dy[:, start:stop], block, beta=min(start, 1), out=self._dx)
            self._sgd.add_product(block, self._dy_t[start:stop], self._inputs)
            start = stop


class Conv2d:
    """Cross-correlation of images."""

    def __init__(self, layer: nn.Conv2d, sgd: InPlaceSgd) -> None:
        self._weight, self._bias, self._sgd = layer.weight.data, None if layer.bias is None else layer.bias.data, sgd
        assert not isinstance(layer.padding, str)  # see proof.cannot
        self._geometry = (list(layer.stride), list(layer.padding), list(layer.dilation))
        self._groups = layer.groups
        plain = needs_plain_layout(layer) or self._weight.shape[1] >= _MANY_CHANNELS
        self._plain = plain and self._weight.device.type == "cpu"
        self._inputs = self._weight

    def forward(self, x: Tensor) -> Tensor:
        self._inputs = x.contiguous() if self._plain else x
        y = nn.functional.conv2d(self._inputs, self._weight, self._bias, *self._geometry, self._groups)
        return y.contiguous(memory_format=torch.channels_last) if self._plain else y

    def backward(self, dy: Tensor, first: bool) -> Tensor:
        sizes = None if self._bias is None else [len(self._bias)]
        mask = [not first, self._sgd.moves(self._weight), self._bias is not None and self._sgd.moves(self._bias)]
        dx, dw, db = _aten.convolution_backward(
            dy.contiguous() if self._plain else dy,
            self._inputs,
            self._weight,
            sizes,
            *self._geometry,
            False,
            [0, 0],
            self._groups,
            mask,
        )
        if mask[1]:
            self._sgd.add(self._weight, dw)
        if self._bias is not None and mask[2]:
            self._sgd.add(self._bias, db)
        if first:
            return dy
        return dx.contiguous(memory_format=torch.channels_last) if self._plain else dx  # type: ignore[no-any-return]  # torch.ops is untyped


class ReLU:
    """max(x, 0)."""

    def __init__(self, in_place: bool) -> None:
        self._relu = torch.relu_ if in_place else torch.relu

    def forward(self, x: Tensor) -> Tensor:
        self._outputs = self._relu(x)
        return self._outputs

    def backward(self, dy: Tensor, first: bool) -> Tensor:
        return dy.mul_(self._outputs.sign_())  # the layer behind is done with them


class MaxPool2d:
    """Largest value per window; channels last."""

    def __init__(self, layer: nn.MaxPool2d) -> None:
        sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        self._sizes = [[size, size] if isinstance(size, int) else list(size) for size in sizes]
        self._ceil_mode = layer.ceil_mode

    def forward(self, x: Tensor) -> Tensor:
        self._inputs = x.contiguous(memory_format=torch.channels_last)
        y, self._indices = _aten.max_pool2d_with_indices(self._inputs, *self._sizes, self._ceil_mode)
        return y  # type: ignore[no-any-return]  # torch.ops is untyped

    def backward(self, dy: Tensor, first: bool) -> Tensor:
        return _aten.max_pool2d_with_indices_backward(  # type: ignore[no-any-return]  # torch.ops is untyped
            dy.contiguous(memory_format=torch.channels_last), self._inputs, *self._sizes, self._ceil_mode, self._indices
        )


class Flatten:
    """(n, ...) to (n, features)."""

    def forward(self, x: Tensor) -> Tensor:
        self._shape = x.shape
        return x.flatten(1)

    def backward(self, dy: Tensor, first: bool) -> Tensor:
        return dy.view(self._shape)


Layer = Linear | Conv2d | ReLU | MaxPool2d | Flatten


def by_hand(layer: nn.Module, sgd: InPlaceSgd, n: int, after: Layer | None) -> Layer:
    """Return the layer for batches of `n` samples; `after`: the one before it in the stack."""
    if isinstance(layer, nn.Linear):
        return Linear(layer, sgd, n)
    if isinstance(layer, nn.Conv2d):
        return Conv2d(layer, sgd)
    if isinstance(layer, nn.MaxPool2d):
        return MaxPool2d(layer)
    if isinstance(layer, nn.ReLU):
        return ReLU(in_place=isinstance(after, Linear | Conv2d | MaxPool2d))  # nothing else reads their outputs
    return Flatten()
