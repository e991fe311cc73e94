"""Local SGD by autograd: fits any module.

Shapes: P vector entries, T trainable ones (the first T of P), n samples of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmpi.core.vector import flat_gradient


class EagerEngine:
    """SGD with momentum and weight decay on the flat vector: one update for all layers.

    The arithmetic is that of `torch.optim.SGD` (dampening 0, no Nesterov) with mean cross-entropy.
    """

    def __init__(self, model: nn.Module, vector: Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        """Over a flattened model.

        Args:
            model: its parameters are views into `vector`.
            vector: (P,) float32.
            lr: step size.
            momentum: in [0, 1).
            weight_decay: >= 0.
        """
        self._model = model
        self._gradient = flat_gradient(model)
        self._trainable = vector[: len(self._gradient)]
        self._lr, self._momentum, self._weight_decay = lr, momentum, weight_decay
        self._velocity: Tensor | None = None

    def reset(self) -> None:
        """Forget the momentum: the next step is a client's first."""
        self._velocity = None

    def step(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """One SGD step on (n, ...) inputs and (n,) labels; returns the batch's mean loss before the step, 0-dim."""
        self._gradient.zero_()
        loss = functional.cross_entropy(self._model(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        with torch.no_grad():
            direction = self._gradient
            if self._weight_decay:
                direction.add_(self._trainable, alpha=self._weight_decay)
            if self._momentum:
                if self._velocity is None:
                    self._velocity = direction.clone()
                else:
                    self._velocity.mul_(self._momentum).add_(direction)
                direction = self._velocity
            self._trainable.add_(direction, alpha=-self._lr)
        return loss.detach()
