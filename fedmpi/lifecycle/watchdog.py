"""A thread of each rank that ends the job when a rank hangs, or when its time is over in the middle of a round.

A rank hangs if its steps stand still while it is not waiting for others: its own thread sees that, and prints where the
main thread is. A rank whose threads stand still too (stopped, or stuck in a system call that keeps Python's lock) shows
nothing new in the node's status: the other ranks of the node see that. Of a rank that is alone on another node the
server sees only that it does not answer, and the trainers see as much of the server.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from fedmpi.errors import EXIT_CRASH, EXIT_STOPPED
from fedmpi.lifecycle import progress
from fedmpi.lifecycle.exits import end_all
from fedmpi.lifecycle.status import PATIENCE, Silence, Status, status_of
from fedmpi.mpi import streams
from fedmpi.mpi.processes import SERVER_RANK, process_stat

if TYPE_CHECKING:
    from fedmpi.lifecycle.policies import StopPolicy
    from fedmpi.mpi.comm import Comm

_SET_UP_S = 600.0
"""The least that is too long in the set-up, whose steps nobody counts."""

_UNKNOWN = 10
"""A client of which nothing is known may take this many times longer."""

_LOOKS = 8  # in the time that a rank may be silent
_ENDING_S = 2.0  # to end all ranks
_STACK_S = 0.5  # until a rank that was asked for its stack has printed it


class Watchdog:
    """`with Watchdog(...)` around a job: its set-up, then, from `begin_rounds` to `stop`, the round loop."""

    def __init__(
        self,
        comm: Comm,
        timeout_s: float,
        set_up_s: float = _SET_UP_S,
        end: Callable[[Comm, str, int], object] = end_all,
    ) -> None:
        """Watch this rank and its node.

        Args:
            comm: this rank's end of the communicator.
            timeout_s: seconds a rank may be silent; 0: for ever.
            set_up_s: the same in the set-up, if it is more.
            end: ends all ranks, with a message and an exit code.
        """
        self._comm = comm
        self._policy: StopPolicy | None = None
        self._timeout_s, self._set_up_s = timeout_s, max(timeout_s, set_up_s)
        self._end_all = end
        self._begin(self._set_up_s)
        self._awake = self._looked = 0.0
        self._pause_s = min(1.0, timeout_s / _LOOKS) if timeout_s else 1.0
        self._stop = threading.Event()
        self._main, self._main_id = threading.main_thread().ident, threading.main_thread().native_id
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no standard error, or no such signal here
            faulthandler.register(signal.SIGUSR2, 2, all_threads=False)
        self._show(self._look())
        self._thread.start()
        return self

    def begin_rounds(self, policy: StopPolicy | None = None) -> None:
        """From now on `timeout_s` holds. On the server `policy` knows of the job's time."""
        self._policy = policy
        self._begin(self._timeout_s)

    def _begin(self, timeout_s: float) -> None:
        self._own = Silence(timeout_s)
        self._others = {rank: Silence(timeout_s) for rank in self._comm.node if rank != self._comm.rank}

    def stop(self) -> None:
        """Watch no more: the ranks are about to leave."""
        self._stop.set()
        self._thread.join()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        with contextlib.suppress(AttributeError):
            faulthandler.unregister(signal.SIGUSR2)

    def _run(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(self._pause_s):
            now = time.monotonic()
            if now - before > 2 * self._pause_s + 1:  # this process itself was stopped, or had no core
                for silence in (self._own, *self._others.values()):
                    silence.forget()
                self._awake = now
            before = now
            status = self._look()
            self._show(status)
            if status.overdue is not None:
                self._give_up(status.overdue)
            if self._timeout_s:
                self._check_own(status, now)
                self._check_node(status, now)
                self._check_far(status, now)
                if status.writes_for_s > max(self._timeout_s, PATIENCE * status.longest_write_s):
                    for_s = f"{status.writes_for_s:.0f} s"
                    self._end(f"a checkpoint has been under way to the disk for {for_s} (--stall-timeout)")

    def _look(self) -> Status:
        return status_of(self._comm, self._policy, _ENDING_S)

    def _show(self, status: Status) -> None:
        self._comm.status.show(f"{status.activity or 'starting'}, {status.steps} steps so far")

    def _silent_s(self, status: Status, now: float) -> float:
        return self._own.look(now if status.waits else (status.steps, status.activity), now)

    def _check_own(self, status: Status, now: float) -> None:
        silent_s = self._silent_s(status, now)
        if silent_s > self._own.limit_s / 4 and now - self._looked > self._own.limit_s / _LOOKS:
            self._looked = now
            progress.look()  # nobody counts the steps of a user's own loop; to look costs a pass over the model
            status = self._look()
            silent_s = self._silent_s(status, now)
        if silent_s <= self._own.limit_s:
            return
        if self._main_id is not None and streams.is_stuck(self._main_id):
            self._own.forget()  # it prints what nobody reads: a terminal that is stopped is no fault of the job's
            return
        frame = sys._current_frames().get(self._main or 0)
        stack = []
        while frame is not None:  # by hand: `traceback` reads the sources, and the disk may be what hangs
            stack.append(f'  File "{frame.f_code.co_filename}", line {frame.f_lineno}, in {frame.f_code.co_name}')
            frame = frame.f_back
        where = "\n".join(reversed(stack))
        silence = f"no progress for {silent_s:.0f} s, after {status.steps} steps"
        self._end(f"has made {silence} (--stall-timeout). It is at\n{where}")

    def _check_node(self, status: Status, now: float) -> None:
        for rank, (count, activity) in status.others.items():
            silent_s = self._others[rank].look(count, now)
            if silent_s > self._others[rank].limit_s:
                pid = self._comm.peers.get(rank)
                self._end(
                    f"rank {rank} (pid {pid or 'unknown'}) of this host has shown no sign of life for {silent_s:.0f} s"
                    f" (--stall-timeout): {activity}; {_state_of(pid)}"
                )

    def _check_far(self, status: Status, now: float) -> None:
        rank, since = status.waits_for
        by_server = self._comm.rank == SERVER_RANK
        if rank is None or rank in self._comm.node or not (by_server or rank == SERVER_RANK):
            return
        limit_s, pending = self._set_up_s, status.pending
        if pending is not None:  # the longest that a rank may take to answer
            client_s = max(self._timeout_s, PATIENCE * pending.longest_client_s)
            limit_s = client_s * (pending.clients_per_rank + 1) * (1 if pending.longest_client_s else _UNKNOWN)
        for_s = now - max(since, self._awake)
        if for_s > (1 if by_server else 2) * limit_s:  # the server itself waits for answers first
            self._end(f"rank {rank} of another host has not answered for {for_s:.0f} s (--stall-timeout)")

    def _give_up(self, reason: str) -> None:
        assert self._policy is not None
        note = threading.Thread(target=self._policy.checkpoints.note_stop, args=(reason,), daemon=True)
        note.start()
        note.join(_ENDING_S / 4)  # the disk may be what hangs
        self._end(reason, EXIT_STOPPED)

    def _end(self, message: str, exit_code: int = EXIT_CRASH) -> None:
        if not self._stop.is_set():
            self._end_all(self._comm, message, exit_code)


def _state_of(pid: int | None) -> str:
    """Return the state of a process of this host in words; it prints its stack if it can still do that."""
    state = process_stat(pid).state if pid else ""
    if not state:
        return "its state is unknown"
    if state in "Tt":
        return "it is stopped (SIGSTOP, or a debugger)"
    with contextlib.suppress(OSError):
        os.kill(pid or 0, signal.SIGUSR2)
        time.sleep(_STACK_S)
    if state == "D":
        return "it waits for a disk or a network file system"
    return "it is running, in code that keeps Python's lock; where, its stack above says"
