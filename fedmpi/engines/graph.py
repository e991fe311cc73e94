"""The fused engine's steps on a GPU, recorded once a batch size and replayed.

A step of a small model is a few dozen kernels of microseconds; starting them one by one from Python takes longer than
they do. A CUDA graph starts them all at once. What is recorded reads and writes fixed memory: the batch is copied to
where it was recorded, weights and momenta are stepped in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedmpi.engines.fused import FusedEngine, Stack

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], Any], Tensor]]
"""Takes what to record; returns what does it again, and the tensor that then holds its result."""

_WARM_UP = 3  # CUDA's libraries set themselves up on the first calls, which cannot be recorded


def record_cuda(work: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """A CUDA graph of `work`, which is run a few times beforehand."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the GPU meanwhile
        result = work()
    return graph.replay, result


class GraphEngine(FusedEngine):
    """`FusedEngine`, recorded; the same bits as unrecorded."""

    max_recorded = 32
    """Batch sizes that are recorded, the first ones that come; steps of others are taken unrecorded."""

    def __init__(
        self, model: nn.Module, lr: float, momentum: float, weight_decay: float, record: Record = record_cuda
    ) -> None:
        """Over a model for `FusedEngine`; `record`: how (a seam for tests without a GPU)."""
        super().__init__(model, lr, momentum, weight_decay)
        self._record = record
        self._recorded: dict[int, _Recorded] = {}
        self._weights = [param.data for param in model.parameters()]

    def reset(self) -> None:
        """Forget the momentum, in place: recordings know where it is."""
        for velocity in self._velocity.values():
            velocity.zero_()

    def _stack_of(self, n: int) -> Stack:
        if n not in self._recorded:
            if len(self._recorded) == self.max_recorded:
                return super()._stack_of(n)
            self._recorded[n] = _Recorded(self._new_stack(n), self)
        return self._recorded[n]

    def recorded(self, work: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        """Record steps without having taken them."""
        weights = [weight.clone() for weight in self._weights]
        velocity = {address: each.clone() for address, each in self._velocity.items()}
        replay, result = self._record(work)
        for weight, kept in zip(self._weights, weights, strict=True):
            weight.copy_(kept)
        for address, each in self._velocity.items():
            each.copy_(velocity[address]) if address in velocity else each.zero_()
        return replay, result


class _Recorded:
    """A stack that is run once, from fixed memory, and replayed from then on."""

    def __init__(self, stack: Stack, engine: GraphEngine) -> None:
        self._stack, self._engine = stack, engine
        self._held: tuple[Tensor, ...] = ()

    def step(self, x: Tensor, targets: Tensor) -> Tensor:
        """See `fused.Stack`."""
        batch = (x, targets)
        if not self._held:
            self._held = tuple(each.clone() for each in batch)
            self._replay, self._log_p = self._engine.recorded(lambda: self._stack.step(*self._held))
        for held, each in zip(self._held, batch, strict=True):
            held.copy_(each)
        self._replay()
        return self._log_p.clone()
