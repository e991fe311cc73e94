"""Per-FedAvg: the gradient after one step of a client's own, with and without the Hessian."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedmpi.algorithms.per_fedavg import PerFedAvg
from fedmpi.core.seeding import Stream, derive_seed
from fedmpi.errors import ConfigError
from fedmpi.fedavg import FedAvg
from tests.rounds import noise, play, points, stack


@pytest.mark.parametrize(("delta", "factor"), [(0.0, 1.0), (1e-2, 0.5)])
def test_one_step_by_hand(delta: float, factor: float) -> None:
    """One client, one sample x = 2 with label 0, alpha = 1/4, beta = 1/8: D = D' = D'' is that sample.

    At w = 0 the gradient is -1, so that the client's own step leads to 1/4, where p = 1 / (1 + exp(-1)).
    (FO) w = beta c with c = 2 (1 - p).
    (HF) the Hessian at 0 along (1, -1) is 2 p (1 - p) 4 = 2: w = beta c (1 - 2 alpha) = beta c / 2.
    """
    c = 2 * (1 - 1 / (1 + math.exp(-1)))
    played = play(PerFedAvg, points([2], [0]), [1], client_lr=0.125, inner_lr=0.25, hessian_delta=delta)
    assert played.w.tolist() == pytest.approx([factor * c / 8, -factor * c / 8], rel=1e-4 if delta else 1e-6)
    assert played.records[0].train_loss == pytest.approx(math.log(2))


def test_without_a_step_of_the_clients_own_it_is_fedavg() -> None:
    options = {"batch_size": 8, "rounds": 3, "local_epochs": 2, "engine": "eager"}
    personal = play(PerFedAvg, noise(), [20, 10, 30], stack, inner_lr=0.0, **options)
    plain = play(FedAvg, noise(), [20, 10, 30], stack, **options)
    assert torch.equal(personal.vector, plain.vector)
    assert personal.records == plain.records, "also the training loss"


def test_it_is_autograd_through_the_clients_own_step() -> None:
    """The Hessian exactly, by differentiating f(w - alpha grad f(w; D); D') where D = D' = D'', in plain torch."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    weight, bias = (param.detach().clone().requires_grad_() for param in model[0].parameters())
    data, alpha, beta = noise(12), 0.3, 0.1
    x, y = torch.from_numpy(np.asarray(data.train.x)), torch.from_numpy(data.train.y)
    for _ in range(3):
        inner = torch.autograd.grad(functional.cross_entropy(x @ weight.T + bias, y), (weight, bias), create_graph=True)
        own = weight - alpha * inner[0], bias - alpha * inner[1]
        outer = torch.autograd.grad(functional.cross_entropy(x @ own[0].T + own[1], y), (weight, bias))
        with torch.no_grad():
            weight -= beta * outer[0]
            bias -= beta * outer[1]
    options = {"client_lr": beta, "inner_lr": alpha, "rounds": 3}
    exact = torch.cat([weight.detach().flatten(), bias.detach()])
    with_hessian = play(PerFedAvg, data, [12], lambda: copy.deepcopy(model), hessian_delta=1e-2, **options)
    torch.testing.assert_close(with_hessian.w, exact, rtol=1e-4, atol=1e-5)
    first_order = play(PerFedAvg, data, [12], lambda: copy.deepcopy(model), **options)
    assert (first_order.w - exact).abs().max() > 1e-3


def test_the_batches_of_a_step_come_in_three_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    """D' as FedAvg's batches, D and D'' in orders of their own; the step of batch i uses the i-th of each."""
    from fedmpi.halves.client import Client

    seen: list[list[int]] = []
    real = Client.gradient

    def gradient(self: Client, batch: object, at: object = None) -> torch.Tensor:
        seen.append(batch.inputs.flatten().tolist())  # type: ignore[attr-defined]  # a Batch
        return real(self, batch, at)  # type: ignore[arg-type]  # as it came

    monkeypatch.setattr(Client, "gradient", gradient)
    play(PerFedAvg, points(range(8), [0, 1] * 4), [8], batch_size=4, inner_lr=0.1, hessian_delta=0.1)
    orders = []
    for purpose in ("", "pass 1", "pass 2"):
        generator = torch.Generator().manual_seed(derive_seed(0, Stream.BATCHES, 0, 0, 0, purpose))
        orders.append(torch.randperm(8, generator=generator).tolist())
    outer, inner, curved = orders
    steps = [[inner[i : i + 4], outer[i : i + 4], curved[i : i + 4], curved[i : i + 4]] for i in (0, 4)]
    assert seen == [batch for step in steps for batch in step]


def test_statistics_move_once_per_step() -> None:
    """BatchNorm counts as many batches as FedAvg's, those at the model itself, and nothing else moves."""
    options = {"batch_size": 8, "rounds": 2, "local_epochs": 2}
    personal = play(PerFedAvg, noise(), [20, 10, 30], stack, inner_lr=0.1, hessian_delta=0.1, **options)
    plain = play(FedAvg, noise(), [20, 10, 30], stack, **options)
    assert personal.server.integer_state().tolist() == plain.server.integer_state().tolist() == [16]


@pytest.mark.parametrize("option", ["client_momentum", "client_weight_decay"])
def test_what_the_steps_do_not_have_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match="no --client-momentum and no --client-weight-decay"):
        PerFedAvg.Config(**{option: 0.5}).check()
