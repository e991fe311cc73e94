"""The fused engine's steps on a GPU, recorded once per batch size and replayed.

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

_KEPT_SETTINGS = 4
"""Settings (step size, prox, ...) whose recordings are kept: those last used."""


def record_cuda(work: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """Record a CUDA graph of `work`, which is run a few times beforehand."""
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
        """Over a model for `FusedEngine`; `record` makes a recording (tests without a GPU give another)."""
        self._record = record
        self._recordings: dict[tuple[object, ...], dict[int, _Recorded]] = {}
        self._constant_copy: Tensor | None = None
        super().__init__(model, lr, momentum, weight_decay)
        self._weights = [param.data for param in self._params]

    def _stored(self, constant: Tensor) -> Tensor:
        """Return a copy at an address that recordings know."""
        if self._constant_copy is None:
            self._constant_copy = torch.empty_like(constant)
        return self._constant_copy.copy_(constant)

    def _forget_momentum(self) -> None:
        """Zero velocities in place, as recordings know where they are, and take the recordings of this setting."""
        for velocity in self._velocity.values():
            velocity.zero_()
        setting = (self._lr, self._prox, self._constant is None, tuple(self._moving))
        self._recorded = self._recordings[setting] = self._recordings.pop(setting, {})
        if len(self._recordings) > _KEPT_SETTINGS:
            del self._recordings[next(iter(self._recordings))]

    def _stack_of(self, n: int) -> Stack:
        if n not in self._recorded:
            if len(self._recorded) == self.max_recorded:
                return super()._stack_of(n)
            self._recorded[n] = _Recorded(self._new_stack(n), self)
        return self._recorded[n]

    def recorded(self, work: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        """Record steps without having taken them."""
        weights = [weight.clone() for weight in self._weights]
        velocities = {address: velocity.clone() for address, velocity in self._velocity.items()}
        replay, result = self._record(work)
        for weight, kept in zip(self._weights, weights, strict=True):
            weight.copy_(kept)
        for address, velocity in self._velocity.items():
            velocity.copy_(velocities[address]) if address in velocities else velocity.zero_()
        return replay, result


class _Recorded:
    """A stack that is run once, from fixed memory, and replayed from then on."""

    def __init__(self, stack: Stack, engine: GraphEngine) -> None:
        self._stack, self._engine = stack, engine
        self._fixed: tuple[Tensor, ...] = ()

    def step(self, x: Tensor, targets: Tensor) -> Tensor:
        """See `fused.Stack`."""
        batch = (x, targets)
        if not self._fixed:
            self._fixed = tuple(tensor.clone() for tensor in batch)
            self._replay, self._log_p = self._engine.recorded(lambda: self._stack.step(*self._fixed))
        for fixed, tensor in zip(self._fixed, batch, strict=True):
            fixed.copy_(tensor)
        self._replay()
        return self._log_p.clone()
