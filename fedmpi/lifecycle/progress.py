"""Signs of life: this process counts its steps, so that a watchdog can tell work that is slow from work that hangs.

What counts: batches and chunks that fedmpi itself takes, a step of any torch optimizer, and, where nothing has been
counted for a while, values of the watched model or its gradients that are not what they were (a user's loop that takes
its steps by hand). All else that takes long calls `beat`.
"""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING
from weakref import WeakSet

if TYPE_CHECKING:
    import torch

_steps = 0
_models: WeakSet[torch.nn.Module] = WeakSet()
_seen: object = None


def beat() -> None:
    """Count a step (a batch trained, a chunk evaluated). A loop of your own that takes minutes may call it."""
    global _steps
    _steps += 1


def steps() -> int:
    """Return the steps so far."""
    return _steps


def watch(model: torch.nn.Module) -> None:
    """From now on changes of `model`, and steps of any torch optimizer in this process, are signs of life."""
    _count_optimizer_steps()
    _models.add(model)


def look() -> None:
    """Count a step if a watched model has changed since the last look; any thread may look, nothing is written.

    Of a tensor on a GPU only its count of changes is looked at: another thread must not disturb what is queued there.
    """
    global _seen
    seen = [_state_of(tensor) for model in list(_models) for tensor in _tensors_of(model)]
    if _seen is not None and seen != _seen:
        beat()
    _seen = seen


def _tensors_of(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    for param in model.parameters():
        yield param
        if param.grad is not None:
            yield param.grad
    yield from model.buffers()


def _state_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Return its count of changes, which changes through `.data` leave out, and on CPU a checksum of its values."""
    changes = checksum = 0
    with contextlib.suppress(RuntimeError, TypeError):  # a kind of tensor that has no count, or no values at hand
        changes = tensor._version
        if tensor.device.type == "cpu":
            checksum = zlib.crc32(tensor.detach().numpy().ravel(order="K").data)
    return changes, checksum


@functools.cache
def _count_optimizer_steps() -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(lambda *_: beat())
