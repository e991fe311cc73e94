"""This process among others: its age, and the ranks that share its node."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


class NodeRank(NamedTuple):
    """A rank, and the ranks of its node in ascending order, itself among them."""

    node: Sequence[int]
    rank: int


_own = NodeRank((0,), 0)


def note_node_rank(node: Sequence[int], rank: int) -> None:
    """Remember this process's rank in the job, for code that has no communicator at hand."""
    global _own
    _own = NodeRank(node, rank)


def own_node_rank() -> NodeRank:
    """Return this process's rank; rank 0 alone on its node before MPI is started."""
    return _own


def process_age_s() -> float:
    """Return the seconds since this process was started, as Linux tells them; 0 where it does not."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        with open("/proc/self/stat", encoding="utf-8") as file:  # noqa: PTH123  # no pathlib before it is needed
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    return 0.0
