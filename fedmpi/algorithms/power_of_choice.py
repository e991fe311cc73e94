"""Power-of-choice: of some candidates, those with the largest losses train.

    mpirun -n 11 python -m fedmpi power_of_choice --dataset mnist --partition shards --candidates 30

Source: Cho, Wang and Joshi, "Client selection in federated learning: convergence analysis and power-of-choice selection
strategies", 2020, arXiv 2010.01243, section 4, pi_pow-d.
Deviations: candidates are drawn uniformly and weigh as many samples as they have (the paper draws them in proportion to
these and takes the plain mean), so that as many candidates as trained clients is FedAvg; then nobody is asked.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below: they load torch
    from fedmpi.launch import main

    raise SystemExit(main("fedmpi.algorithms.power_of_choice:PowerOfChoice"))

import math
from dataclasses import dataclass

import numpy as np

from fedmpi.algorithm import Client, Server
from fedmpi.config import RunConfig
from fedmpi.errors import ConfigError
from fedmpi.fedavg import FedAvg
from fedmpi.options import option


@dataclass(frozen=True)
class PowerOfChoiceConfig(RunConfig):
    """Options of power-of-choice."""

    candidates: int | None = option(
        None, "clients whose losses are asked for (default: twice the cohort)", "Algorithm", "[1, inf)"
    )

    @property
    def num_candidates(self) -> int:
        """The paper's d."""
        return min(2 * self.clients_per_round, self.num_clients) if self.candidates is None else self.candidates

    def check(self) -> None:
        """Refuse fewer candidates than are to train, or more than there are clients."""
        super().check()
        low, high = self.clients_per_round, self.num_clients
        if not low <= self.num_candidates <= high:
            raise ConfigError(
                f"--candidates must be in [{low}, {high}] (clients per round to --num-clients), got {self.candidates}"
            )


class PowerOfChoice(FedAvg):
    """FedAvg over the clients that fit the global model worst."""

    Config = PowerOfChoiceConfig
    config: PowerOfChoiceConfig

    def round(self, s: Server) -> None:
        """Ask d candidates for their losses; those with the largest train, and of equal ones the first."""
        cohort = s.sample(self.config.num_candidates)
        if len(cohort) > self.config.clients_per_round:
            told = s.ask(cohort, self.local_loss)
            worst = sorted(told, key=lambda client_id: told[client_id]["local_loss"], reverse=True)
            cohort = np.array(worst[: self.config.clients_per_round])
        mean = s.mean(cohort, self.client_update)
        s.step("w", mean.w, self.config.server_lr)
        s.step("b", mean.b)

    def local_loss(self, k: Client) -> None:
        """Tell F_k(w), the mean loss over the client's samples."""
        k.report(local_loss=k.evaluate().loss if k.num_samples else -math.inf)
