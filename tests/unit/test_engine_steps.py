"""Settings of a client's steps: prox, constant, step size, parts that move; the count of steps; and the gradient alone.

Shapes: T trainable entries.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fedmpi.core.vector import flatten, num_trainable
from fedmpi.engines.eager import EagerEngine
from fedmpi.engines.fused import FusedEngine
from fedmpi.engines.gradients import gradient, loss
from fedmpi.engines.graph import GraphEngine
from fedmpi.engines.steps import batch_slices

LR, PROX = 0.1, 0.3


def graph_engine(*args):
    """The graph engine with plain repetition in place of a recording."""

    def record(work):
        result = work()
        work()
        return lambda: result.copy_(work()), result

    return GraphEngine(*args, record)


ENGINES = {"eager": EagerEngine, "fused": FusedEngine, "graph": graph_engine}


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 40), nn.ReLU(), nn.Linear(40, 12), nn.ReLU(), nn.Linear(12, 5))


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 2), nn.Flatten(), nn.Linear(6, 5)
    )


def flat(model):
    """Like `flatten`, for any dtype; returns the (T,) vector."""
    vector = torch.cat([param.detach().reshape(-1) for param in model.parameters()])
    start = 0
    for param in model.parameters():
        param.data = vector[start : start + param.numel()].view(param.shape)
        start += param.numel()
    return vector


def epochs(dtype=torch.float32, sizes=((23, 5), (12, 4))):
    """(inputs, labels, batch size) of some epochs, with remainders."""
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(n, 1, 6, 6, generator=generator).to(dtype), torch.randint(5, (n,), generator=generator), size)
        for n, size in sizes
    ]


def explicit_sgd(model, vector, batches, prox, anchor, drift, lr=LR, momentum=0.0, weight_decay=0.0):
    """torch.optim.SGD with the explicit term g + prox (w - anchor) + drift; returns the vector's end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    sizes = [param.numel() for param in model.parameters()]
    for inputs, labels, size in batches:
        for x, y in zip(torch.split(inputs, size), torch.split(labels, size), strict=True):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            terms = torch.split(prox * (vector - anchor) + drift, sizes)
            for param, term in zip(model.parameters(), terms, strict=True):
                param.grad += term.view_as(param)
            optimizer.step()
    return vector.clone()


def proximal_case(dtype, kind, drift):
    """(model, its vector, anchor, drift) with an anchor that is not the start."""
    torch.manual_seed(0)
    model = kind().to(dtype)
    vector = flat(model)
    generator = torch.Generator().manual_seed(1)
    anchor = vector + 0.1 * torch.randn(len(vector), generator=generator).to(dtype)
    return model, vector, anchor, drift * torch.randn(len(vector), generator=generator).to(dtype)


CASES = list(
    itertools.product([mlp, cnn], [0.0, 0.9], [0.0, 0.02], [(PROX, 0.0), (0.0, 0.05), (PROX, 0.05), (5.0, 0.0)])
)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(("kind", "momentum", "weight_decay", "terms"), CASES)
def test_the_constant_vector_is_the_explicit_term(name, kind, momentum, weight_decay, terms):
    """In float64 to 1e-12; in float32 at most 4 times as far from float64 as torch's SGD is."""
    prox, drift = terms
    sgd = {"momentum": momentum, "weight_decay": weight_decay}
    ends = {}
    for dtype in (torch.float64, torch.float32):
        model, vector, anchor, shift = proximal_case(torch.float32, kind, drift)
        model, anchor, shift = model.to(dtype), anchor.to(dtype), shift.to(dtype)
        vector = flat(model)
        engine = ENGINES[name](model, LR, momentum, weight_decay)
        constant = (shift.double() - prox * anchor.double()).to(dtype)
        start = vector.clone()
        engine.begin(prox=prox, constant=constant)
        batches = epochs(dtype) * 3
        for batch in batches:
            engine.epoch(*batch)
        ends["engine", dtype] = vector.clone()
        vector.copy_(start)
        ends["torch", dtype] = explicit_sgd(model, vector, batches, prox, anchor, shift, **sgd)
    exact = ends["torch", torch.float64]
    assert (ends["engine", torch.float64] - exact).abs().max() < 1e-12 * max(1, exact.abs().max())
    errors = {key: (ends[key, torch.float32].double() - exact).norm() for key in ("engine", "torch")}
    assert errors["engine"] <= 4 * errors["torch"], errors["engine"] / errors["torch"]


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.02)])
def test_settings_are_those_of_the_last_begin(name, momentum, weight_decay):
    """Neither step size, prox, constant, `only` nor momentum of one client reaches the next, and 0 is no prox."""
    ends = []
    for before in (
        {},
        {"lr": 0.5},
        {"prox": 0.2},
        {"constant": torch.ones(2037)},
        {"only": [slice(7)]},
        {"prox": 1, "lr": 2},
    ):
        torch.manual_seed(0)
        model = mlp()
        vector = flatten(model)
        assert len(vector) == 2037
        start = vector.clone()
        engine = ENGINES[name](model, LR, momentum, weight_decay)
        engine.begin(**before)
        engine.epoch(*epochs()[0])
        vector.copy_(start)
        engine.begin(lr=None, prox=0.0, constant=None, only=None)
        losses = [engine.epoch(*batch) for batch in epochs()]
        ends.append(torch.cat([vector, *losses]))
    assert all(torch.equal(end, ends[0]) for end in ends)


@pytest.mark.parametrize("name", ENGINES)
def test_a_step_size_per_client(name):
    torch.manual_seed(0)
    models = [mlp()]
    models.append(copy.deepcopy(models[0]))
    vectors = [flatten(model) for model in models]
    engines = ENGINES[name](models[0], 0.07, 0.9, 0.01), ENGINES[name](models[1], LR, 0.9, 0.01)
    engines[1].begin(lr=0.07)
    for batch in epochs():
        assert torch.equal(*(engine.epoch(*batch) for engine in engines))
    assert torch.equal(*vectors)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("kind", [mlp, cnn])
@pytest.mark.parametrize("parts", ["head", "body", "rows", "nothing"])
@pytest.mark.parametrize(("momentum", "weight_decay", "prox"), [(0.9, 0.02, 0.0), (0.0, 0.02, PROX)])
def test_only_some_entries_move(name, kind, parts, momentum, weight_decay, prox):
    """One step moves the entries that move as it does without `only`; after more steps the others keep their bits."""
    torch.manual_seed(0)
    model = kind()
    vector = flatten(model)
    head = sum(param.numel() for param in list(model.parameters())[-2:])
    only = {
        "head": [slice(len(vector) - head, len(vector))],
        "body": [slice(0, 9), slice(9, len(vector) - head)],
        "rows": [slice(3, 17), slice(30, 31), slice(len(vector) - 3, None)],
        "nothing": [],
    }[parts]
    moves = torch.zeros(len(vector), dtype=torch.bool)
    for part in only:
        moves[part] = True
    engine = ENGINES[name](model, LR, momentum, weight_decay)
    engine.block_entries = 64  # the fused engine's Linear in several blocks
    constant = torch.full_like(vector, 0.01) if prox else None
    start, (inputs, labels, _) = vector.clone(), epochs()[0]
    engine.begin(prox=prox, constant=constant)
    engine.epoch(inputs, labels, len(labels))
    everything = vector.clone()
    vector.copy_(start)
    engine.begin(prox=prox, constant=constant, only=only)
    vector.add_(1)  # what is kept is what is there at the step, not at `begin`
    vector.copy_(start)
    engine.epoch(inputs, labels, len(labels))
    assert torch.equal(vector, torch.where(moves, everything, start))
    for batch in epochs():
        engine.epoch(*batch)
    assert torch.equal(vector[~moves], start[~moves])
    assert engine.steps().count == 9


class Partial(nn.Module):
    """A parameter that the loss does not use."""

    def __init__(self):
        super().__init__()
        self.layer, self.unused = nn.Linear(3, 2), nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, x):
        return self.layer(x)


def test_prox_and_constant_move_a_parameter_without_gradient():
    """w <- w - 0.1 (0.5 w + 3) = (1 - 0.1 3.5, 2 - 0.1 4); without either, it stays, also under decay."""
    model = Partial()
    flatten(model)
    engine = EagerEngine(model, 0.1, 0.0, 0.4)
    batch = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64), 4
    engine.epoch(*batch)
    assert model.unused.tolist() == [1, 2]
    engine = EagerEngine(model, 0.1, 0.0, 0.0)
    engine.begin(prox=0.5, constant=torch.full((10,), 3.0))
    engine.epoch(*batch)
    torch.testing.assert_close(model.unused.data, torch.tensor([0.65, 1.6]))


def taken(momentum, prox, lr, count, own_lr=LR, weight_decay=0.0):
    model = mlp()
    flatten(model)
    engine = FusedEngine(model, own_lr, momentum, weight_decay)
    engine.begin(lr=lr, prox=prox)
    inputs, labels, _ = epochs()[0]
    engine.epoch(inputs[:count], labels[:count], 1)
    return engine.steps()


def test_steps_are_counted_since_begin():
    model = mlp()
    flatten(model)
    for kind in ENGINES.values():
        engine = kind(model, LR, 0.0, 0.0)
        for _ in range(2):
            engine.begin()
            assert (engine.steps().count, engine.steps().scale) == (0, 0.0)
            for batch in epochs():
                engine.epoch(*batch)  # 5 + 3 batches
            assert (engine.steps().count, engine.steps().scale) == (8, 8.0)


@pytest.mark.parametrize(
    ("momentum", "prox", "lr", "scale"),
    [
        (0.0, 0.0, 0.25, 3),
        (0.5, 0.0, 0.25, 1 + 1.5 + 1.75),
        (0.0, 2.0, 0.25, 1 + 0.5 + 0.25),
        (0.5, 2.0, 0.25, 1 + 1 + 0.5),
        (0.0, 2.0, 0.0, 3),
        (0.0, 2.0, None, 1 + 0.5 + 0.25),
    ],
)
def test_scale_by_hand(momentum, prox, lr, scale):
    """Three steps with g = 1 and u = (w - w_0) / -lr: v <- momentum v + 1 - lr prox u; u <- u + v.

    Both: v = 1, u = 1; v = 0.5 + 1 - 0.5 = 1, u = 2; v = 0.5 + 1 - 1 = 0.5, u = 2.5. A step size of 0 moves nothing,
    and prox then pulls nothing back; None is the engine's own, 0.25.
    """
    assert taken(momentum, prox, lr, 3, own_lr=0.25) == taken(momentum, prox, lr, 3, own_lr=0.25, weight_decay=0.1)
    assert taken(momentum, prox, lr, 3, own_lr=0.25).scale == scale


@given(
    st.integers(1, 12), st.sampled_from([0.0, 0.3, 0.9]), st.sampled_from([0.0, 0.1, 2.0]), st.sampled_from([0.05, 0.3])
)
def test_scale_is_fednovas(count, momentum, prox, lr):
    """a_k of FedNova's table 1 for momentum or prox, and the recurrence itself for both."""
    steps = taken(momentum, prox, lr, count)
    assert steps.count == count
    if not prox:
        wanted = sum((1 - momentum ** (count - j)) / (1 - momentum) for j in range(count))
    elif not momentum:
        wanted = sum((1 - lr * prox) ** j for j in range(count))
    else:
        w = v = 0.0
        for _ in range(count):
            v = momentum * v + 1 + prox * w
            w -= lr * v
        wanted = -w / lr
    assert steps.scale == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", ENGINES)
def test_scale_is_where_a_constant_gradient_leads(name):
    """All inputs 0 and one class alone: gradients are those of the constant."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 1, bias=False)).double()
    vector = flat(model)
    vector.zero_()
    engine = ENGINES[name](model, LR, 0.9, 0.0)
    slope = torch.linspace(-1, 1, 36, dtype=torch.float64)
    engine.begin(prox=PROX, constant=slope)
    engine.epoch(torch.zeros(7, 1, 6, 6, dtype=torch.float64), torch.zeros(7, dtype=torch.int64), 2)
    torch.testing.assert_close(vector, -LR * engine.steps().scale * slope, rtol=1e-12, atol=0)


class Odd(nn.Module):
    """A BatchNorm, dropout, an expanded gradient, a shared one, and parameters of uneven sizes."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(36, 33), nn.BatchNorm1d(33), nn.Linear(33, 5)
        self.shift, self.other, self.unused = (nn.Parameter(torch.randn(n)) for n in (7, 7, 3))

    def forward(self, x):
        x = torch.dropout(self.norm(self.a(x.flatten(1))).relu(), 0.2, True)
        return self.b(x) + (self.shift + self.other).sum() * torch.arange(5)


@pytest.mark.parametrize("kind", [mlp, cnn, Odd])
@pytest.mark.parametrize("n", [23, 21])
def test_the_gradient_in_a_loop_gives_the_eager_engines_bits(kind, n):
    torch.manual_seed(0)
    model = kind()
    vector = flatten(model)
    w, start = vector[: num_trainable(model)], vector.clone()
    engine = EagerEngine(model, LR, 0.0, 0.0, smallest_batch=2)
    inputs, labels, size = epochs(sizes=[(n, 5)])[0]
    torch.manual_seed(1)
    engine.epoch(inputs, labels, size)
    end = vector.clone()
    vector.copy_(start)
    torch.manual_seed(1)
    for rows in batch_slices(n, size, 2):
        w.add_(gradient(model, inputs[rows], labels[rows]), alpha=-LR)
    assert torch.equal(vector, end)


@given(st.integers(1, 300), st.integers(0, 40), st.sampled_from([-0.1, -1 / 3, 0.01]))
def test_a_step_has_the_same_bits_per_tensor_and_flat(count, start, alpha):
    """Fused multiply-adds included, whatever the alignment and the remainder."""
    w, direction = torch.randn(2, start + count)
    flat_step = w.add(direction, alpha=alpha)
    part = w[start:]
    torch._foreach_add_([part], [direction[start:].clone()], alpha=alpha)
    assert torch.equal(part, flat_step[start:])


def test_gradient_and_loss_take_another_criterion_and_a_sparse_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 3, sparse=True), nn.Flatten(), nn.Linear(6, 1))
    flatten(model)
    inputs, wanted = torch.tensor([[1, 1], [4, 2]]), torch.zeros(2, 1)
    value = loss(model, inputs, wanted, functional.mse_loss)
    assert not value.requires_grad
    assert float(value) == pytest.approx(float(model(inputs).detach().square().mean()))
    got = gradient(model, inputs, wanted, functional.mse_loss)
    assert (got.shape, got.requires_grad, got.layout) == ((25,), False, torch.strided)
    functional.mse_loss(model(inputs), wanted).backward()
    torch.testing.assert_close(got[:18].view(6, 3), model[0].weight.grad.to_dense())


@pytest.mark.parametrize(
    ("n", "size", "smallest", "sizes"),
    [
        (7, 3, 1, [3, 3, 1]),
        (7, 3, 2, [3, 4]),
        (8, 3, 2, [3, 3, 2]),
        (3, 3, 2, [3]),
        (4, 3, 2, [4]),
        (1, 3, 2, [1]),
        (0, 3, 2, []),
        (1, 1, 1, [1]),
    ],
)
def test_batch_slices(n, size, smallest, sizes):
    slices = batch_slices(n, size, smallest)
    assert [part.stop - part.start for part in slices] == sizes
    assert [i for part in slices for i in range(n)[part]] == list(range(n))


def test_recordings_hold_for_one_setting_and_few_are_kept():
    """A client's prox, step size or parts are recorded anew; going back and forth between few settings is not."""
    model = mlp()
    flatten(model)
    recordings = []

    def record(work):
        recordings.append(work)
        result = work()
        return lambda: result.copy_(work()), result

    engine = GraphEngine(model, LR, 0.0, 0.0, record)
    settings = [{}, {"prox": 1.0}, {"lr": 0.2}, {"only": [slice(40)]}]
    for setting in settings * 3:
        engine.begin(**setting)
        engine.epoch(*epochs(sizes=[(10, 5)])[0])
    assert len(recordings) == 4
    for lr in (0.01, 0.02, 0.03, 0.04):
        engine.begin(lr=lr)
        engine.epoch(*epochs(sizes=[(10, 5)])[0])
    engine.begin()
    engine.epoch(*epochs(sizes=[(10, 5)])[0])
    assert len(recordings) == 9, "the first setting's was dropped"
