"""The end of a rank that cannot go on: at once, with all others, with a true exit code and one message."""

from __future__ import annotations

import contextlib
import os
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from fedmpi.errors import EXIT_CRASH, EXIT_INTERRUPTED, FedmpiError
from fedmpi.mpi.streams import put

if TYPE_CHECKING:
    from fedmpi.mpi.comm import Comm

_READ_S = 3.0
"""A terminal or pipe that takes nothing for so long is not read."""


@contextmanager
def abort_on_crash(net: Comm) -> Iterator[None]:
    """End the job when one rank ends, at once, with a true exit code and one message; goes around all of a rank's work.

    That includes `sys.exit` and `os._exit` before the server has ended the job. An error that every rank raised
    alike (through `on_root` or `agree`) is told by rank 0; each rank then exits by itself.

    Raises:
        SystemExit: with the error's exit code, in that last case.
    """
    try:
        with _guarded_exit(net):
            yield
    except FedmpiError as error:
        if error.everywhere:
            if net.is_server:
                say_error(str(error))
            raise SystemExit(net.leave(error.exit_code)) from None
        end_all(net, str(error), error.exit_code)
    except KeyboardInterrupt:
        end_all(net, "interrupted (Ctrl-C): what finished rounds wrote is kept", EXIT_INTERRUPTED)
    except SystemExit as left:
        if net.over:
            raise
        end_all(net, f"left by sys.exit({left.code!r}) in mid-run", EXIT_CRASH)
    except BaseException:  # noqa: BLE001  # the one place: a crash of any kind must not leave the others waiting
        end_all(net, f"crashed\n{traceback.format_exc().rstrip()}", EXIT_CRASH)


@contextmanager
def _guarded_exit(net: Comm) -> Iterator[None]:
    """`os._exit` in this process ends the job: a launcher may take a rank that leaves with 0 for one that is done."""
    real, pid = os._exit, os.getpid()

    def guarded(status: int) -> NoReturn:
        if os.getpid() == pid and not net.over:
            end_all(net, f"left by os._exit({status}) in mid-run", status or EXIT_CRASH)
        real(status)

    os._exit = guarded
    try:
        yield
    finally:
        os._exit = real


def say_error(message: str) -> None:
    """Write an error as one line on standard error, in one write, whatever the terminal can encode."""
    say(f"error: {message}")


def say(message: str, patience_s: float = _READ_S) -> None:
    """Write a line as `say_error` does; also from within a signal handler."""
    with contextlib.suppress(OSError):  # nobody reads any more
        put(2, f"fedmpi: {' '.join(message.split())}\n".encode(errors="backslashreplace"), patience_s)


def end_all(net: Comm, message: str, exit_code: int) -> NoReturn:
    """End every rank with `exit_code`, from any thread.

    One message per node, in one write: others often fail for the same reason, or because of this failure.
    """
    activity = f", {net.activity}" if net.activity else ""
    where = f"[rank {net.rank}, host {socket.gethostname()}, pid {os.getpid()}{activity}]"
    net.last_words(f"fedmpi: {where} {message}\n")
    net.abort(exit_code)
