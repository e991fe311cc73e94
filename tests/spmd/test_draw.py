"""The queue from which idle trainers draw."""

from __future__ import annotations

import pytest

from fedmpi.mpi.setup import on_every_rank
from fedmpi.mpi.work_queue import WorkQueue


@pytest.mark.parametrize("least", [lambda _: 1, lambda place: 1 if place < 3 else 7])
def test_every_place_is_drawn_once_queue_after_queue(net, agree, least):
    queue = WorkQueue(net)
    for count in (10, 0, 3, 1000, 1):
        net.barrier()  # in a job: the order
        if net.is_server:
            queue.begin()
        net.barrier()
        drawn = []
        if not net.is_server or net.size == 1:
            drawn = [place for places in queue.draw(count, least) for place in places]
        held = on_every_rank(net, drawn)
        agree(sorted(place for each in held for place in each) == list(range(count)), held)
        agree(drawn == sorted(drawn), drawn)
    queue.close()
