"""The floor: FedAvg by two processes that share nothing with fedmpi but MPI, the data and the initial weights.

Everything is in memory beforehand, a client is a slice of it, steps are autograd and one SGD update, models are summed
in float32 by one all-reduce, the test set is cut in two. There is nothing in it that a hand-written loop could leave
out. Layout of images and form of the update are the fastest of those tried on this machine.

Shapes: P parameters, n samples of a client.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

Step = Callable[[Tensor, Tensor], None]
SumAll = Callable[[NDArray[np.float32]], None]

_GROUP = 32
_TRIAL_S = 0.4
_TRIAL_TURNS = 5
_EVALUATION_BATCHES = (100, 500)


class BareLoop:
    """One of the two processes."""

    def __init__(
        self,
        model: nn.Module,
        clients: Sequence[tuple[Tensor, Tensor]],
        test: tuple[Tensor, Tensor],
        share: int,
        num_shares: int,
        sum_all: SumAll,
        lr: float,
        batch_size: int,
    ) -> None:
        """Try the forms of a step, keep the fastest.

        Args:
            model: the model; its parameters become views of one vector.
            clients: (n, ...) inputs and (n,) labels of every client.
            test: the test set.
            share: which of the processes this is.
            num_shares: how many there are.
            sum_all: every process's buffer becomes the sum of them all.
            lr: step size.
            batch_size: samples a step.
        """
        self._model, self._lr, self._batch_size = model, lr, batch_size
        self._share, self._num_shares, self._sum_all = share, num_shares, sum_all
        params = list(model.parameters())
        self.vector = torch.cat([param.detach().reshape(-1) for param in params])
        self._gradient = torch.zeros_like(self.vector)
        start = 0
        for param in params:
            stop = start + param.numel()
            param.data = self.vector[start:stop].view_as(param)
            param.grad = self._gradient[start:stop].view_as(param)
            start = stop
        self._params = params
        self._clients, self._test = clients, test
        self.form = self._choose(clients[0])

    def round(self, cohort: Sequence[int]) -> None:
        """One round: this process's half of the cohort, the mean of all, in `vector`."""
        start = self.vector.clone()
        total = torch.zeros(len(start) + 1, device=start.device)
        for client_id in cohort[self._share :: self._num_shares]:
            inputs, labels = self._clients[client_id]
            self.vector.copy_(start)
            order = torch.randperm(len(labels), device=labels.device)
            x, y = inputs[order], labels[order]
            for i in range(0, len(labels), self._batch_size):
                self._step(x[i : i + self._batch_size], y[i : i + self._batch_size])
            total[:-1].add_(self.vector, alpha=len(labels))
            total[-1] += len(labels)
        host = total.cpu()
        self._sum_all(host.numpy())
        torch.div(total.copy_(host)[:-1], total[-1], out=self.vector)

    def grouped_round(self, cohort: Sequence[int]) -> None:
        """One round of clients of one step each: of 32 at a time the weighted sum of updates, without their models."""
        total = torch.zeros(len(self.vector) + 1, device=self.vector.device)
        own = cohort[self._share :: self._num_shares]
        for first in range(0, len(own), _GROUP):
            parts = [self._clients[client_id] for client_id in own[first : first + _GROUP]]
            x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            loss = functional.cross_entropy(self._model(x), y, reduction="sum")  # weight / samples is 1 for each client
            gradients = torch.autograd.grad(loss, self._params)
            total[:-1].add_(torch.cat([gradient.reshape(-1) for gradient in gradients]), alpha=-self._lr)
            total[-1] += len(y)
        host = total.cpu()
        self._sum_all(host.numpy())
        total.copy_(host)
        self.vector.add_(total[:-1] / total[-1])

    def evaluate(self) -> float:
        """Accuracy on the test set, each process one half."""
        inputs, labels = (each.tensor_split(self._num_shares)[self._share] for each in self._test)
        correct = np.zeros(1, np.float32)
        with torch.no_grad():
            for x, y in zip(*(torch.split(each, self._evaluation_batch) for each in (inputs, labels)), strict=True):
                correct += int((self._model(x).argmax(1) == y).sum())
        self._sum_all(correct)
        return float(correct[0]) / len(self._test[1])

    def _flat_step(self, x: Tensor, y: Tensor) -> None:
        self._gradient.zero_()
        functional.cross_entropy(self._model(x), y).backward()  # type: ignore[no-untyped-call]  # torch leaves it so
        self.vector.add_(self._gradient, alpha=-self._lr)

    def _optim_step(self, x: Tensor, y: Tensor) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(self._model(x), y).backward()  # type: ignore[no-untyped-call]  # torch leaves it so
        self._optimizer.step()

    def _choose(self, client: tuple[Tensor, Tensor]) -> str:
        """Time each form of a step in turns; lay the data out as the fastest wants them."""
        self._optimizer = torch.optim.SGD(self._params, lr=self._lr, foreach=True)
        images = client[0].dim() == 4 and any(isinstance(layer, nn.Conv2d) for layer in self._model.modules())
        formats = (torch.contiguous_format, torch.channels_last) if images else (torch.contiguous_format,)
        flat = [param.grad for param in self._params]
        spent: dict[tuple[str, torch.memory_format], list[float]] = {}
        before = self.vector.clone()
        for _ in range(_TRIAL_TURNS):
            for memory_format in formats:
                x = client[0][: self._batch_size].contiguous(memory_format=memory_format)
                y = client[1][: self._batch_size]
                for name, step in (("flat vector", self._flat_step), ("optim.SGD", self._optim_step)):
                    for param, grad in zip(self._params, flat, strict=True):
                        param.grad = grad if name == "flat vector" else None
                    begun, steps = time.perf_counter(), 0
                    while time.perf_counter() < begun + _TRIAL_S / _TRIAL_TURNS:
                        step(x, y)
                        steps += 1
                    _finish(x.device)
                    spent.setdefault((name, memory_format), []).append((time.perf_counter() - begun) / steps)
        self.vector.copy_(before)
        name, memory_format = min(spent, key=lambda form: float(np.median(spent[form])))
        for param, grad in zip(self._params, flat, strict=True):
            param.grad = grad if name == "flat vector" else None
        self._step: Step = self._flat_step if name == "flat vector" else self._optim_step
        if images:
            self._clients = [(x.contiguous(memory_format=memory_format), y) for x, y in self._clients]
            self._test = (self._test[0].contiguous(memory_format=memory_format), self._test[1])
        self._evaluation_batch = min(_EVALUATION_BATCHES, key=self._evaluation_s)
        return f"{name}, {str(memory_format).removeprefix('torch.').replace('_', ' ')}"

    def _evaluation_s(self, batch: int) -> float:
        """Seconds for a thousand test samples, the least of three."""
        inputs, spent = self._test[0][:1000], []
        with torch.no_grad():
            for _ in range(3):
                begun = time.perf_counter()
                for x in torch.split(inputs, batch):
                    self._model(x)
                _finish(inputs.device)
                spent.append(time.perf_counter() - begun)
        return min(spent)


def _finish(device: torch.device) -> None:
    """A GPU computes behind the program's back."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
