"""A queue of places from which idle trainers draw, a few at a time, without asking the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmpi.mpi.comm import Comm


class WorkQueue:
    """Places 0, 1, 2, ..., each of which one rank draws; a counter in the server's memory is all there is of it."""

    def __init__(self, comm: Comm) -> None:
        """Collective. Open the queue; one per communicator at a time, up to `close`, or the job's end."""
        self._comm = comm
        comm.open_counter()

    def begin(self) -> None:
        """Begin anew at place 0: on the server, before the order that tells trainers to draw."""
        self._comm.fetch_and_add(-self._comm.fetch_and_add(0))

    def draw(self, count: int, least: Callable[[int], int]) -> Iterator[range]:
        """One-sided. Yield places of `count` that no rank has drawn yet, in ascending order, until there are none.

        Args:
            count: places in the queue.
            least: the place about which the queue has arrived -> the least number of places to draw at a time.
        """
        place = 0
        while place < count:
            num_places = batch_size(count - place, self._comm.num_trainers, least(place))
            place = self._comm.fetch_and_add(num_places)
            if place < count:
                yield range(place, min(place + num_places, count))

    def close(self) -> None:
        """Collective. Give the counter back."""
        self._comm.close_counter()


def batch_size(num_left: int, num_trainers: int, least: int) -> int:
    """Return the number of places to draw with `num_left` left: many at first, fewer and fewer towards the end.

    At least `least`, but no more than half of a trainer's even share, so that nobody is left without.

    Source: Polychronopoulos and Kuck, "Guided self-scheduling", 1987; a smaller share, for the costliest come first.
    """
    return max(min(least, num_left // (2 * num_trainers)), num_left // (16 * num_trainers), 1)
