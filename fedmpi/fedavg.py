"""FedAvg: clients run local SGD, the server takes the sample-weighted mean of where they got to.

    mpirun -n 11 python -m fedmpi.fedavg --dataset mnist

Source: McMahan et al., "Communication-efficient learning of deep networks from decentralized data", AISTATS 2017,
arXiv 1602.05629, algorithm 1; with --server-lr: Reddi et al., arXiv 2003.00295, algorithm 1.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below: --help and a wrong option need no torch
    from fedmpi.config import RunConfig
    from fedmpi.launch import main

    raise SystemExit(main("fedmpi.fedavg:FedAvg", RunConfig))

from fedmpi.algorithm import Algorithm, Client, Server
from fedmpi.config import RunConfig


class FedAvg(Algorithm[RunConfig]):
    """w <- w + server_lr x sum_k (n_k / n) (w_k - w), where w_k is what ClientUpdate(k, w) returns."""

    def round(self, s: Server) -> None:
        """Sample a cohort, wait for all of it, step; float buffers take the plain mean."""
        mean = s.mean(s.sample(self.config.clients_per_round), self.client_update)
        s.step("w", mean.w, self.config.server_lr)
        s.step("b", mean.b)

    def client_update(self, k: Client) -> None:
        """B <- batches of size B; for each epoch, for each batch b: w <- w - lr grad l(w; b)."""
        k.sgd()
