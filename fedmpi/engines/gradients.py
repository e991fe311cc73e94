"""Loss and gradient of a model by autograd.

Shapes: T trainable entries, at the front of the model's vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmpi.lifecycle import progress

Criterion = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def loss(model: nn.Module, inputs: Tensor, labels: Tensor, criterion: Criterion = functional.cross_entropy) -> Tensor:
    """Return the model's loss on a batch, a scalar."""
    return criterion(model(inputs), labels)


def gradient(
    model: nn.Module, inputs: Tensor, labels: Tensor, criterion: Criterion = functional.cross_entropy
) -> Tensor:
    """Return the (T,) gradient of the model's loss on a batch; see `loss_and_gradient`."""
    return loss_and_gradient(model, inputs, labels, criterion)[1]


def loss_and_gradient(
    model: nn.Module, inputs: Tensor, labels: Tensor, criterion: Criterion = functional.cross_entropy
) -> tuple[Tensor, Tensor]:
    """Return the model's loss on a batch, a scalar, and its (T,) gradient, 0 for what the loss does not use.

    `w.add_(gradient, alpha=-lr)` on the (T,) part of the vector is a plain step of `EagerEngine`, bit by bit; sparse
    gradients (`nn.Embedding(sparse=True)`) are equal but for rounding.
    """
    params = [param for param in model.parameters() if param.requires_grad]
    value = criterion(model(inputs), labels)
    parts = gradients_of(value, params)
    progress.beat()
    dense = [torch.zeros_like(p) if part is None else part.to_dense() for p, part in zip(params, parts, strict=True)]
    return value.detach(), torch.cat([part.detach().reshape(-1) for part in dense])


def gradients_of(value: Tensor, params: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Return the gradient of a scalar for each parameter, None for one that it does not use.

    Gradients lie where autograd leaves them: two may be one tensor, repeat one number (`expand`), or be a parameter's
    own memory.
    """
    if not any(getattr(param, "_post_accumulate_grad_hooks", None) for param in params):
        return torch.autograd.grad(value, params, allow_unused=True) if params else ()
    for param in params:
        param.grad = None
    value.backward(inputs=params)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    gradients = [param.grad for param in params]
    for param in params:
        param.grad = None
    return gradients
