"""Many clients that each take one step from the same weights, without a model for each.

With few samples a client, most of a client's time goes into moving its model: a copy of the weights, a pass over it for
the step, a pass for the sum. Here the weights are read once for all clients at hand, and a client's model exists only
as one piece of its vector after the other, small enough to be formed, summed and forgotten within the cache.

What a client comes to depends on that client alone, not on those it is taken together with: each has products of its
own, on rows that begin at a multiple of 64 bytes, because a product's last bits may depend on that.

Shapes: P vector entries, M clients, N samples of all of them, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmpi.errors import ModelError

_PIECE = 2**18
"""Entries of a piece: a megabyte, which stays in the cache; for smaller ones, calls cost more than memory."""

_ALIGNED = 16  # float32 in 64 bytes
_SLACK = 1.01  # on a bound: its own rounding, and the products'


@dataclass(frozen=True)
class _Layer:
    """A Linear at work: views of the weights, its inputs, the gradients of its outputs."""

    weight: Tensor  # (out, in)
    bias: Tensor | None
    relu: bool
    start: int  # where the weight begins in the vector
    inputs: Tensor  # (N, in)
    outputs: Tensor  # (N, out)
    gradients: Tensor  # (N, out), of each sample's own loss


@dataclass(frozen=True)
class _Part:
    """Rows of a layer's weight, or its bias."""

    layer_idx: int
    rows: slice | None  # None: the bias
    start: int  # in the vector
    values: Tensor

    @property
    def stop(self) -> int:
        return self.start + self.values.numel()


def _cut(layers: Sequence[_Layer]) -> Iterator[list[_Part]]:
    """The vector in pieces of at most `_PIECE` entries, or one row or bias where that is more."""
    parts: list[_Part] = []
    for part in _parts(layers):
        if parts and part.stop - parts[0].start > _PIECE:
            yield parts
            parts = []
        parts.append(part)
    yield parts


def _parts(layers: Sequence[_Layer]) -> Iterator[_Part]:
    for layer_idx, layer in enumerate(layers):
        count, width = layer.weight.shape
        step = max(1, _PIECE // width)
        for row in range(0, count, step):
            rows = slice(row, min(row + step, count))
            yield _Part(layer_idx, rows, layer.start + row * width, layer.weight[rows])
        if layer.bias is not None:
            yield _Part(layer_idx, None, layer.start + count * width, layer.bias)


class SingleSteps:
    """One SGD step each for M clients; their trained vectors come piece by piece.

    Attributes:
        losses: mean loss of each client before its step.
        largest: by client, a bound on the absolute values of its trained vector; NaN if it is not finite.
    """

    def __init__(
        self, form: SingleStepEngine, vector: Tensor, inputs: Tensor, labels: Tensor, sizes: list[int]
    ) -> None:
        """Everything but the weights' own steps.

        Args:
            form: the layers and the step size.
            vector: (P,) float32, the weights that all start from.
            inputs: (N, ...), the clients' samples one after the other.
            labels: (N,).
            sizes: (M,) samples of each client, at least one.
        """
        self._form, self._sizes = form, sizes
        self._layers = self._forward(vector, _rows(len(labels), inputs[0].numel()).copy_(inputs.flatten(1)))
        top, labels = self._layers[-1], labels.unsqueeze(1)
        log_p = torch.log_softmax(top.outputs, 1)
        top.gradients.copy_(log_p).exp_().scatter_add_(1, labels, torch.full_like(log_p[:, :1], -1))
        if top.relu:
            top.gradients.mul_(top.outputs.sign())
        self._backward()
        starts = np.cumsum([0, *sizes[:-1]])
        per_sample = -log_p.gather(1, labels).to(torch.float64).view(-1).numpy()
        self.losses: list[float] = (np.add.reduceat(per_sample, starts) / sizes).tolist()
        self.largest: list[float] = self._bounds(vector, starts).tolist()

    def pieces(self, clients: Sequence[int]) -> Iterator[tuple[int, slice, NDArray[np.float32]]]:
        """For each of `clients` (in [0, M)): its place, columns of its vector, and their values, good until the next.

        All clients of one piece come before the next piece.
        """
        decay = 1 - self._form.lr * self._form.weight_decay
        steps = [-self._form.lr / size for size in self._sizes]
        ones = [torch.ones(size, dtype=torch.float32, device="cpu") for size in self._sizes]
        held = [
            [(mine.t(), x) for mine, x in zip(*(torch.split(each, self._sizes) for each in two), strict=True)]
            for two in ((layer.gradients, layer.inputs) for layer in self._layers)
        ]
        for parts in _cut(self._layers):
            start, stop = parts[0].start, parts[-1].stop
            values = torch.empty(stop - start, dtype=torch.float32, device="cpu")
            into = [values[part.start - start : part.stop - start].view(part.values.shape) for part in parts]
            columns, array = slice(start, stop), values.numpy()
            for i in clients:
                for part, out in zip(parts, into, strict=True):
                    gradients, x = held[part.layer_idx][i]
                    if part.rows is None:
                        torch.addmv(part.values, gradients, ones[i], beta=decay, alpha=steps[i], out=out)
                    else:
                        torch.addmm(part.values, gradients[part.rows], x, beta=decay, alpha=steps[i], out=out)
                yield i, columns, array

    def _forward(self, vector: Tensor, x: Tensor) -> list[_Layer]:
        layers, start = [], 0
        for linear, relu in self._form.linears:
            stop = start + linear.weight.numel()
            weight = vector[start:stop].view(linear.weight.shape)
            bias = None if linear.bias is None else vector[stop : stop + len(weight)]
            y = _rows(len(x), len(weight))
            for mine, into in zip(torch.split(x, self._sizes), torch.split(y, self._sizes), strict=True):
                torch.mm(mine, weight.t(), out=into)  # one product a client: its bits are its own
            if bias is not None:
                y.add_(bias)
            if relu:
                y.relu_()
            layers.append(_Layer(weight, bias, relu, start, x, y, _rows(len(x), len(weight))))
            x, start = y, stop + (0 if bias is None else len(bias))
        return layers

    def _backward(self) -> None:
        for layer, below in zip(self._layers[:0:-1], self._layers[-2::-1], strict=True):
            parts = (torch.split(layer.gradients, self._sizes), torch.split(below.gradients, self._sizes))
            for mine, into in zip(*parts, strict=True):
                torch.mm(mine, layer.weight, out=into)
            if below.relu:
                below.gradients.mul_(below.outputs.sign())

    def _bounds(self, vector: Tensor, starts: NDArray[np.int64]) -> NDArray[np.float64]:
        """(M,) from |w - lr g x| <= |w| + lr |g| |x|."""
        step = np.zeros(len(starts))
        for layer in self._layers:
            largest = [
                np.maximum.reduceat(torch.linalg.vector_norm(each, math.inf, 1).to(torch.float64).numpy(), starts)
                for each in (layer.gradients, layer.inputs)
            ]
            step = np.maximum(step, largest[0] * np.maximum(largest[1], 1))  # a bias has inputs of 1
        decay = abs(1 - self._form.lr * self._form.weight_decay)
        return _SLACK * (decay * float(torch.linalg.vector_norm(vector, math.inf)) + self._form.lr * step)


def _rows(count: int, width: int) -> Tensor:
    """(count, width) float32, uninitialised, every row aligned."""
    size = (count, -(-width // _ALIGNED) * _ALIGNED)
    return torch.empty(size, dtype=torch.float32, device="cpu")[:, :width]


class SingleStepEngine:
    """Makes `SingleSteps` for a stack of Linear and ReLU; with momentum too, which one step does not feel."""

    def __init__(self, linears: list[tuple[nn.Linear, bool]], lr: float, weight_decay: float) -> None:
        """Over the layers of a flattened model; see `single_step_engine`."""
        self.linears = linears
        self.lr, self.weight_decay = lr, weight_decay
        params = [param for linear, _ in linears for param in (linear.weight, linear.bias) if param is not None]
        starts = np.cumsum([0, *(param.numel() for param in params)])
        self._size = int(starts[-1])
        self._in_order = all(
            param.requires_grad and param.data_ptr() == params[0].data_ptr() + start * param.element_size()
            for param, start in zip(params, starts.tolist(), strict=False)
        )

    @torch.no_grad()
    def run(self, vector: Tensor, inputs: Tensor, labels: Tensor, sizes: list[int]) -> SingleSteps:
        """See `SingleSteps`.

        Raises:
            ModelError: the layers' weights and biases, one after the other, are not all there is in `vector`.
        """
        if not self._in_order or self._size != len(vector):
            raise ModelError(
                f"the layers have {self._size} trainable entries, not the {len(vector)} of the vector in its order:"
                " take --engine eager"
            )
        return SingleSteps(self, vector, inputs, labels, sizes)


def single_step_engine(layers: Sequence[nn.Module], lr: float, weight_decay: float) -> SingleStepEngine | None:
    """For a stack's layers, if they are Linear with or without ReLU, on CPU; else None.

    Args:
        layers: in order; a Flatten may come first.
        lr: step size.
        weight_decay: >= 0.
    """
    rest = list(layers[1:] if isinstance(layers[0], nn.Flatten) else layers)
    linears: list[tuple[nn.Linear, bool]] = []
    while rest:
        layer = rest.pop(0)
        if not isinstance(layer, nn.Linear) or layer.weight.device.type != "cpu":
            return None
        relu = bool(rest) and isinstance(rest[0], nn.ReLU)
        linears.append((layer, relu))
        rest = rest[relu:]
    return SingleStepEngine(linears, lr, weight_decay)
