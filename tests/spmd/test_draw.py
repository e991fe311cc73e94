"""The line from which idle trainers draw."""

from __future__ import annotations


def test_every_place_is_drawn_once_round_after_round(net, agree):
    net.open_counter()
    for count in (10, 0, 3):
        drawn = []
        if not net.is_server or net.size == 1:
            while (place := net.draw(count)) is not None:
                drawn.append(place)
        held = net.on_every_rank(drawn)
        agree(sorted(place for each in held for place in each) == list(range(count)), held)
        agree(drawn == sorted(drawn), drawn)
