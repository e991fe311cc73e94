"""Local SGD by autograd: fits any module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmpi.engines.single_step import SingleStepEngine
from fedmpi.lifecycle import progress


class EagerEngine:
    """SGD with momentum and weight decay.

    The arithmetic is that of `torch.optim.SGD` (dampening 0, no Nesterov) with mean cross-entropy. Gradients are read
    where autograd leaves them and never written: two may be one tensor, or repeat one number (`expand`).
    """

    runs_model = True
    single_steps: SingleStepEngine | None = None

    def __init__(
        self, model: nn.Module, lr: float, momentum: float, weight_decay: float, smallest_batch: int = 1
    ) -> None:
        """Over the trainable parameters of `model`.

        Args:
            model: the module.
            lr: step size.
            momentum: in [0, 1).
            weight_decay: >= 0.
            smallest_batch: a last batch of fewer samples joins the one before it.
        """
        self._model = model
        self._params: list[Tensor] = [param for param in model.parameters() if param.requires_grad]
        self._lr, self._momentum, self._weight_decay = lr, momentum, weight_decay
        self._velocity: dict[int, Tensor] = {}
        self._smallest_batch = smallest_batch
        self._start = min((param.data_ptr() for param in self._params), default=0)
        self._stop = max((p.data_ptr() + p.numel() * p.element_size() for p in self._params), default=0)

    def reset(self) -> None:
        """Forget the momentum: the next step is a client's first."""
        self._velocity = {}

    def epoch(self, inputs: Tensor, labels: Tensor, batch_size: int) -> Tensor:
        """One pass over (N, ...) inputs and (N,) labels as they lie; returns each batch's mean loss before its step."""
        sizes: int | list[int] = batch_size
        left_over = len(labels) % batch_size
        if 0 < left_over < self._smallest_batch and len(labels) > batch_size:
            sizes = [batch_size] * (len(labels) // batch_size)
            sizes[-1] += left_over
        batches = zip(torch.split(inputs, sizes), torch.split(labels, sizes), strict=True)
        return torch.stack([self._step(x, y) for x, y in batches])

    def _step(self, inputs: Tensor, labels: Tensor) -> Tensor:
        loss = functional.cross_entropy(self._model(inputs), labels)
        gradients = self._gradients(loss)
        used = [i for i, gradient in enumerate(gradients) if gradient is not None]
        params = [self._params[i] for i in used]
        directions = [gradient for gradient in gradients if gradient is not None]
        with torch.no_grad():
            if self._weight_decay:
                directions = list(torch._foreach_add(directions, params, alpha=self._weight_decay))
            else:
                directions = [self._apart(direction) for direction in directions]
            if self._momentum:
                directions = [self._with_momentum(i, each) for i, each in zip(used, directions, strict=True)]
            torch._foreach_add_(params, directions, alpha=-self._lr)
        progress.beat()
        return loss.detach()

    def _gradients(self, loss: Tensor) -> Sequence[Tensor | None]:
        """Of the parameters; through `backward` where hooks wait for what that accumulates."""
        if not any(getattr(param, "_post_accumulate_grad_hooks", None) for param in self._params):
            return torch.autograd.grad(loss, self._params, allow_unused=True)
        for param in self._params:
            param.grad = None
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        gradients = [param.grad for param in self._params]
        for param in self._params:
            param.grad = None
        return gradients

    def _apart(self, gradient: Tensor) -> Tensor:
        """The gradient, copied if it lies among the parameters, as a `torch.autograd.Function` may return it."""
        inside = gradient.layout is torch.strided and self._start <= gradient.data_ptr() < self._stop
        return gradient.clone() if inside else gradient

    def _with_momentum(self, i: int, direction: Tensor) -> Tensor:
        if i in self._velocity:
            self._velocity[i].mul_(self._momentum).add_(direction)
        else:
            self._velocity[i] = direction.clone()
        return self._velocity[i]
