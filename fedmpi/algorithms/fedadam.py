"""FedAdam: the server takes a step of Adam along the clients' mean update.

    mpirun -n 11 python -m fedmpi fedadam --dataset mnist --server-lr 0.01

Source: Reddi et al., "Adaptive federated optimization", ICLR 2021, arXiv 2003.00295, algorithm 2.
Deviations: the mean is weighted by sample counts, as in the paper's experiments; float buffers take the plain mean;
--beta2 may be 1, which leaves v at tau^2.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below: they load torch
    from fedmpi.launch import main

    raise SystemExit(main("fedmpi.algorithms.fedadam:FedAdam"))

from dataclasses import dataclass

import torch

from fedmpi.algorithm import Server
from fedmpi.config import RunConfig
from fedmpi.fedavg import FedAvg
from fedmpi.options import option


@dataclass(frozen=True)
class FedAdamConfig(RunConfig):
    """FedAdam's options."""

    server_lr: float = option(0.01, "step size of the server's Adam", "Federation", "(0, inf)")
    beta1: float = option(0.9, "decay of the first moment", "Algorithm", "[0, 1)")
    beta2: float = option(0.99, "decay of the second moment", "Algorithm", "[0, 1]")
    tau: float = option(1e-3, "adaptivity, and root of the second moment's first value", "Algorithm", "(0, inf)")


class FedAdam(FedAvg):
    """m <- b1 m + (1 - b1) d, v <- b2 v + (1 - b2) d^2, w <- w + server_lr m / (sqrt(v) + tau), d the mean update."""

    Config = FedAdamConfig
    config: FedAdamConfig

    def round(self, s: Server) -> None:
        """Take one step of Adam, without a correction of its bias, in float64."""
        config = self.config
        mean = s.mean(s.sample(config.clients_per_round), self.client_update)
        m = s.state.setdefault("m", torch.zeros_like(mean.w))
        v = s.state.setdefault("v", torch.full_like(mean.w, config.tau**2))
        m.mul_(config.beta1).add_(mean.w, alpha=1 - config.beta1)
        v.mul_(config.beta2).addcmul_(mean.w, mean.w, value=1 - config.beta2)
        s.step("w", m / (v.sqrt() + config.tau), config.server_lr)
        s.step("b", mean.b)
