"""Engines equal torch.optim.SGD."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmpi.core.vector import SerializationTool, flatten
from fedmpi.engines.eager import EagerEngine

GENERATOR_SEED = 3


class Tied(nn.Module):
    """A frozen layer, a BatchNorm and a weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(5, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(self.norm(self.frozen(x))).relu())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))


def batches(num_batches: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    return [
        (torch.randn(6, 5, generator=generator), torch.randint(4, (6,), generator=generator))
        for _ in range(num_batches)
    ]


@pytest.mark.parametrize("make", [mlp, Tied])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.01), (0.9, 0.01)], ids=str)
def test_eager_equals_torchs_sgd(make: type[nn.Module], momentum: float, weight_decay: float) -> None:
    torch.manual_seed(0)
    model = make()
    reference = copy.deepcopy(model)
    flatten(model)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=momentum, weight_decay=weight_decay)
    engine = EagerEngine(model, 0.1, momentum, weight_decay)
    for inputs, labels in batches(6):
        loss = functional.cross_entropy(reference(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        told = engine.epoch(inputs, labels, len(labels))
        assert told.shape == (1,)
        assert not told.requires_grad
        assert float(told) == pytest.approx(loss.item(), rel=1e-5)
    mine = model.state_dict()
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-6)


def test_steps_change_the_vector_itself() -> None:
    model = mlp()
    vector = flatten(model)
    engine = EagerEngine(model, 0.1, 0.0, 0.0)
    before = vector.clone()
    engine.epoch(*batches(1)[0], 2)
    assert not torch.equal(vector, before)
    assert torch.equal(SerializationTool.serialize_model(model), vector)


def test_float_buffers_and_frozen_parameters_get_no_step() -> None:
    model = Tied()
    flatten(model)
    frozen = model.frozen.weight.clone()
    engine = EagerEngine(model, 0.1, 0.9, 0.5)
    model.eval()  # now nothing but a step could change the running statistics
    for batch in batches(3):
        engine.epoch(*batch, 3)
    assert model.norm.running_mean.tolist() == [0] * 4
    assert model.norm.running_var.tolist() == [1] * 4
    assert torch.equal(model.frozen.weight, frozen)


def test_reset_forgets_the_momentum() -> None:
    model = mlp()
    vector = flatten(model)
    start = vector.clone()
    engine = EagerEngine(model, 0.1, 0.9, 0.0)
    ends = []
    for reset in (True, True, False):
        if reset:
            engine.reset()
        vector.copy_(start)
        for batch in batches(2):
            engine.epoch(*batch, 3)
        ends.append(vector.clone())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2]), "without a reset the velocity is still there"
