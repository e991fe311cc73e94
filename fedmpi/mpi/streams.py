"""Standard output and error that may be closed, full, or read by nobody. No call here waits longer than it is told.

A pipe that nobody reads (a stopped terminal, a launcher whose own output is stuck) takes 64 KiB and then blocks whoever
writes. A pipe that is said to have room takes `select.PIPE_BUF` bytes without blocking.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TextIO


def reserve() -> None:
    """Put /dev/null where standard input, output or error is closed, so that no file of ours gets that number."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


def has_room(descriptor: int, patience_s: float = 0.0) -> bool:
    """Return True once a write to `descriptor` would not block, or fail at once; False after `patience_s`."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(1e3 * patience_s))


def put(descriptor: int, data: bytes, patience_s: float = 0.0) -> int:
    """Write until all is written or nothing has been taken for `patience_s`; return the number of bytes written.

    Raises:
        OSError: the descriptor is closed, its disk is full, or its reader has left.
    """
    done = 0
    while done < len(data) and has_room(descriptor, patience_s):
        done += os.write(descriptor, data[done : done + select.PIPE_BUF])
    return done


def show(stream: TextIO | None, text: str) -> None:
    """Write to a stream, if it is there and takes it."""
    if stream is not None:
        try:
            stream.write(text)
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                drop(stream.fileno())  # else Python tries again at its end, and exits with 120


def tell(data: bytes, patience_s: float) -> None:
    """Write to standard error from a thread of its own, so that nothing can hold the caller for longer."""

    def write() -> None:
        with contextlib.suppress(OSError):  # nobody reads any more
            put(2, data, patience_s)

    _within(patience_s, write)


def settle(patience_s: float) -> None:
    """Flush what was printed; what is not taken in that time is dropped, and decides no exit code."""
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        if stream is not None:
            if not has_room(descriptor, patience_s):
                drop(descriptor)
            _within(patience_s, functools.partial(_flush, stream, descriptor))


def drop(descriptor: int) -> None:
    """Drop what is written to `descriptor` from now on."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _flush(stream: TextIO, descriptor: int) -> None:
    try:
        stream.flush()
    except OSError:  # a full disk, or a reader that has left: Python would try again at its end, and exit with 120
        drop(descriptor)
    except ValueError:  # closed
        pass


def is_stuck(thread: int) -> bool:
    """Return True if a thread of this process (its native id) writes to standard output or error, which take nothing.

    Where the system does not say what a thread is in, that the streams take nothing has to do.
    """
    stuck = [descriptor for descriptor in (1, 2) if not has_room(descriptor)]
    if not stuck:
        return False
    try:
        words = Path(f"/proc/self/task/{thread}/syscall").read_text(encoding="ascii").split()
        return len(words) > 1 and int(words[1], 16) in stuck  # its first argument
    except (OSError, ValueError):
        return True


def _within(seconds: float, work: Callable[[], None]) -> None:
    """Run `work` in a thread, and wait for it no longer than that."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
