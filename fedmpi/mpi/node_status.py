"""The status of a node's ranks, in memory that they share: no call of MPI, so any thread may look.

The memory holds one integer, the rank that says why the job ends, and per rank a slot: a counter, and a line of text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NOBODY, SAID = -1, -2

_SLOT_BYTES = 256
_HEAD_BYTES = 16  # of a slot: its counter, and the length of its text


def status_bytes(num_ranks: int) -> int:
    """Return the size of the memory for so many ranks."""
    return 8 + num_ranks * _SLOT_BYTES


class NodeStatus:
    """One rank's view of the shared memory.

    Attributes:
        speaker: (1,) int64: the rank that says why the job ends; `NOBODY` so far; `SAID` once it is said.
    """

    def __init__(self, memory: NDArray[np.uint8], ranks: Sequence[int], rank: int) -> None:
        """`memory`: of `status_bytes(len(ranks))`, the same on all `ranks`, one of which is `rank`."""
        self.speaker: NDArray[np.int64] = memory[:8].view(np.int64)
        slots = memory[8 : status_bytes(len(ranks))].reshape(len(ranks), _SLOT_BYTES)
        self._slots = dict(zip(ranks, slots, strict=True))
        self._own = self._slots[rank]

    def clear(self) -> None:
        """Empty the memory: one rank does, before the others look."""
        self.speaker[0] = NOBODY
        for slot in self._slots.values():
            slot[:] = 0

    def show(self, text: str) -> None:
        """Count on, and show what this rank is doing."""
        content = text.encode()[: _SLOT_BYTES - _HEAD_BYTES]
        head = self._own[:_HEAD_BYTES].view(np.int64)
        self._own[_HEAD_BYTES : _HEAD_BYTES + len(content)] = np.frombuffer(content, np.uint8)
        head[1] = len(content)
        head[0] += 1

    def read(self, rank: int) -> tuple[int, str]:
        """Return the counter and the text of a rank of this node."""
        count, length = self._slots[rank][:_HEAD_BYTES].view(np.int64).tolist()
        text = self._slots[rank][_HEAD_BYTES : _HEAD_BYTES + length].tobytes()
        return count, text.decode(errors="replace")
