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
from types import TracebackType
from typing import TYPE_CHECKING

from fedmpi.errors import EXIT_CRASH, EXIT_STOPPED
from fedmpi.lifecycle import progress
from fedmpi.lifecycle.exits import end_all
from fedmpi.mpi import streams
from fedmpi.mpi.processes import SERVER_RANK, process_stat

if TYPE_CHECKING:
    from fedmpi.lifecycle.policies import Boundary
    from fedmpi.mpi.comm import Comm

_PATIENCE = 3.0
"""A rank may be silent for this many times the longest silence after which it went on."""

_SET_UP_S = 600.0
"""The least that is too long in the set-up, whose steps nobody counts."""

_UNKNOWN = 10
"""So many times longer may a client take of which nothing is known."""

_LOOKS = 8  # in the time that a rank may be silent
_ENDING_S = 2.0  # what it takes to end all ranks
_STACK_S = 0.5  # until a rank that was asked for its stack has printed it


class Silence:
    """How long something has not changed, and how long it may."""

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s`: the least that is too long."""
        self._timeout_s = timeout_s
        self._longest_s = 0.0
        self._seen: object = None
        self._since: float | None = None

    def look(self, value: object, now: float) -> float:
        """Seconds for which `value` has not changed."""
        if self._since is None or value != self._seen:
            if self._since is not None:
                self._longest_s = max(self._longest_s, now - self._since)
            self._seen, self._since = value, now
        return now - self._since

    def forget(self) -> None:
        """The time up to the next look does not count."""
        self._since = None

    @property
    def limit_s(self) -> float:
        """How long is too long."""
        return max(self._timeout_s, _PATIENCE * self._longest_s)


class Watchdog:
    """`with Watchdog(...)` around a job: its set-up, then, from `begin_rounds` to `stop`, the round loop."""

    def __init__(self, net: Comm, timeout_s: float) -> None:
        """Watch this rank and its node.

        Args:
            net: this rank's end of the communicator.
            timeout_s: seconds a rank may be silent, `_SET_UP_S` at least in the set-up; 0: for ever.
        """
        self._net = net
        self._boundary: Boundary | None = None
        self._timeout_s = timeout_s
        self._begin(max(timeout_s, _SET_UP_S))
        self._awake = self._looked = 0.0
        self._pause_s = min(1.0, timeout_s / _LOOKS) if timeout_s else 1.0
        self._stop = threading.Event()
        self._main, self._main_id = threading.main_thread().ident, threading.main_thread().native_id
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no standard error, or no such signal here
            faulthandler.register(signal.SIGUSR2, 2, all_threads=False)
        self._show()
        self._thread.start()
        return self

    def begin_rounds(self, boundary: Boundary | None = None) -> None:
        """From now on `timeout_s` holds. On the server `boundary` knows of the job's time."""
        self._boundary = boundary
        self._begin(self._timeout_s)

    def _begin(self, timeout_s: float) -> None:
        self._own = Silence(timeout_s)
        self._others = {rank: Silence(timeout_s) for rank in self._net.node if rank != self._net.rank}

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
            self._show()
            if self._boundary is not None:
                self._check_time(self._boundary)
            if self._timeout_s:
                self._check_own(now)
                self._check_node(now)
                self._check_far(now)
            if self._timeout_s and self._boundary is not None:
                self._check_disk(self._boundary)

    def _show(self) -> None:
        self._net.status.show(f"{self._net.activity or 'starting'}, {progress.steps()} steps so far")

    def _check_own(self, now: float) -> None:
        silent_s = self._own.look(now if self._net.waits else (progress.steps(), self._net.activity), now)
        if silent_s > self._own.limit_s / 4 and now - self._looked > self._own.limit_s / _LOOKS:
            self._looked = now
            progress.look()  # nobody counts the steps of a user's own loop; to look costs a pass over the model
        steps = progress.steps()
        silent_s = self._own.look(now if self._net.waits else (steps, self._net.activity), now)
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
        self._end(
            f"has made no progress for {silent_s:.0f} s, after {steps} steps (--stall-timeout). It is at\n{where}"
        )

    def _check_node(self, now: float) -> None:
        for rank, silence in self._others.items():
            count, doing = self._net.status.read(rank)
            silent_s = silence.look(count, now)
            if silent_s > silence.limit_s:
                pid = self._net.peers.get(rank)
                self._end(
                    f"rank {rank} (pid {pid or 'unknown'}) of this host has shown no sign of life for {silent_s:.0f} s"
                    f" (--stall-timeout): {doing}; {_how_it_is(pid)}"
                )

    def _check_far(self, now: float) -> None:
        rank, since = self._net.waits_for
        by_server = self._net.rank == SERVER_RANK
        if rank is None or rank in self._net.node or not (by_server or rank == SERVER_RANK):
            return
        for_s = now - max(since, self._awake)
        if for_s > (1 if by_server else 2) * self._answer_s():  # the server itself waits for answers first
            self._end(f"rank {rank} of another host has not answered for {for_s:.0f} s (--stall-timeout)")

    def _answer_s(self) -> float:
        """How long a rank may take to answer the order of the round at hand."""
        pending = self._net.pending
        if pending is None:
            return max(self._timeout_s, _SET_UP_S)
        client_s = max(self._timeout_s, _PATIENCE * pending.longest_client_s)
        return client_s * (pending.clients_per_rank + 1) * (1 if pending.longest_client_s else _UNKNOWN)

    def _check_disk(self, boundary: Boundary) -> None:
        writes_s, longest_s = boundary.writes_for_s()
        if writes_s > max(self._timeout_s, _PATIENCE * longest_s):
            self._end(f"a checkpoint has been under way to the disk for {writes_s:.0f} s (--stall-timeout)")

    def _check_time(self, boundary: Boundary) -> None:
        reason = boundary.overdue(_ENDING_S)
        if reason is not None:
            self._end(reason, EXIT_STOPPED)

    def _end(self, message: str, exit_code: int = EXIT_CRASH) -> None:
        if not self._stop.is_set():
            end_all(self._net, message, exit_code)


def _how_it_is(pid: int | None) -> str:
    """The state of a process of this host; prints its stack if it can still do that."""
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
