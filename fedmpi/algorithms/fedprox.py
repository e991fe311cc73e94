"""FedProx: FedAvg whose clients are pulled towards the model that they were sent.

    mpirun -n 11 python -m fedmpi fedprox --dataset mnist --partition shards --mu 0.1

Source: Li et al., "Federated optimization in heterogeneous networks", MLSys 2020, arXiv 1812.06127, algorithm 2.
Deviations: clients are drawn uniformly and weigh as many samples as they have (the paper draws them in proportion to
these and takes the plain mean); the inexact solver is --local-epochs of SGD, the same for all clients.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below: they load torch
    from fedmpi.launch import main

    raise SystemExit(main("fedmpi.algorithms.fedprox:FedProx"))

from dataclasses import dataclass

from fedmpi.algorithm import Client
from fedmpi.config import RunConfig
from fedmpi.fedavg import FedAvg
from fedmpi.options import option


@dataclass(frozen=True)
class FedProxConfig(RunConfig):
    """FedProx's options."""

    mu: float = option(0.01, "weight of the proximal term; 0: FedAvg", "Algorithm", "[0, inf)")


class FedProx(FedAvg):
    """Each client minimises F_k(w) + mu / 2 |w - w_t|^2 from the global model w_t."""

    Config = FedProxConfig
    config: FedProxConfig

    def client_update(self, k: Client) -> None:
        """Take FedAvg's steps along grad l(w; b) + mu (w - w_t)."""
        k.sgd(prox=self.config.mu)
