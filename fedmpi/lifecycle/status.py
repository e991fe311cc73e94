"""The status of a rank: all that its watchdog decides by, read in one place."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from fedmpi.lifecycle import progress

if TYPE_CHECKING:
    from fedmpi.lifecycle.policies import StopPolicy
    from fedmpi.mpi.comm import Comm
    from fedmpi.mpi.waiting import Pending


class Status(NamedTuple):
    """One look at a rank, from another thread.

    Attributes:
        steps: signs of life so far, see `progress`.
        activity: the work at hand, e.g. "client 7, round 3"; empty in the set-up.
        waits: True while the rank waits for others.
        waits_for: the rank that it waits for, if it is one, and since when (`time.monotonic`).
        pending: the order that the ranks are working on; None before the first.
        others: counter and text that the other ranks of this node show, by rank.
        writes_for_s: seconds for which a checkpoint has been under way to the disk; 0: none is.
        longest_write_s: the longest that one has taken.
        overdue: why to give up the round under way; None: go on.
    """

    steps: int
    activity: str
    waits: bool
    waits_for: tuple[int | None, float]
    pending: Pending | None
    others: dict[int, tuple[int, str]]
    writes_for_s: float = 0.0
    longest_write_s: float = 0.0
    overdue: str | None = None


def status_of(comm: Comm, policy: StopPolicy | None, ending_s: float) -> Status:
    """Return the status of this rank.

    Args:
        comm: this rank's end of the communicator.
        policy: of the server, in the rounds; None elsewhere.
        ending_s: seconds that the end of all ranks takes.
    """
    others = {rank: comm.status.read(rank) for rank in comm.node if rank != comm.rank}
    status = Status(progress.steps(), comm.activity, comm.waits, comm.waits_for, comm.pending, others)
    if policy is None:
        return status
    writes_for_s, longest_s = policy.checkpoints.writes_for_s, policy.checkpoints.longest_s
    return status._replace(writes_for_s=writes_for_s, longest_write_s=longest_s, overdue=policy.overdue(ending_s))
