"""MimeLite with momentum: clients mix the server's momentum into their steps, and leave it as it is.

    mpirun -n 11 python -m fedmpi mime_lite --dataset mnist --partition shards --client-lr 0.01

Source: Karimireddy et al., "Mime: mimicking centralized stochastic algorithms in federated learning", NeurIPS 2021,
arXiv 2008.03606, algorithm 1 (MimeLite), with SGDm of its table 1 as the base optimizer.
Deviations: both means are weighted by sample counts; weight decay is a part of each client's loss.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below: they load torch
    from fedmpi.launch import main

    raise SystemExit(main("fedmpi.algorithms.mime_lite:MimeLite"))

from dataclasses import dataclass

from fedmpi.algorithm import Algorithm, Client, Server
from fedmpi.config import RunConfig
from fedmpi.errors import ConfigError
from fedmpi.options import option


@dataclass(frozen=True)
class MimeLiteConfig(RunConfig):
    """MimeLite's options."""

    server_momentum: float = option(0.9, "beta, the momentum of the server; 0: FedAvg", "Algorithm", "[0, 1)")

    def check(self) -> None:
        """Refuse a second momentum."""
        super().check()
        if self.client_momentum:
            raise ConfigError(f"MimeLite's momentum is --server-momentum: --client-momentum {self.client_momentum}")


class MimeLite(Algorithm[MimeLiteConfig]):
    """Clients: y <- y - lr ((1 - beta) g(y) + beta m); server: m <- beta m + (1 - beta) (mean of grad f_k(w))."""

    Config = MimeLiteConfig
    extra = {"momentum": ("T", "down"), "gradient": ("T", "up")}

    def round(self, s: Server) -> None:
        """Take FedAvg's step, and move the momentum by the clients' gradients at the model that they were sent."""
        mean = s.mean(s.sample(self.config.clients_per_round), self.client_update)
        s.step("w", mean.w, self.config.server_lr)
        s.step("b", mean.b)
        s.step("momentum", mean["gradient"] - s.model["momentum"], 1 - self.config.server_momentum)

    def client_update(self, k: Client) -> None:
        """Take the steps; then form the gradient over all of the client's samples, at the model that was sent."""
        beta, decay = self.config.server_momentum, self.config.client_weight_decay
        drift = k.sent["momentum"] * (beta / (1 - beta)) if beta else None
        k.sgd(drift=drift, lr=(1 - beta) * self.config.client_lr)
        gradient = k.back["gradient"].copy_(k.sent.w).mul_(decay)
        for batch in k.batches(epochs=1):
            gradient.add_(k.gradient(batch, at=k.sent.w), alpha=len(batch.labels) / k.num_samples)
