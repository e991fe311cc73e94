"""The only importer of mpi4py: one rank's end of the job, with the few calls that the rest of fedmpi is made of.

Importing this module loads the MPI library; the first `Comm` starts MPI. In the round loop everything travels through
buffers; the pickled calls (`share`, `tell`) serve the set-up only. Every wait is a non-blocking call and `Waiting`.
"""

from __future__ import annotations

import operator
import os
import signal
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn, Self, TypeVar

import mpi4py
import numpy as np
from numpy.typing import NDArray

from fedmpi.errors import LaunchError, TransferError
from fedmpi.mpi.buffers import Form, as_bytes, check_buffer, described, pieces_of
from fedmpi.mpi.launcher import abort_through_hydra, check_launcher
from fedmpi.mpi.node_status import NOBODY, SAID, NodeStatus, status_bytes
from fedmpi.mpi.processes import SERVER_RANK, namespace, note_node_rank
from fedmpi.mpi.setup import require_form
from fedmpi.mpi.single_copy import avoid_single_copy
from fedmpi.mpi.stale_segments import remove_leftovers
from fedmpi.mpi.streams import settle, tell
from fedmpi.mpi.timeline import Timeline
from fedmpi.mpi.waiting import Pending, Waiting

os.environ.setdefault("OMPI_MCA_osc", "^ucx")  # Open MPI: our window is shared memory; UCX's only complains
os.environ.setdefault("UCX_DEBUG_SIGNO", "0")  # else UCX takes SIGHUP for the wish to print megabytes of its own log
mpi4py.rc.initialize = False  # first see whether the launcher belongs to the library: some pairs die in MPI_Init
mpi4py.rc.finalize = True
from mpi4py import MPI  # noqa: E402  # the settings above must come first

T = TypeVar("T")

_SUMMED = "float32 or float64 or int32 or int64"  # what every MPI library adds up
_ABORT_S = 3.0
_FLUSH_S = 1.0  # for what was printed before
_FORWARD_S = 0.25  # a launcher drops what a rank wrote if the abort reaches it before it has read the rank's pipe


class Comm:
    """One rank's end of the job's communicator.

    Attributes:
        rank: this process, 0 is the server.
        size: all processes.
        num_trainers: ranks that train: all but the server, or the server itself when it is alone.
        node: the ranks that share this rank's memory, ascending.
        peers: rank -> process id of the others of them, as far as this process can see them.
        one_node: True if all ranks share one node's memory.
        status: what the ranks of the node show each other.
        timeline: notes what this rank spends its time on, once it has begun.
        waiting: how this rank waits; how deeply it sleeps depends on the ranks per core.
        waits_for: the rank this one waits to hear from or to be heard by, if any, and since when (`time.monotonic`).
        activity: what this rank is doing, for the message of a crash, e.g. "client 7, round 3".
        pending: the order of the round at hand; None before the first.
        bytes_sent: payload this rank has put on the wire or taken from it, for the record of a round.
        over: True once the server has ended the job, so that this process may end.
    """

    def __init__(self, comm: MPI.Intracomm | None = None) -> None:
        """Collective. Start MPI, and duplicate `comm` (default: the world) so that nobody else's messages meet ours.

        Raises:
            LaunchError: this process was started by the launcher of another MPI library.
        """
        start_mpi()
        self._comm = (comm or MPI.COMM_WORLD).Dup()
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)
        self._counter: MPI.Win | None = None
        self.rank = self._comm.Get_rank()
        self.size = self._comm.Get_size()
        self.is_server = self.rank == SERVER_RANK
        self.num_trainers = max(1, self.size - 1)
        self.bytes_sent = 0
        self.activity = ""
        self.pending: Pending | None = None
        self.over = False
        self.timeline = Timeline()
        self.waits_for: tuple[int | None, float] = None, 0.0
        node = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        assert isinstance(node, MPI.Intracomm)
        processes = sorted(node.allgather((self.rank, os.getpid(), namespace("pid"))))
        self.node = [rank for rank, _, _ in processes]
        self.peers = {rank: pid for rank, pid, where in processes if rank != self.rank and where == namespace("pid")}
        if comm is None:
            note_node_rank(self.node, self.rank)
        self.status = self._open_status(node)
        node.Free()
        self.waiting = Waiting(self.peers)
        self.one_node = self.max_of(self.size - len(self.node)) == 0

    def _open_status(self, node: MPI.Intracomm) -> NodeStatus:
        """Collective among the ranks of `node`."""
        first = node.Get_rank() == 0
        self._window = MPI.Win.Allocate_shared(status_bytes(len(self.node)) if first else 0, 8, comm=node)
        memory, _ = self._window.Shared_query(0)
        status = NodeStatus(np.asarray(memory).view(np.uint8), self.node, self.rank)
        if first:
            status.clear()
        node.Barrier()
        return status

    @property
    def waits(self) -> bool:
        """True while this rank is waiting for others; any thread may ask."""
        return self.waiting.now

    # Buffers.

    def send(self, array: NDArray[Any], *ranks: int) -> None:
        """Send a contiguous buffer of at most `MAX_MESSAGE_BYTES` to each of `ranks`, at the same time.

        Raises:
            TransferError: on this rank, if the buffer is unfit.
        """
        check_buffer(array)
        requests = [(rank, self._comm.Isend(as_bytes(array), rank)) for rank in ranks]
        for rank, request in requests:
            self._wait_for(rank, request.Test)

    def receive(self, array: NDArray[Any], rank: int) -> None:
        """Receive what `rank` sends into a buffer of that size.

        Raises:
            TransferError: on this rank, if the buffer is unfit, or more or less has come than it holds.
        """
        check_buffer(array, written=True)
        status = MPI.Status()
        came: int | str = "more"
        try:
            self._wait_for(rank, partial(self._comm.Irecv(as_bytes(array), rank).Test, status))
            came = status.Get_count(MPI.BYTE)
        except MPI.Exception as error:
            if error.Get_error_class() != MPI.ERR_TRUNCATE:
                raise
        if came != array.nbytes:
            raise TransferError(f"rank {rank} sent {came} bytes; wanted are {array.nbytes}: {described(array)}")

    def _wait_for(self, rank: int, is_done: Callable[[], bool]) -> None:
        self.waits_for = rank, time.monotonic()
        self.waiting.until(is_done)
        self.waits_for = None, 0.0

    def max_of(self, value: int) -> int:
        """Collective. Return the largest of the ranks' values, on every rank."""
        return int(self.largest(np.array([operator.index(value)], np.int64))[0])

    def largest(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Collective. Return the largest of the ranks' values, entry by entry, on every rank."""
        largest = np.empty_like(values)
        self.waiting.until(self._comm.Iallreduce(values, largest, MPI.MAX).Test)
        return largest

    def sum_all(self, values: NDArray[Any], agreed: Form | None = None) -> None:
        """Collective. Make every rank's buffer the sum over all of them; float sums depend on the ranks.

        Args:
            values: float32, float64, int32 or int64, of the same dtype and shape on all ranks.
            agreed: as for `require_form`.

        Raises:
            TransferError: on every rank, if any rank's buffer is unfit or another.
        """
        require_form(self, agreed, "sum_all", values, _SUMMED, written=True)
        for piece in pieces_of(values):
            self.waiting.until(self._comm.Iallreduce(MPI.IN_PLACE, piece, MPI.SUM).Test)

    def barrier(self) -> None:
        """Collective. Return when all ranks are here; a patient wait, before a call that would spin."""
        self.waiting.until(self._comm.Ibarrier().Test)

    def try_alike(self, value: int, patience_s: float | None) -> bool | None:
        """Collective. Return True if all ranks pass the same value, None if not all are here within `patience_s`.

        After None, abort.
        """
        both, largest = np.array([value, -value], np.int64), np.empty(2, np.int64)
        if not self.waiting.until(self._comm.Iallreduce(both, largest, MPI.MAX).Test, patience_s):
            return None
        return bool(largest[0] == -largest[1])

    # The server's counter (see `work_queue`).

    def open_counter(self) -> None:
        """Collective. Make room for the counter; its first value may be any."""
        assert self._counter is None, "one at a time"
        self._counter = MPI.Win.Allocate(8 if self.is_server else 0, 8, comm=self._comm)
        self._counter.Lock_all()

    def fetch_and_add(self, operand: int) -> int:
        """One-sided. Add to the server's counter, and return the value before."""
        assert self._counter is not None, "open_counter comes first"
        value, before = np.array([operand], np.int64), np.empty(1, np.int64)
        self._counter.Fetch_and_op(value, before, SERVER_RANK, 0, MPI.SUM)
        self._counter.Flush(SERVER_RANK)  # done by this rank alone: within a node it is an atomic in shared memory
        return int(before[0])

    def close_counter(self) -> None:
        """Collective. Give the counter back, if there is one."""
        if self._counter is not None:
            self.barrier()  # a patient wait: the next line is collective
            self._counter.Unlock_all()
            self._counter.Free()
            self._counter = None

    # Python objects, for the set-up.

    def share(self, value: T) -> T:
        """Collective. Return the server's value, on every rank."""
        self.barrier()
        shared: T = self._comm.bcast(value, SERVER_RANK)
        return shared

    def tell(self, value: T) -> list[T]:
        """Collective. Return the ranks' values, by rank, on every rank."""
        self.barrier()
        return self._comm.allgather(value)

    def split(self, group: int) -> Self:
        """Collective. Return a communicator of the ranks that pass the same `group`, in the order of this one."""
        comm = self._comm.Split(group, self.rank)
        assert isinstance(comm, MPI.Intracomm)
        return type(self)(comm)

    # The end.

    def leave(self, exit_code: int) -> int:
        """Collective. All ranks are about to end with `exit_code`, which is returned; no more calls follow."""
        self.over = True
        self.close_counter()
        if exit_code and self.size > 1:
            self.barrier()  # the message is out before a launcher sees the first exit code
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # srun sends it at the first code, and would report 143
        return exit_code

    def close(self) -> None:
        """Collective. Give back what this end holds; MPI goes on."""
        self.close_counter()
        self._window.Free()
        self._comm.Free()

    def last_words(self, message: str) -> None:
        """Say why the job ends, unless another rank of this node does; returns once it is said. Sends nothing."""
        speaker = self.status.speaker
        if speaker[0] == NOBODY:
            speaker[0] = self.rank
            time.sleep(0.01)  # two ranks may claim in the same instant: the later write wins, and both see who
        if speaker[0] == self.rank:
            tell(message.encode(errors="backslashreplace"), _ABORT_S)
            time.sleep(_FORWARD_S)
            speaker[0] = SAID
        end = time.monotonic() + _ABORT_S
        while speaker[0] != SAID and time.monotonic() < end:
            time.sleep(0.01)

    def abort(self, exit_code: int) -> NoReturn:
        """End every rank at once; the launcher reports `exit_code`."""
        settle(_FLUSH_S)
        if abort_through_hydra(exit_code):
            time.sleep(_ABORT_S)
        if self.size == 1:  # there are no others to end, and MPI_Abort would have a line of its own
            self.over = True
            os._exit(exit_code)
        self._comm.Abort(exit_code)
        raise AssertionError("MPI_Abort returned")


def start_mpi() -> None:
    """Collective. Start MPI, unless that is done.

    Raises:
        LaunchError: this process was started by the launcher of another MPI library, or MPI has ended in it.
    """
    if MPI.Is_finalized():
        raise LaunchError("MPI is finalized in this process and cannot start again: start another process")
    library = MPI.Get_library_version()
    if not MPI.Is_initialized():
        check_launcher(library, None)
        remove_leftovers()
        avoid_single_copy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of mpi4py, on what is checked and refused below
            MPI.Init_thread(MPI.THREAD_SERIALIZED)  # one thread talks to MPI, not always the main one
    check_launcher(library, MPI.COMM_WORLD.Get_size())


def library_version() -> str:
    """Return the loaded MPI library in a few words, e.g. "MPICH 5.0.2" or "Open MPI 5.0.10"."""
    name, numbers = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, numbers))}"
