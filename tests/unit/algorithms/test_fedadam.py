"""FedAdam: the server's moments, in float64, kept from round to round."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from fedmpi.algorithms.fedadam import FedAdam
from fedmpi.fedavg import FedAvg
from tests.rounds import noise, play, points, stack


def test_two_rounds_by_hand() -> None:
    """One client, one sample x = 2 with label 0, client lr = 1/4; b1 = 1/2, b2 = 3/4, tau = 1/10, server lr = 1/5.

    Round 0, at w = 0: the client's update is d = (1 - 1/2) 2 / 4 = 1/4.
    m = 1/8, v = 3/4 0.01 + 1/4 1/16 = 0.023125, w = 1/5 m / (sqrt(v) + 1/10) = 0.0991792.
    Round 1: p = 1 / (1 + exp(-4 w)), d = (1 - p) 2 / 4; m and v move again, from those of round 0.
    """
    w, m, v = 0.0, 0.0, 0.1**2
    for _ in range(2):
        d = (1 - 1 / (1 + math.exp(-4 * w))) / 2
        m, v = m / 2 + d / 2, 0.75 * v + 0.25 * d * d
        w += 0.2 * m / (math.sqrt(v) + 0.1)
    options = {"client_lr": 0.25, "server_lr": 0.2, "beta1": 0.5, "beta2": 0.75, "tau": 0.1}
    first = play(FedAdam, points([2], [0]), [1], **options)
    assert first.w.tolist() == pytest.approx([0.0991792, -0.0991792], abs=1e-6)
    second = play(FedAdam, points([2], [0]), [1], rounds=2, **options)
    assert second.w.tolist() == pytest.approx([w, -w], rel=1e-6)
    assert second.server.state["m"].tolist() == pytest.approx([m, -m], rel=1e-6)
    assert second.server.state["v"].dtype == torch.float64


def test_without_memory_and_with_v_at_1_it_is_fedavg() -> None:
    """b1 = 0, b2 = 1, tau = 1: m = d and v = 1 to the bit, so that server lr 2 undoes the division by 1 + 1."""
    options = {"batch_size": 8, "rounds": 3}
    adam = play(FedAdam, noise(), [20, 10, 30], stack, beta1=0.0, beta2=1.0, tau=1.0, server_lr=2.0, **options)
    plain = play(FedAvg, noise(), [20, 10, 30], stack, **options)
    assert torch.equal(adam.vector, plain.vector)
    assert adam.records == plain.records


def test_it_is_torchs_adam_but_for_the_correction_of_the_bias() -> None:
    """torch's Adam along -d with v from 0: its step divides m by 1 - b1^t and sqrt(v) by sqrt(1 - b2^t).

    Ours with tau -> 0 and server lr_t = lr sqrt(1 - b2^t) / (1 - b1^t) is the same step. One round: lr sqrt(.01) / .1.
    """
    model = torch.nn.Linear(6, 4)
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    options = {"make_model": lambda: copy.deepcopy(model), "batch_size": 8}
    played = play(FedAdam, noise(), [20, 10, 30], server_lr=0.05, tau=1e-12, **options)
    plain = play(FedAvg, noise(), [20, 10, 30], **options)
    param = torch.nn.Parameter(start.clone())
    param.grad = -(plain.w - start)
    torch.optim.Adam([param], lr=0.05, betas=(0.9, 0.99), eps=1e-12).step()
    moved = param.detach() - start
    ours = (played.w - start) / (math.sqrt(0.01) / 0.1)
    torch.testing.assert_close(ours, moved, rtol=1e-3, atol=1e-6)


def test_float_buffers_are_averaged() -> None:
    adam = play(FedAdam, noise(), [20, 10, 30], stack, batch_size=8)
    plain = play(FedAvg, noise(), [20, 10, 30], stack, batch_size=8)
    assert torch.equal(adam.vector[len(adam.w) :], plain.vector[len(plain.w) :])
    assert not torch.equal(adam.w, plain.w)
