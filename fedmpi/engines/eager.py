"""Local SGD by autograd: fits any module."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmpi.core import pulse
from fedmpi.engines.single_step import SingleStepEngine


class EagerEngine:
    """SGD with momentum and weight decay.

    The arithmetic is that of `torch.optim.SGD` (dampening 0, no Nesterov) with mean cross-entropy. Gradients are used
    where autograd leaves them: nothing is zeroed, accumulated or copied.
    """

    runs_model = True
    single_steps: SingleStepEngine | None = None

    def __init__(self, model: nn.Module, lr: float, momentum: float, weight_decay: float) -> None:
        """Over the trainable parameters of `model`.

        Args:
            model: the module.
            lr: step size.
            momentum: in [0, 1).
            weight_decay: >= 0.
        """
        self._model = model
        self._params: list[Tensor] = [param for param in model.parameters() if param.requires_grad]
        self._lr, self._momentum, self._weight_decay = lr, momentum, weight_decay
        self._velocity: dict[int, Tensor] = {}

    def reset(self) -> None:
        """Forget the momentum: the next step is a client's first."""
        self._velocity = {}

    def epoch(self, inputs: Tensor, labels: Tensor, batch_size: int) -> Tensor:
        """One pass over (N, ...) inputs and (N,) labels as they lie; returns each batch's mean loss before its step."""
        batches = zip(torch.split(inputs, batch_size), torch.split(labels, batch_size), strict=True)
        return torch.stack([self._step(x, y) for x, y in batches])

    def _step(self, inputs: Tensor, labels: Tensor) -> Tensor:
        loss = functional.cross_entropy(self._model(inputs), labels)
        gradients = torch.autograd.grad(loss, self._params, allow_unused=True)
        used = [i for i, gradient in enumerate(gradients) if gradient is not None]
        params, directions = [self._params[i] for i in used], [gradients[i] for i in used]
        with torch.no_grad():
            if self._weight_decay:
                torch._foreach_add_(directions, params, alpha=self._weight_decay)
            if self._momentum:
                directions = [self._with_momentum(i, each) for i, each in zip(used, directions, strict=True)]
            torch._foreach_add_(params, directions, alpha=-self._lr)
        pulse.beat()
        return loss.detach()

    def _with_momentum(self, i: int, direction: Tensor) -> Tensor:
        if i in self._velocity:
            self._velocity[i].mul_(self._momentum).add_(direction)
        else:
            self._velocity[i] = direction.clone()
        return self._velocity[i]
