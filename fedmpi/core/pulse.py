"""Signs of life: this process counts its steps, so that a watchdog can tell work that is slow from work that hangs."""

from __future__ import annotations

_steps = 0


def beat() -> None:
    """Another step (a batch trained, a chunk evaluated) is done. A loop of your own that takes minutes may call it."""
    global _steps
    _steps += 1


def steps() -> int:
    """Steps so far."""
    return _steps
