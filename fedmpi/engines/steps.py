"""SGD steps of one client: settings and counts that all engines share, and the cut of an epoch into batches.

Shapes: T trainable entries, at the front of the model's vector.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedmpi.engines.groups import GroupEngine
from fedmpi.lifecycle import progress


@dataclass(frozen=True)
class Steps:
    """Steps taken since `begin`.

    Attributes:
        count: number of steps.
        scale: sum of the coefficients with which gradients entered: w_end - w_start = -lr scale g for a constant
            gradient g, weight decay left out. None: the steps are not linear in the gradients. Source: a_k of Wang et
            al., "Tackling the objective inconsistency problem", arXiv 2007.07481, table 1.
    """

    count: int
    scale: float | None


def batch_slices(n: int, batch_size: int, smallest: int = 1) -> list[slice]:
    """Return the batches of an epoch over `n` samples.

    Args:
        n: samples, >= 0.
        batch_size: samples per batch, >= 1; the last batch has the rest.
        smallest: a last batch of fewer samples joins the one before it.
    """
    starts = list(range(0, n, batch_size))
    if len(starts) > 1 and n - starts[-1] < smallest:
        starts.pop()
    return [slice(start, stop) for start, stop in itertools.pairwise([*starts, n])]


class Engine(ABC):
    """Takes the steps of one client's SGD with mean cross-entropy on the model it was made for.

    w <- w - lr v with v <- momentum v + g + prox w + constant + weight_decay w.

    Attributes:
        runs_model: True if it calls the model, which may then draw random numbers and tell training from evaluation.
        groups: takes the steps of a group of clients of one step; None: cannot.
    """

    runs_model: bool
    groups: GroupEngine | None = None

    def __init__(self, model: nn.Module, lr: float, momentum: float, weight_decay: float) -> None:
        """Over the trainable parameters of `model`.

        Args:
            model: the flattened module.
            lr: step size, unless `begin` gives another.
            momentum: in [0, 1).
            weight_decay: >= 0.
        """
        self._params: list[Tensor] = [param for param in model.parameters() if param.requires_grad]
        self._starts = np.cumsum([0, *(param.numel() for param in self._params)]).tolist()
        self._own_lr, self._momentum, self._weight_decay = lr, momentum, weight_decay
        self._velocity: dict[int, Tensor] = {}
        self.begin()

    def begin(
        self,
        *,
        lr: float | None = None,
        prox: float = 0.0,
        constant: Tensor | None = None,
        only: Sequence[slice] | None = None,
    ) -> None:
        """Make the next step a client's first, without momentum.

        A parameter that the loss does not use is left alone, unless prox or constant moves it.

        Args:
            lr: step size; None: the engine's own.
            prox: factor of w in the gradient.
            constant: (T,), added to the gradient.
            only: parts of the (T,) entries that move, the others keep their bits; None: all move.
        """
        self._lr = self._own_lr if lr is None else lr
        self._prox, factor = prox, prox + self._weight_decay
        self._factor = float(np.float32(factor))
        self._factor_rest = factor - self._factor  # w's factor must match the constant's to the last digit: they cancel
        self._constant = None if constant is None else self._stored(constant)
        self._explicit = constant is not None or prox != 0  # the gradient has more terms than a plain step's
        self._moving, self._still = _select(self._params, self._starts, only)
        self._count, self._scale, self._unit_velocity = 0, 0.0, 0.0
        self._forget_momentum()

    @abstractmethod
    def epoch(self, inputs: Tensor, labels: Tensor, batch_size: int) -> Tensor:
        """Take one pass over (N, ...) inputs and (N,) labels as they lie, a step per batch.

        Returns:
            The batches' mean losses, each before its step.
        """

    def steps(self) -> Steps:
        """Return the steps since `begin`."""
        return Steps(self._count, self._scale)

    def _stored(self, constant: Tensor) -> Tensor:
        return constant

    def _terms(self, weight: Tensor, start: int) -> Tensor:
        """Return (prox + weight_decay) w + constant, a new tensor, for a block of weights at place `start`."""
        if self._constant is None:
            return weight * self._factor
        part = self._constant[start : start + weight.numel()].view(weight.shape)
        terms = torch.add(part, weight, alpha=self._factor)
        return terms.add_(weight, alpha=self._factor_rest) if self._factor_rest else terms

    def _forget_momentum(self) -> None:
        self._velocity.clear()

    def _take(self, step: Callable[[], Tensor]) -> Tensor:
        """Run one step, count it, and keep entries still of parameters that move in part."""
        kept = [(entries, idx, entries[idx]) for entries, idx in self._still]
        result = step()
        for entries, idx, values in kept:
            entries[idx] = values
        self._count += 1
        # the step itself with a gradient of 1, in units of -lr
        self._unit_velocity = self._momentum * self._unit_velocity + 1 - self._lr * self._prox * self._scale
        self._scale += self._unit_velocity
        progress.beat()
        return result


def _select(
    params: list[Tensor], starts: list[int], only: Sequence[slice] | None
) -> tuple[list[int], list[tuple[Tensor, Tensor]]]:
    """Return the indices of the parameters that move, and the still entries, as (flat view, indices), of those."""
    if only is None:
        return list(range(len(params))), []
    moves = np.zeros(starts[-1], np.bool_)
    for part in only:
        moves[part] = True
    masks = np.split(moves, starts[1:-1])
    moving = [i for i, mask in enumerate(masks) if mask.any()]
    partial = [(params[i].data.view(-1), np.flatnonzero(~masks[i])) for i in moving if not masks[i].all()]
    return moving, [(entries, torch.from_numpy(still).to(entries.device)) for entries, still in partial]
