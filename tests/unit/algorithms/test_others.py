"""Algorithms of a user's own that ask other things of the interface: several models, and scalars beside the sums."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fedmpi.algorithm import Algorithm, Client, Server
from tests.rounds import play, points, two_weights


class Ifca(Algorithm[Any]):
    """Two models; each client trains the one with the smaller loss. Ghosh et al. 2020, arXiv 2006.04088."""

    def round(self, s: Server) -> None:
        models = [s.model.clone(), s.model.clone()]
        models[1].w.neg_()
        cohort = s.sample(4)
        told = [s.ask(cohort, self.local_loss, send=model) for model in models]
        halves = s.ask(cohort, self.local_loss, send=models, send_idx=[0, 1, 0, 1])
        assert halves == {k: told[k % 2][k] for k in range(4)}
        choice = np.argmin([[losses[k]["loss"] for k in cohort] for losses in told], 0)
        means = s.mean(cohort, self.client_update, buckets=choice, send=models, send_idx=choice)
        s.state["clusters"] = choice.tolist()
        s.state["w"] = [float(model.w[0] + mean.w[0]) for model, mean in zip(models, means, strict=True)]

    def local_loss(self, k: Client) -> None:
        k.report(loss=k.evaluate().loss)

    def client_update(self, k: Client) -> None:
        k.sgd()


def test_each_cluster_has_a_model_of_its_own() -> None:
    """Clients 0, 1 have x = 2 of label 0, clients 2, 3 of label 1; models w = 1/2 and -1/2, lr = 1/4.

    Each model takes the step of its own two clients: away from 0, by 2 (1 - p) / 4 with p = 1 / (1 + exp(-2)).
    """
    played = play(Ifca, points([2] * 4, [0, 0, 1, 1]), [1] * 4, lambda: two_weights(0.5), client_lr=0.25)
    end = 0.5 + (1 - 1 / (1 + math.exp(-2))) / 2
    assert played.server.state["clusters"] == [0, 0, 1, 1]
    assert played.server.state["w"] == pytest.approx([end, -end], rel=1e-6)


class FedNova(Algorithm[Any]):
    """Normalised updates. Wang et al. 2020, arXiv 2007.07481, equation 6."""

    def round(self, s: Server) -> None:
        mean = s.mean(s.sample(self.config.clients_per_round), self.client_update)
        s.step("w", mean.w, mean.reported["a"])

    def client_update(self, k: Client) -> None:
        steps = k.sgd()
        assert steps.scale is not None
        k.back.w.sub_(k.sent.w).div_(steps.scale).add_(k.sent.w)
        k.report(a=steps.scale)


def test_fednova_by_hand() -> None:
    """Clients of 1 and 3 samples (x = 0 but for the first, of 2 and 4), batches of 1, momentum 1/2, small lr.

    a = 1 for one step, 1 + 3/2 + 7/4 = 17/4 for three; tau_eff = 1/4 1 + 3/4 17/4 = 55/16.
    At lr -> 0 the gradients are -x / 2: d_0 = 1 lr; client 1 meets its 4 in step j, and the later 0s carry it on:
    (1 + 1/2 + 1/4) 2 lr, (1 + 1/2) 2 lr or 2 lr.
    """
    lr = 2.0**-20
    played = play(FedNova, points([2, 4, 0, 0], [0] * 4), [1, 3], batch_size=1, client_lr=lr, client_momentum=0.5)
    ends = [(0.25 + 0.75 * carried * 2 / 4.25) * 55 / 16 for carried in (1.75, 1.5, 1.0)]
    assert any(played.w[0].item() / lr == pytest.approx(end, rel=1e-4) for end in ends)


class Diverged(Ifca):
    """A model with weights of which a loss is not finite."""

    def round(self, s: Server) -> None:
        s.model.w.fill_(1e38)
        assert s.ask([0], self.local_loss)[0]["loss"] == math.inf
        assert math.isnan(s.ask([1], self.local_loss)[1]["loss"]), "no samples"
        s.model.w.zero_()


def test_losses_that_are_not_finite_are_numbers_too() -> None:
    play(Diverged, points([1e3], [0]), [1, 0])
