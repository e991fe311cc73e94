"""Patient waits: a rank polls, and sleeps in between, because a blocked MPI call spins and would steal a core.

Short waits end with little delay and long ones cost little: a rank sleeps for a tenth of what it has waited so far, up
to a limit that depends on how many ranks share a core.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from fedmpi.errors import PeerLostError

_SPIN_S = 3e-4  # a message that is on its way arrives within this time
_SHARE = 0.1
_LONGEST_SLEEP_S = 1e-4  # where every rank has a core of its own
_LONGEST_CROWDED_S = 3e-4  # per rank of a core
_LONGEST_OF_ALL_S = 1e-3
_PEER_CHECK_S = 1.0


class Pending(NamedTuple):
    """The order that the ranks are working on: the most clients of a rank, and the longest that one may take.

    0 s: unknown.
    """

    clients_per_rank: int
    longest_client_s: float


class Waiting:
    """The patience of one rank.

    Attributes:
        ranks_per_core: of this node.
        now: True while this rank is waiting, for the eyes of other threads.
    """

    def __init__(self, peers: Mapping[int, int]) -> None:
        """`peers`: rank -> process id of this node's other ranks, to notice one that is gone."""
        self._peers = peers
        self.ranks_per_core = 2.0
        self.now = False

    def until(self, is_done: Callable[[], bool], patience_s: float | None = None) -> bool:
        """Return True once `is_done`, which makes progress, does so, or False after `patience_s`.

        Raises:
            PeerLostError: a rank of this node died, and its launcher does not see to it.
        """
        crowded_s = min(_LONGEST_CROWDED_S * self.ranks_per_core, _LONGEST_OF_ALL_S)
        longest_s = crowded_s if self.ranks_per_core > 1 else _LONGEST_SLEEP_S
        started = time.monotonic()
        next_check = started + _PEER_CHECK_S
        self.now = True
        while not is_done():
            now = time.monotonic()
            waited = now - started
            if waited < _SPIN_S:
                os.sched_yield()
                continue
            if patience_s is not None and waited > patience_s:
                self.now = False
                return False
            if now > next_check:
                self._check_peers()
                next_check = now + _PEER_CHECK_S
            time.sleep(min(_SHARE * waited, longest_s))
        self.now = False
        return True

    def _check_peers(self) -> None:
        for rank, pid in self._peers.items():
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                raise PeerLostError(f"rank {rank} (pid {pid}) is gone without a word") from None
            except PermissionError:
                continue
