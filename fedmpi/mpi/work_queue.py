"""How many places of a queue a trainer takes at a time."""

from __future__ import annotations


def batch_size(num_left: int, num_trainers: int, least: int) -> int:
    """Return how many places a trainer draws with `num_left` left: many at first, fewer and fewer towards the end.

    At least `least`, but no more than half of its even share, so that nobody is left without.

    Source: Polychronopoulos and Kuck, "Guided self-scheduling", 1987; a smaller share, for the costliest come first.
    """
    return max(min(least, num_left // (2 * num_trainers)), num_left // (16 * num_trainers), 1)
