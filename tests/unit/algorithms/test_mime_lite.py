"""MimeLite: the server's momentum in the clients' steps."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedmpi.algorithms.mime_lite import MimeLite
from fedmpi.errors import ConfigError
from fedmpi.fedavg import FedAvg
from tests.rounds import noise, play, points, stack


def test_two_rounds_by_hand() -> None:
    """One client, one sample x = 2 with label 0, lr = 1/2, beta = 3/4, one step per round.

    Round 0, at w = 0 with m = 0: gradient -1, w = 1/2 1/4 = 1/8; m = -1/4.
    Round 1, at w = 1/8: gradient g = -2 (1 - p) with p = 1 / (1 + exp(-1/2));
    w = 1/8 - 1/2 (g / 4 + 3/4 (-1/4)), m = 3/4 (-1/4) + g / 4.
    """
    g = -2 * (1 - 1 / (1 + math.exp(-0.5)))
    played = play(MimeLite, points([2], [0]), [1], client_lr=0.5, server_momentum=0.75, rounds=2)
    end, m = 1 / 8 - (g / 4 - 3 / 16) / 2, -3 / 16 + g / 4
    assert played.w.tolist() == pytest.approx([end, -end], rel=1e-6)
    momentum = played.server.flat[played.server.layout["momentum"].columns]
    assert momentum.tolist() == pytest.approx([m, -m], rel=1e-6)


def test_without_momentum_it_is_fedavg() -> None:
    options = {"batch_size": 8, "rounds": 3, "local_epochs": 2, "client_weight_decay": 0.01}
    mime = play(MimeLite, noise(), [20, 10, 30], stack, server_momentum=0.0, **options)
    plain = play(FedAvg, noise(), [20, 10, 30], stack, **options)
    assert torch.equal(mime.vector, plain.vector)
    assert mime.server.integer_state().tolist() == plain.server.integer_state().tolist()
    assert [record.train_loss for record in mime.records] == [record.train_loss for record in plain.records]


def test_it_is_the_papers_algorithm_in_plain_torch() -> None:
    """Two clients of 12 and 24 samples, full batches, three steps per round, three rounds, weight decay in the loss."""
    model, data = nn.Sequential(nn.Linear(6, 4)), noise(36)
    x, y = torch.from_numpy(np.asarray(data.train.x)), torch.from_numpy(data.train.y)
    beta, lr, decay = 0.9, 0.3, 0.05

    def gradient(w: torch.Tensor, part: slice) -> torch.Tensor:
        w = w.clone().requires_grad_()
        logits = x[part].double() @ w[:24].view(4, 6).T + w[24:]
        loss = functional.cross_entropy(logits, y[part]) + decay / 2 * w.square().sum()
        return torch.autograd.grad(loss, w)[0]

    w = nn.utils.parameters_to_vector(model.parameters()).detach().double()
    m = torch.zeros_like(w)
    for _ in range(3):
        update, mean = torch.zeros_like(w), torch.zeros_like(w)
        for part, share in ((slice(0, 12), 1 / 3), (slice(12, 36), 2 / 3)):
            local = w.clone()
            for _ in range(3):
                local -= lr * ((1 - beta) * gradient(local, part) + beta * m)
            update += share * (local - w)
            mean += share * gradient(w, part)
        w, m = w + update, beta * m + (1 - beta) * mean
    options = {"client_lr": lr, "server_momentum": beta, "client_weight_decay": decay, "local_epochs": 3, "rounds": 3}
    played = play(MimeLite, data, [12, 24], lambda: copy.deepcopy(model), **options)
    torch.testing.assert_close(played.w.double(), w, rtol=1e-5, atol=1e-6)


def test_momentum_goes_down_and_gradients_come_back() -> None:
    """Two entries of the model and two of the other segment, each way, per client."""
    played = play(MimeLite, points([1, 2, 3], [0] * 3), [1] * 3)
    assert (played.records[0].bytes_down, played.records[0].bytes_up) == (3 * 4 * 4, 3 * 4 * 4)


def test_a_second_momentum_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--server-momentum: --client-momentum 0\.5"):
        MimeLite.Config(client_momentum=0.5).check()
