"""The status of a rank: all that its watchdog decides by, read in one place."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from fedmpi.lifecycle import progress

if TYPE_CHECKING:
    from fedmpi.lifecycle.policies import StopPolicy
    from fedmpi.mpi.comm import Comm
    from fedmpi.mpi.waiting import Pending


PATIENCE = 3.0
"""A rank may be silent for this many times the longest silence after which it went on."""


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


class Silence:
    """The time for which a value has not changed, and the time for which it may."""

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s`: the least that is too long."""
        self._timeout_s = timeout_s
        self._longest_s = 0.0
        self._seen: object = None
        self._since: float | None = None

    def look(self, value: object, now: float) -> float:
        """Return the seconds for which `value` has not changed."""
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
        """The seconds after which it is too long."""
        return max(self._timeout_s, PATIENCE * self._longest_s)
