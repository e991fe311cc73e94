"""Engines equal torch.optim.SGD."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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
            engine.begin()
        vector.copy_(start)
        for batch in batches(2):
            engine.epoch(*batch, 3)
        ends.append(vector.clone())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2]), "without a reset the velocity is still there"


class Custom(torch.autograd.Function):
    """x * w, whose gradient for w is the memory of w itself."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(w)
        return x + 0 * w.sum()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, ctx.saved_tensors[0].detach()


class Odd(nn.Module):
    """Parameters whose gradients share memory, are expanded, are views, or are not there."""

    def __init__(self, parts: frozenset[str]) -> None:
        super().__init__()
        self.parts = parts
        self.shared, self.own = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(4, 5))
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 5)), nn.Parameter(torch.randn(1, 3, 5))
        self.shift, self.square = nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(4, 4))
        self.returned, self.unused = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3))
        self.table = nn.Embedding(3, 4, sparse="sparse" in parts)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if "tokens" in self.parts:  # ViT: a class token in front, positions added; a batch of one is no sum
            tokens = torch.cat([self.token.expand(len(x), -1, -1), x[:, None].expand(-1, 2, -1)], 1) + self.position
            x = tokens.mean(1)
        y = functional.linear(x, self.shared + self.own if "sum" in self.parts else self.shared)
        if "expand" in self.parts:
            y = y + self.shift.sum() * torch.arange(4.0)
        if "twice" in self.parts:
            y = functional.linear(functional.linear(y, self.square.t()).tanh(), self.square)
        if "custom" in self.parts:
            y = Custom.apply(y, self.returned)
        if "embedding" in self.parts or "sparse" in self.parts:
            y = y + self.table((x[:, 0] > 0).long())
        if "some" in self.parts and self.calls % 2:  # unused in every other step
            y = y * self.returned.exp()
        return y


PARTS = ["sum", "tokens", "expand", "twice", "custom", "embedding", "some"]


@given(
    st.frozensets(st.sampled_from(PARTS)),
    st.sampled_from([0.0, 0.9]),
    st.sampled_from([0.0, 0.1]),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_eager_is_torchs_sgd_whatever_the_gradients_are(parts, momentum, weight_decay, sizes):
    check_against_torch(Odd(parts), momentum, weight_decay, sizes)


@pytest.mark.parametrize("parts", [[], *([part] for part in PARTS), ["sum", "tokens", "custom", "some"]])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.1)])
def test_eager_is_torchs_sgd_for_each_kind(parts, momentum, weight_decay):
    check_against_torch(Odd(frozenset(parts)), momentum, weight_decay, [3, 3, 1])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_eager_takes_sparse_gradients(momentum):
    check_against_torch(Odd(frozenset(["sparse", "sum"])), momentum, 0.0, [3, 3, 1])


def check_against_torch(model, momentum, weight_decay, sizes):
    torch.manual_seed(0)
    reference = copy.deepcopy(model)
    flatten(model)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=momentum, weight_decay=weight_decay)
    engine = EagerEngine(model, 0.05, momentum, weight_decay)
    for size in sizes:
        inputs, labels = torch.randn(size, 5), torch.randint(4, (size,))
        optimizer.zero_grad()
        functional.cross_entropy(reference(inputs), labels).backward()
        optimizer.step()
        engine.epoch(inputs, labels, size)
    for (name, mine), wanted in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, wanted), f"{name}: {(mine - wanted).abs().max()}"


@pytest.mark.parametrize(
    ("n", "batch_size", "smallest", "sizes"),
    [(7, 3, 1, [3, 3, 1]), (7, 3, 2, [3, 4]), (8, 3, 2, [3, 3, 2]), (3, 3, 2, [3]), (4, 3, 2, [4]), (1, 3, 2, [1])],
)
def test_a_last_batch_that_is_too_small_joins_the_one_before(n, batch_size, smallest, sizes):
    seen = []
    model = mlp()
    model.register_forward_hook(lambda module, inputs, outputs: seen.append(inputs[0][:, 0].tolist()))
    flatten(model)
    inputs = torch.randn(n, 5)
    losses = EagerEngine(model, 0.1, 0.0, 0.0, smallest).epoch(inputs, torch.zeros(n, dtype=torch.int64), batch_size)
    assert [len(batch) for batch in seen] == sizes
    assert len(losses) == len(sizes)
    assert [value for batch in seen for value in batch] == inputs[:, 0].tolist()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_hooks_that_wait_for_the_accumulated_gradient_are_called(momentum):
    def clamp(param):
        param.grad.clamp_(-1e-3, 1e-3)

    torch.manual_seed(1)
    models = [nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 4)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for param in (*models[0].parameters(), *models[1].parameters()):
        param.register_post_accumulate_grad_hook(clamp)
    flatten(models[0])
    engine = EagerEngine(models[0], 0.05, momentum, 0.01)
    optimizer = torch.optim.SGD(models[1].parameters(), lr=0.05, momentum=momentum, weight_decay=0.01)
    for size in (4, 4, 1):
        inputs, labels = torch.randn(size, 5), torch.randint(4, (size,))
        optimizer.zero_grad()
        functional.cross_entropy(models[1](inputs), labels).backward()
        optimizer.step()
        engine.epoch(inputs, labels, size)
    for mine, wanted in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(mine, wanted)
        assert mine.grad is None
