"""Per-FedAvg: clients train the model that is best after one step of each client's own.

    mpirun -n 11 python -m fedmpi per_fedavg --dataset mnist --partition shards --inner-lr 0.05

Source: Fallah, Mokhtari and Ozdaglar, "Personalized federated learning with theoretical guarantees: a model-agnostic
meta-learning approach", NeurIPS 2020, arXiv 2002.07948, algorithm 1, with (FO) and (HF) of its section 5.
Deviations: the paper's three independent batches of a step come from passes over the client's samples in three orders;
the mean is weighted by sample counts.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below: they load torch
    from fedmpi.launch import main

    raise SystemExit(main("fedmpi.algorithms.per_fedavg:PerFedAvg"))

from dataclasses import dataclass

from fedmpi.algorithm import Client
from fedmpi.config import RunConfig
from fedmpi.errors import ConfigError
from fedmpi.fedavg import FedAvg
from fedmpi.options import option


@dataclass(frozen=True)
class PerFedAvgConfig(RunConfig):
    """Options of Per-FedAvg; --client-lr is the paper's beta."""

    inner_lr: float = option(0.01, "alpha, step size of a client's own step; 0: FedAvg", "Algorithm", "[0, inf)")
    hessian_delta: float = option(
        0.0, "width of the differences that stand for the Hessian (HF), e.g. 0.001; 0: leave it out (FO)", "Algorithm",
        "[0, inf)",
    )  # fmt: skip

    def check(self) -> None:
        """Refuse what the steps do not have."""
        super().check()
        if self.client_momentum or self.client_weight_decay:
            raise ConfigError("Per-FedAvg has no --client-momentum and no --client-weight-decay: leave them at 0")


class PerFedAvg(FedAvg):
    """Each client takes steps of SGD on f_k(w - alpha grad f_k(w))."""

    Config = PerFedAvgConfig
    config: PerFedAvgConfig

    def client_update(self, k: Client) -> None:
        """Step w <- w - beta (I - alpha H(w; D'')) grad f(w - alpha grad f(w; D); D')."""
        alpha, delta, w = self.config.inner_lr, self.config.hessian_delta, k.back.w
        for batch, inner, curved in zip(k.batches(), k.batches(), k.batches(), strict=True):
            own = w - alpha * k.gradient(inner) if alpha else None
            gradient = k.gradient(batch, at=own)
            if alpha and delta:
                ahead = k.gradient(curved, at=w + delta * gradient)
                behind = k.gradient(curved, at=w - delta * gradient)
                gradient -= alpha / (2 * delta) * (ahead - behind)
            w.add_(gradient, alpha=-self.config.client_lr)
