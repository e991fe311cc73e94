"""Clients that take one step only, from the same weights, in groups: a group's weighted update is one product.

Per client most of the time would go into moving a model of its own: a copy of the weights, a pass over it for the step,
a pass for the sum. A group's contribution to the sum needs no client's model:

    sum_k a_k (w_k - w) = -lr sum_i (a_k / n_k) g_i - lr d A w

with the weights a_k, their sum A, the sample counts n_k, each sample's gradient g_i and the weight decay d. Momentum
does nothing in a first step. No w_k is rounded to float32.

The bits depend on the group's clients only: groups are cut by constants, and rows begin at multiples of 64 bytes,
because a product's last bits may depend on that.

Shapes: P vector entries (all of them trained: T = P), M clients of the group, N samples of all of them, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmpi.errors import ModelError

MOST_CLIENTS = 32
MOST_SAMPLES = 256
LARGEST_CLIENT = 64
"""Samples; a larger client is a group of its own, so that few large clients still busy all trainers."""

_ALIGNED = 16  # float32 in 64 bytes
_BLOCK = 2**18
"""Entries of a product: a megabyte, which stays in the cache until it is widened to float64."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)


def cut(client_ids: NDArray[np.int64], sizes: NDArray[np.int64], most_clients: int = MOST_CLIENTS) -> list[slice]:
    """Return the groups of a cohort's one-step clients, as slices of both arrays.

    Args:
        client_ids: (K,) ascending.
        sizes: (K,) samples of each client.
        most_clients: of a group, at most `MOST_CLIENTS`.
    """
    assert (np.diff(client_ids) > 0).all(), "a group depends on the order of its clients"
    groups: list[slice] = []
    start = samples = 0
    previous = 0
    for i, size in enumerate(sizes.tolist()):
        full = i - start == most_clients or samples + size > MOST_SAMPLES
        if i > start and (full or max(size, previous) > LARGEST_CLIENT):
            groups.append(slice(start, i))
            start, samples = i, 0
        samples, previous = samples + size, size
    return [*groups, slice(start, len(sizes))] if len(sizes) else []


@dataclass(frozen=True)
class GroupStep:
    """One step of each client of a group.

    Attributes:
        update: (T,) float64, sum of a_k (w_k - w).
        losses: (M,) mean loss of each client before its step.
        finite: True if all of it is, for each client; if not, some client alone may still be.
    """

    update: Tensor
    losses: list[float]
    finite: bool


@dataclass(frozen=True)
class _Layer:
    """A Linear with its batch."""

    weight: Tensor  # (out, in), a view of the vector
    bias: Tensor | None
    relu: bool
    start: int  # place of the weight in the vector
    inputs: Tensor  # (N, in)
    outputs: Tensor  # (N, out)
    gradients: Tensor  # (N, out), of each sample's own loss


class GroupEngine:
    """Takes the steps of groups of clients for a stack of Linear and ReLU on CPU."""

    def __init__(self, linears: Sequence[tuple[nn.Linear, bool]], lr: float, weight_decay: float) -> None:
        """Over the layers of a flattened model.

        Args:
            linears: in order; True: a ReLU follows.
            lr: step size.
            weight_decay: >= 0.
        """
        self._linears, self._lr, self._weight_decay = linears, lr, weight_decay
        params = [param for linear, _ in linears for param in (linear.weight, linear.bias) if param is not None]
        starts = np.cumsum([0, *(param.numel() for param in params)]).tolist()
        self._size = starts[-1]
        self._in_order = all(
            param.requires_grad and param.data_ptr() == params[0].data_ptr() + start * param.element_size()
            for param, start in zip(params, starts, strict=False)
        )

    @torch.no_grad()
    def run(
        self, vector: Tensor, inputs: Tensor, labels: Tensor, sizes: Sequence[int], weights: Sequence[int]
    ) -> GroupStep:
        """Take one step for each client of a group, all from `vector`.

        Args:
            vector: (P,) float32.
            inputs: (N, ...), the clients' samples one after the other.
            labels: (N,).
            sizes: (M,) samples of each client, at least one.
            weights: (M,) integers >= 0.

        Raises:
            ModelError: the layers' weights and biases, one after the other, are not all there is in `vector`.
        """
        if not self._in_order or self._size != len(vector):
            raise ModelError(
                f"the layers have {self._size} trainable entries, not the {len(vector)} of the vector in its order:"
                " take --engine eager"
            )
        if vector.data_ptr() % 64:
            vector = vector.clone()
        layers = self._forward(vector, _rows(len(labels), inputs[0].numel()).copy_(inputs.flatten(1)))
        log_p = torch.log_softmax(layers[-1].outputs, 1)
        _backward(layers, log_p, labels.unsqueeze(1))
        per_sample = -log_p.gather(1, labels.unsqueeze(1)).to(torch.float64).view(-1).numpy()
        losses = np.add.reduceat(per_sample, np.cumsum([0, *sizes[:-1]])) / sizes
        finite = bool(np.isfinite(losses).all()) and all(_in_range(layer) for layer in layers)
        update = self._update(layers, np.repeat(np.asarray(weights) / sizes, sizes), sum(weights))
        largest = float(torch.linalg.vector_norm(update, torch.inf))
        return GroupStep(update, losses.tolist(), finite and np.isfinite(largest))

    def _forward(self, vector: Tensor, x: Tensor) -> list[_Layer]:
        layers, start = [], 0
        for linear, relu in self._linears:
            stop = start + linear.weight.numel()
            weight = vector[start:stop].view(linear.weight.shape)
            bias = None if linear.bias is None else vector[stop : stop + len(weight)]
            y = torch.mm(x, weight.t(), out=_rows(len(x), len(weight)))
            if bias is not None:
                y.add_(bias)
            if relu:
                y.relu_()
            layers.append(_Layer(weight, bias, relu, start, x, y, _rows(len(x), len(weight))))
            x, start = y, stop + (0 if bias is None else len(bias))
        return layers

    def _update(self, layers: Sequence[_Layer], shares: NDArray[np.float64], total: int) -> Tensor:
        """Return the (T,) update for the weight a_k / n_k of each sample; scales the layers' gradients."""
        update = torch.empty(self._size, dtype=torch.float64, device="cpu")
        scale = torch.from_numpy((-self._lr * shares).astype(np.float32))
        beta = -self._lr * self._weight_decay * total
        for layer in layers:
            count, width = layer.weight.shape
            step = max(1, _BLOCK // width)
            gradients = layer.gradients.mul_(scale.unsqueeze(1)).t()
            start = layer.start
            for rows in (slice(row, min(row + step, count)) for row in range(0, count, step)):
                part = torch.addmm(layer.weight[rows], gradients[rows], layer.inputs, beta=beta)
                update[start : start + part.numel()] = part.view(-1)
                start += part.numel()
            if layer.bias is not None:
                update[start : start + count] = torch.add(gradients.sum(1), layer.bias, alpha=beta)
        return update


def _backward(layers: Sequence[_Layer], log_p: Tensor, labels: Tensor) -> None:
    """Fill in the layers' gradients from (N, C) log-probabilities and (N, 1) labels."""
    top = layers[-1]
    top.gradients.copy_(log_p).exp_().scatter_add_(1, labels, torch.full_like(log_p[:, :1], -1))
    for i in reversed(range(len(layers))):
        layer = layers[i]
        if layer.relu:
            layer.gradients.mul_(layer.outputs.sign())
        if i:
            torch.mm(layer.gradients, layer.weight, out=layers[i - 1].gradients)


def _in_range(layer: _Layer) -> bool:
    """Return True if each sample's gradient is finite in float32, also that of a client of weight 0."""
    largest = [float(torch.linalg.vector_norm(part, torch.inf)) for part in (layer.gradients, layer.inputs)]
    return largest[0] * max(largest[1], 1) <= _FLOAT32_MAX


def _rows(count: int, width: int) -> Tensor:
    """Return (count, width) float32, uninitialised, with every row aligned."""
    size = (count, -(-width // _ALIGNED) * _ALIGNED)
    return torch.empty(size, dtype=torch.float32, device="cpu")[:, :width]


def group_engine(layers: Sequence[nn.Module], lr: float, weight_decay: float) -> GroupEngine | None:
    """Return an engine for layers that are Linear with or without ReLU, on CPU; else None.

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
    return GroupEngine(linears, lr, weight_decay)
