"""Coordinate-wise trimmed mean: in each coordinate the server drops the clients with the largest and smallest values.

    mpirun -n 11 python -m fedmpi trimmed_mean --dataset mnist --trimmed-share 0.2

Source: Yin et al., "Byzantine-robust distributed learning: towards optimal statistical rates", ICML 2018, arXiv
1803.01498, algorithm 1, option II.
Deviations: a cohort's trained models are trimmed, where the paper's machines, all of them in each round, send one
full-batch gradient; the share is rounded down to whole clients; float buffers take the mean weighted by sample counts.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below: they load torch
    from fedmpi.launch import main

    raise SystemExit(main("fedmpi.algorithms.trimmed_mean:TrimmedMean"))

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from fedmpi.algorithm import Server
from fedmpi.config import RunConfig
from fedmpi.fedavg import FedAvg
from fedmpi.options import option


@dataclass(frozen=True)
class TrimmedMeanConfig(RunConfig):
    """Options of the trimmed mean."""

    trimmed_share: float = option(
        0.1, "share of the cohort dropped at each end of a coordinate; 0: the unweighted mean", "Algorithm", "[0, 0.5)"
    )


class TrimmedMean(FedAvg):
    """w <- w + server_lr (trimmed mean of the w_k - w)."""

    Config = TrimmedMeanConfig
    config: TrimmedMeanConfig

    def round(self, s: Server) -> None:
        """Sample a cohort, wait for all of it, step; clients are not weighted."""
        update = s.columns(s.sample(self.config.clients_per_round), self.client_update, self.trimmed)
        s.step("w", update.w, self.config.server_lr)
        s.step("b", update.b)

    def trimmed(self, values: Tensor, sent: Tensor) -> Tensor:
        """(B,) float64 means of (K, B) values without the smallest and largest of each column."""
        cut = int(Fraction(str(self.config.trimmed_share)) * len(values))  # 0.29 of 100 are 29
        return values.sort(0).values[cut : len(values) - cut].to(torch.float64).mean(0)
