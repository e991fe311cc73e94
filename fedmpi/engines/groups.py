"""Clients that take one step only, from the same weights, in groups: a group's weighted update is one product.

Most of a small client's time would go into moving a model of its own. A group's part of the sum needs none:

    sum_k a_k (w_k - w) = -lr sum_i (a_k / n_k) g_i - lr d A w

with weights a_k and their sum A, sample counts n_k, gradients g_i by sample and weight decay d. No w_k is rounded to
float32; momentum does nothing in a first step. The bits depend on the group's clients only: groups are cut by
constants, and rows begin at multiples of 64 bytes, because a product's last bits may depend on that.

Shapes: P vector entries (all of them trained: T = P), M clients of the group, N samples of all of them, C classes.
"""

from __future__ import annotations

import math
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


def cut(client_ids: NDArray[np.int64], sizes: NDArray[np.int64], most_clients: int = MOST_CLIENTS) -> list[slice]:
    """Return the groups of a cohort's one-step clients, as slices of both arrays.

    Args:
        client_ids: (K,) ascending.
        sizes: (K,) samples of each client.
        most_clients: of a group, at most `MOST_CLIENTS`.
    """
    assert (np.diff(client_ids) > 0).all(), "a group depends on the order of its clients"
    groups: list[slice] = []
    start = samples = previous = 0
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
        finite: True if the steps of all clients are finite in float32, also of those of weight 0.
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
    inputs: Tensor  # (N, in)
    outputs: Tensor  # (N, out)
    gradients: Tensor  # (N, out), of each sample's own loss

    def in_range(self) -> bool:
        """Return True if each sample's gradient of weight and bias is finite, by the norms that bound it."""
        gradients, inputs = (torch.linalg.vector_norm(part, dim=1) for part in (self.gradients, self.inputs))
        return bool(gradients.mul_(inputs.clamp_(min=1)).isfinite().all())


class GroupEngine:
    """Takes the steps of groups of clients for a stack of Linear and ReLU on CPU."""

    def __init__(self, linears: Sequence[tuple[nn.Linear, bool]], lr: float, weight_decay: float) -> None:
        """Over the layers of a flattened model, in order, and True where a ReLU follows."""
        self._linears, self._lr, self._weight_decay = linears, lr, weight_decay
        params = [param for linear, _ in linears for param in (linear.weight, linear.bias) if param is not None]
        self._sizes = [param.numel() for param in params]
        starts = np.cumsum([0, *self._sizes[:-1]]) * params[0].element_size() + params[0].data_ptr()
        self._in_order = [param.data_ptr() for param in params if param.requires_grad] == starts.tolist()

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
        if not self._in_order or sum(self._sizes) != len(vector):
            raise ModelError(
                f"the layers have {sum(self._sizes)} trainable entries, not the {len(vector)} of the vector in its"
                " order: take --engine eager"
            )
        x = inputs.flatten(1)
        if not x.is_contiguous() or x.data_ptr() % 64 or x.shape[1] % _ALIGNED:
            x = _rows(*x.shape).copy_(x)
        layers = self._forward(vector.clone() if vector.data_ptr() % 64 else vector, x)
        log_p, labels = torch.log_softmax(layers[-1].outputs, 1), labels.unsqueeze(1)
        _backward(layers, log_p, labels)
        sample_losses = -log_p.gather(1, labels).to(torch.float64).view(-1).numpy()
        losses = np.add.reduceat(sample_losses, np.cumsum([0, *sizes[:-1]])) / sizes
        finite = bool(np.isfinite(losses).all()) and all(layer.in_range() for layer in layers)
        update = self._update(layers, np.repeat(np.asarray(weights) / sizes, sizes), sum(weights))
        return GroupStep(update, losses.tolist(), finite and math.isfinite(torch.linalg.vector_norm(update)))

    def _forward(self, vector: Tensor, x: Tensor) -> list[_Layer]:
        layers, params = [], iter(torch.split(vector, self._sizes))
        for linear, relu in self._linears:
            weight = next(params).view(linear.weight.shape)
            bias = None if linear.bias is None else next(params)
            y = torch.mm(x, weight.t(), out=_rows(len(x), len(weight)))
            if bias is not None:
                y.add_(bias)
            if relu:
                y.relu_()
            layers.append(_Layer(weight, bias, relu, x, y, _rows(len(x), len(weight))))
            x = y
        return layers

    def _update(self, layers: Sequence[_Layer], shares: NDArray[np.float64], total: int) -> Tensor:
        """Return the (T,) update for each sample's share a_k / n_k and the sum of a_k; scales the layers' gradients."""
        update, start = torch.empty(sum(self._sizes), dtype=torch.float64, device="cpu"), 0
        scale = torch.from_numpy((-self._lr * shares).astype(np.float32)).unsqueeze(1)
        beta = -self._lr * self._weight_decay * total
        for layer in layers:
            gradients = layer.gradients.mul_(scale).t()
            block = max(1, _BLOCK // layer.weight.shape[1])
            for weight, rows in zip(torch.split(layer.weight, block), torch.split(gradients, block), strict=True):
                part = torch.addmm(weight, rows, layer.inputs, beta=beta)
                update[start : start + part.numel()] = part.view(-1)
                start += part.numel()
            if layer.bias is not None:
                update[start : start + len(layer.bias)] = gradients.sum(1).add_(layer.bias, alpha=beta)
                start += len(layer.bias)
        return update


def _backward(layers: Sequence[_Layer], log_p: Tensor, labels: Tensor) -> None:
    """Fill in the layers' gradients from (N, C) log-probabilities and (N, 1) labels."""
    layers[-1].gradients.copy_(log_p).exp_().scatter_add_(1, labels, torch.full_like(log_p[:, :1], -1))
    for i, layer in reversed(list(enumerate(layers))):
        if layer.relu:
            layer.gradients.mul_(layer.outputs.sign())
        if i:
            torch.mm(layer.gradients, layer.weight, out=layers[i - 1].gradients)


def _rows(count: int, width: int) -> Tensor:
    """Return (count, width) float32, uninitialised, with every row aligned."""
    return torch.empty(count, -(-width // _ALIGNED) * _ALIGNED, dtype=torch.float32, device="cpu")[:, :width]


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
