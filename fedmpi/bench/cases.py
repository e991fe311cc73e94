"""Cases to measure: federations on MNIST whose rounds a bare loop takes too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedmpi.config import RunConfig


@dataclass(frozen=True)
class Case:
    """One federation.

    Attributes:
        model: the model.
        num_clients: clients, 60,000 samples spread evenly over them.
        cohort_size: clients a round.
        rounds: rounds in one timed block.
    """

    model: str
    num_clients: int
    cohort_size: int
    rounds: int

    def config(self, device: Literal["auto", "cpu", "cuda"]) -> RunConfig:
        """Its options: B = 10, E = 1, lr 0.1, an evaluation each round."""
        return RunConfig(
            dataset="mnist",
            model=self.model,
            num_clients=self.num_clients,
            cohort_size=self.cohort_size,
            rounds=self.rounds,
            device=device,
        )


CASES = {
    "2nn": Case("2nn", 100, 10, rounds=4),
    "cnn": Case("cnn", 100, 10, rounds=1),
    "k1000": Case("2nn", 1000, 100, rounds=4),
    "k10000": Case("2nn", 10_000, 1000, rounds=4),
}
