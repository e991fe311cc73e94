"""`python -m tests.e2e.killer RANK POINT NTH OPTION ...`: FedAvg, in which rank RANK kills itself at a point.

A point is `module:Class.method`, or `module:function`, with `<` before it for its beginning, `>` for its end and `/`
for its middle: after half of what it writes.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
from typing import Any


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Half:
    """A file of which only half of the largest piece arrives."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, content: Any) -> None:
        if len(content) > 150:
            self.file.write(bytes(content)[: len(content) // 2])
            self.file.flush()
            die()
        self.file.write(content)


def plant(point: str, nth: int) -> None:
    """Die at the `nth` passage of the point, counted from 1."""
    where, (module, _, name) = point[0], point[1:].partition(":")
    *owner, attribute = name.split(".")
    home = functools.reduce(getattr, owner, importlib.import_module(module))
    real, passages = getattr(home, attribute), 0

    @functools.wraps(real)
    def mined(*args: Any, **kwargs: Any) -> Any:
        nonlocal passages
        passages += 1
        if passages == nth and where == "<":
            die()
        if passages == nth and where == "/":
            args = tuple(Half(each) if hasattr(each, "write") else each for each in args)
        result = real(*args, **kwargs)
        if passages == nth and where == ">":
            die()
        return Half(result) if passages == nth and where == "/" and hasattr(result, "write") else result

    setattr(home, attribute, mined)
    for name, loaded in list(sys.modules.items()):
        if name.startswith("fedmpi.") and getattr(loaded, attribute, None) is real:  # imported by its name
            setattr(loaded, attribute, mined)


def main() -> int:
    rank, point, nth, *options = sys.argv[1:]
    announced = next((os.environ[name] for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK") if name in os.environ), "0")
    if announced == rank:
        import fedmpi.job  # noqa: F401  # it holds names of what is patched

        plant(point, int(nth))
    from fedmpi.launch import main as launch

    return launch("fedmpi.fedavg:FedAvg", argv=options)


if __name__ == "__main__":
    sys.exit(main())
