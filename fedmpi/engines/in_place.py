"""SGD steps of single weights, in place, in as few calls as possible.

Gradients are sums over the n samples of a batch; the step divides by n. A product that is a gradient is formed within
the very call that steps the weight (`addmm_` with alpha = -lr / n).
"""

from __future__ import annotations

import bisect

import torch
from torch import Tensor, nn

from fedmpi.engines.steps import Engine


class InPlaceSgd(Engine):
    """Steps a weight along a gradient that is given, or that is a product not yet formed."""

    block_entries = 2**18
    """Entries of a weight that a core's cache holds beside the rest."""

    def __init__(self, model: nn.Module, lr: float, momentum: float, weight_decay: float) -> None:
        """Over the trainable parameters of a flattened `model`; see `Engine`."""
        super().__init__(model, lr, momentum, weight_decay)
        self._first = self._params[0]
        self._share = self._alpha = self._beta = 0.0

    def set_batch(self, n: int) -> None:
        """Fix the number of samples that the next gradients are summed over."""
        self._share, self._alpha = 1 / n, -self._lr / n
        self._beta = 1 - self._lr * self._weight_decay

    def moves(self, weight: Tensor) -> bool:
        """Return True if steps change the parameter of which `weight` is a block of rows."""
        return len(self._moving) == len(self._params) or (
            bisect.bisect(self._starts, self._start_of(weight)) - 1 in self._moving
        )

    def add(self, weight: Tensor, gradient: Tensor) -> None:
        """Step `weight` along -`gradient`."""
        if self._momentum or self._explicit:
            velocity = self._velocity_of(weight).mul_(self._momentum).add_(gradient, alpha=self._share)
            self._follow(weight, velocity)
        else:
            (weight.mul_(self._beta) if self._weight_decay else weight).add_(gradient, alpha=self._alpha)

    def add_product(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        """Step `weight`, a block of rows or a bias, along -(`left` @ `right`), a matrix and a matrix or vector."""
        if not self.moves(weight):
            return
        if self._momentum or self._explicit:
            velocity = self._velocity_of(weight)
            add = velocity.addmm_ if weight.dim() == 2 else velocity.addmv_
            self._follow(weight, add(left, right, beta=self._momentum, alpha=self._share))
        else:
            add = weight.addmm_ if weight.dim() == 2 else weight.addmv_
            add(left, right, beta=self._beta, alpha=self._alpha)

    def _start_of(self, weight: Tensor) -> int:
        return (weight.data_ptr() - self._first.data_ptr()) // weight.element_size()

    def _velocity_of(self, weight: Tensor) -> Tensor:
        if weight.data_ptr() not in self._velocity:  # the address is the same for all batch sizes
            self._velocity[weight.data_ptr()] = torch.zeros_like(weight)
        return self._velocity[weight.data_ptr()]

    def _follow(self, weight: Tensor, velocity: Tensor) -> None:
        if self._explicit:
            velocity.add_(self._terms(weight, self._start_of(weight)))
        elif self._weight_decay:
            velocity.add_(weight, alpha=self._weight_decay)
        weight.add_(velocity, alpha=-self._lr)
