"""One finished round, as those who watch a run see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class RoundRecord:
    """One finished round. All but `timings` is the same on any number of ranks.

    Attributes:
        round_idx: from 0.
        cohort: clients that trained, ascending.
        num_samples: samples of the cohort.
        train_loss: sample-weighted mean of the clients' training losses; None when a client has none.
        accuracy: test accuracy after the round, in [0, 1]; None when the round was not evaluated.
        loss: test loss after the round; None likewise, or when not finite.
        bytes_down: what a real federation would send to clients.
        bytes_up: what they would send back.
        timings: seconds by part, each trainer's busy and idle seconds while clients train, the share of the trainers'
            time spent idle, and bytes through the server's MPI calls.
        reported: weighted means of what visits reported, by name; None: not finite.
    """

    round_idx: int
    cohort: list[int]
    num_samples: int
    train_loss: float | None
    accuracy: float | None
    loss: float | None
    bytes_down: int
    bytes_up: int
    timings: dict[str, Any]
    reported: Mapping[str, float | None] = field(default_factory=dict)


class Observer(Protocol):
    """Called on the server rank as rounds end."""

    def on_round(self, record: RoundRecord) -> None:
        """Called after each round."""

    def on_end(self, half: Any) -> None:
        """Called when training is over and did not fail; no rank has left yet. `half`: the server's half of the run."""
