"""Local SGD by autograd: fits any module."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedmpi.engines.gradients import gradients_of
from fedmpi.engines.steps import Engine, batch_slices


class EagerEngine(Engine):
    """SGD with momentum and weight decay.

    The arithmetic is that of `torch.optim.SGD` (dampening 0, no Nesterov) with mean cross-entropy.
    """

    runs_model = True

    def __init__(
        self, model: nn.Module, lr: float, momentum: float, weight_decay: float, smallest_batch: int = 1
    ) -> None:
        """Over the trainable parameters of `model`; see `Engine`.

        Args:
            model: the module.
            lr: step size.
            momentum: in [0, 1).
            weight_decay: >= 0.
            smallest_batch: a last batch of fewer samples joins the one before it.
        """
        super().__init__(model, lr, momentum, weight_decay)
        self._model, self._smallest_batch = model, smallest_batch
        self._start = min((param.data_ptr() for param in self._params), default=0)
        self._stop = max((p.data_ptr() + p.numel() * p.element_size() for p in self._params), default=0)

    def epoch(self, inputs: Tensor, labels: Tensor, batch_size: int) -> Tensor:
        """See `Engine`."""
        batches = batch_slices(len(labels), batch_size, self._smallest_batch)
        return torch.stack([self._take(functools.partial(self._step, inputs[rows], labels[rows])) for rows in batches])

    def _step(self, inputs: Tensor, labels: Tensor) -> Tensor:
        loss = cross_entropy(self._model(inputs), labels)
        gradients = gradients_of(loss, [self._params[i] for i in self._moving])
        with torch.no_grad():
            directions = self._directions(dict(zip(self._moving, gradients, strict=True)))
            if self._momentum:
                directions = {i: self._with_momentum(i, direction) for i, direction in directions.items()}
            if directions:
                params = [self._params[i] for i in directions]
                torch._foreach_add_(params, list(directions.values()), alpha=-self._lr)
        return loss.detach()

    def _directions(self, gradients: Mapping[int, Tensor | None]) -> dict[int, Tensor]:
        """Return by parameter the gradient with decay, prox and constant, in memory apart from the parameters'."""
        if self._explicit:
            directions = {i: self._terms(self._params[i], self._starts[i]) for i in gradients}
            return {i: term if (part := gradients[i]) is None else term.add_(part) for i, term in directions.items()}
        used = {i: gradient for i, gradient in gradients.items() if gradient is not None}
        if not self._weight_decay or not used:
            return {i: self._apart(gradient) for i, gradient in used.items()}
        params = [self._params[i] for i in used]
        return dict(zip(used, torch._foreach_add(list(used.values()), params, alpha=self._weight_decay), strict=True))

    def _apart(self, gradient: Tensor) -> Tensor:
        """Return the gradient, copied if it lies among the parameters, as a `torch.autograd.Function` may return it.

        Also if it repeats one number: torch adds that with other roundings than the same numbers one after the other.
        """
        if gradient.layout is not torch.strided:
            return gradient
        inside = self._start <= gradient.data_ptr() < self._stop
        return gradient.clone(memory_format=torch.contiguous_format) if inside or 0 in gradient.stride() else gradient

    def _with_momentum(self, i: int, direction: Tensor) -> Tensor:
        if i in self._velocity:
            self._velocity[i].mul_(self._momentum).add_(direction)
        else:
            self._velocity[i] = direction.clone()
        return self._velocity[i]
