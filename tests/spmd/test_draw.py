"""The line from which idle trainers draw."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("least", [lambda _: 1, lambda place: 1 if place < 3 else 7])
def test_every_place_is_drawn_once_line_after_line(net, agree, least):
    net.open_line()
    for count in (10, 0, 3, 1000, 1):
        net.barrier()  # in a job: the order
        if net.is_server:
            net.begin_line()
        net.barrier()
        drawn = []
        if not net.is_server or net.size == 1:
            drawn = [place for places in net.draw(count, least) for place in places]
        held = net.on_every_rank(drawn)
        agree(sorted(place for each in held for place in each) == list(range(count)), held)
        agree(drawn == sorted(drawn), drawn)
    net.close_line()
