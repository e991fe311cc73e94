"""FedProx: the pull towards the model that was sent."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from fedmpi.algorithms.fedprox import FedProx
from fedmpi.fedavg import FedAvg
from tests.rounds import noise, play, points, stack, two_weights


def test_two_steps_by_hand() -> None:
    """One client, one sample x = 2 with label 0, lr = 1/4, mu = 2, two epochs of one step.

    At w = 0: p = 1/2, gradient -(1 - 1/2) 2 = -1, no pull: w = 1/4.
    At w = 1/4: p = 1 / (1 + exp(-1)), gradient -2 (1 - p) + 2 (1/4): w = 1/4 + (2 (1 - p) - 1/2) / 4 = 0.259471.
    """
    p = 1 / (1 + math.exp(-1))
    end = 0.25 + (2 * (1 - p) - 0.5) / 4
    assert end == pytest.approx(0.259471, abs=1e-6)
    played = play(FedProx, points([2], [0]), [1], client_lr=0.25, mu=2.0, local_epochs=2)
    assert played.w.tolist() == pytest.approx([end, -end], rel=1e-6)


def test_without_a_pull_it_is_fedavg() -> None:
    options = {"batch_size": 8, "rounds": 3, "local_epochs": 2, "client_momentum": 0.5}
    prox = play(FedProx, noise(), [20, 10, 30], stack, mu=0.0, **options)
    plain = play(FedAvg, noise(), [20, 10, 30], stack, **options)
    assert torch.equal(prox.vector, plain.vector)
    assert prox.records == plain.records
    assert not torch.equal(play(FedProx, noise(), [20, 10, 30], stack, mu=0.1, **options).vector, plain.vector)


def test_the_steps_are_torchs_with_the_proximal_term_in_the_loss() -> None:
    """torch.optim.SGD on loss + mu / 2 |w - w_t|^2: two clients of equal weight, full batches, momentum."""
    x, y, mu = torch.tensor([[1.0], [-2.0], [3.0], [0.5]]), torch.tensor([0, 1, 1, 0]), 0.7
    ends = []
    for part in (slice(0, 2), slice(2, 4)):
        model = two_weights(0.3)
        start = model.weight.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x[part]), y[part]) + mu / 2 * (model.weight - start).square().sum()
            loss.backward()
            optimizer.step()
        ends.append(model.weight.detach().flatten())
    played = play(
        FedProx, points(x.flatten().tolist(), y.tolist()), [2, 2], lambda: two_weights(0.3), mu=mu, client_lr=0.2,
        client_momentum=0.9, local_epochs=5,
    )  # fmt: skip
    torch.testing.assert_close(played.w, torch.stack(ends).mean(0), rtol=1e-5, atol=1e-6)
