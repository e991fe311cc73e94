"""Ctrl-C before the rounds: one line and exit code 130, from the first line of fedmpi on.

Libraries swallow a KeyboardInterrupt that meets their import, or make an ImportError or a crash of it. So nothing is
raised while they load: the process ends at once. This module is the first that `python -m fedmpi...` loads; it imports
nothing that takes time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import time
from types import FrameType, TracebackType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

EXIT_INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C

_RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID")
_SPEAKER_S = 0.25  # a launcher ends the job at the first exit code; by then rank 0 has spoken

_told = False


def is_own_program() -> bool:
    """Return True while `python -m fedmpi...` loads: its interrupts are ours, those of other programs are not."""
    if sys.argv[:1] != ["-m"]:  # Python's name for a module that it is about to find
        return False
    module = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
    return module.partition(".")[0] == "fedmpi"


def end_at_once() -> None:
    """From now on Ctrl-C ends this process with 130, before anything else runs; rank 0 says so in one line."""
    signal.signal(signal.SIGINT, _leave)


def call(act: Callable[[], NoReturn]) -> None:
    """From now on Ctrl-C calls `act`, which does not return."""
    signal.signal(signal.SIGINT, lambda _number, _frame: act())


def _leave(_number: int, _frame: FrameType | None) -> None:
    os._exit(leave())


def leave() -> int:
    """Say, once and on rank 0 only, that Ctrl-C ends the job, without asking MPI, which may not be there yet.

    Returns:
        The exit code.
    """
    global _told
    rank = next((os.environ[name] for name in _RANKS if name in os.environ), "0")
    if not _told and rank == "0":
        with contextlib.suppress(OSError):  # nobody reads
            os.write(2, b"fedmpi: error: interrupted (Ctrl-C)\n")
    elif not _told:
        time.sleep(_SPEAKER_S)
    if not _told:
        _end_others()
    _told = True
    return EXIT_INTERRUPTED


def _end_others() -> None:
    """Have MPICH's mpirun end all ranks: it waits for those in MPI_Init when one leaves that never came to it."""
    with contextlib.suppress(KeyError, ValueError, OSError):
        pmi = int(os.environ["PMI_FD"])
        if "MPI_LOCALNRANKS" in os.environ and stat.S_ISSOCK(os.fstat(pmi).st_mode):
            time.sleep(_SPEAKER_S)  # a launcher drops what it has not read from a rank's pipe when the abort comes
            os.write(pmi, f"cmd=abort exitcode={EXIT_INTERRUPTED}\n".encode())
            time.sleep(_SPEAKER_S)


class Raising:
    """`with Raising():` Ctrl-C raises a KeyboardInterrupt; one that was swallowed or replaced is raised at the end."""

    def __init__(self) -> None:
        """Begin before any interrupt."""
        self._seen = False

    def __enter__(self) -> Raising:
        self._before = signal.signal(signal.SIGINT, self._raise)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)
        if self._seen and kind is not KeyboardInterrupt:
            raise KeyboardInterrupt from None

    def _raise(self, _number: int, _frame: FrameType | None) -> None:
        self._seen = True
        raise KeyboardInterrupt
